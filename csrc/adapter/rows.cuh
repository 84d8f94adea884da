// SPDX-License-Identifier: Apache-2.0
// The products of the adapter that have R columns, bound by the one read of x or dy: a block has 64
// rows and streams them and the factor in chunks of columns through a ring of cp.async stages.
//
// The norm is folded in: with D' = D w, norm(x) D^T = (x D'^T - mean sum(D')) / deviation + D b.
// The sums for mean and deviation come from the operands of the products, less the row's first
// element, so that a large mean cancels nothing. D' is rounded once, and its sum is that of what is
// rounded: an error of D' meets x - mean, as n's own rounding would.
#pragma once

#include <algorithm>

#include "adapter/kernels.h"
#include "lora/skinny.cuh"

namespace pyfast::adapter {

using namespace lora::skinny;

constexpr unsigned kAll = 0xFFFFFFFF;

// Copies tiles of kRows x kUnits 16-byte units, one after another along the rows or the columns of
// a matrix; zeros outside of it. What does not change from tile to tile is worked out once.
template <int kRows, int kUnits, int kThreads, class TileIn = lora::skinny::Tile<kRows, kUnits>>
class Loader {
 public:
  static constexpr int kStep = kThreads / kUnits;  // rows between units of a thread
  static constexpr int kCount = std::max(1, kRows / kStep);
  static constexpr bool kSome = kRows < kStep;  // only some of the threads have a unit
  static_assert(kStep % 8 == 0, "else the units of a thread are not permuted alike");

  __device__ __forceinline__ Loader(const void* matrix, std::int64_t pitch, int row, int col,
                                    int rows, int cols)
      : row_bytes_(pitch * 2),
        rows_(rows - row - thread() / kUnits),
        cols_(cols - col - thread() % kUnits * 8),
        offset_(TileIn::offset(thread() / kUnits, thread() % kUnits)),
        from_(static_cast<const char*>(matrix) + (row + thread() / kUnits) * row_bytes_ +
              (col + thread() % kUnits * 8) * 2) {}
  __device__ __forceinline__ void load(std::uint32_t tile) const {
    if (kSome && thread() >= kRows * kUnits) return;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const bool in = i * kStep < rows_ && cols_ > 0;
      // Of no bytes the address is not looked at.
      copy16(tile + offset_ + i * kStep * TileIn::kRowBytes, from_ + i * kStep * row_bytes_,
             in ? 16 : 0);
    }
  }
  __device__ __forceinline__ void next_rows() {
    rows_ -= kRows;
    from_ += kRows * row_bytes_;
  }
  __device__ __forceinline__ void next_cols() {
    cols_ -= kUnits * 8;
    from_ += kUnits * 16;
  }

 private:
  static __device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x); }

  std::int64_t row_bytes_;
  int rows_, cols_;  // ahead of the thread's first unit
  std::uint32_t offset_;
  const char* from_;
};

template <int kRankIn>
struct RowsShape {
  static constexpr int kRank = kRankIn;
  // Of few ranks reading binds, of many the warps' reading of operands from shared memory: fewer
  // warps with larger tiles.
  static constexpr bool kMany = kRank > 64;
  static constexpr int kThreads = kMany ? 256 : 512, kWarps = kThreads / 32;
  static constexpr int kRows = kMany ? 128 : 64;
  static constexpr int kCols = kMany ? 64 : 128;  // of a chunk
  // A warp has so many tiles of 16 rows, up to 64 ranks and a part of the columns.
  static constexpr int kTilesM = kMany ? 4 : 2, kWarpRows = kTilesM * 16;
  static constexpr int kGroupsM = kRows / kWarpRows, kGroupsN = std::max(1, kRank / 64);
  static constexpr int kGroupsK = kWarps / kGroupsM / kGroupsN;
  static constexpr int kSteps = kCols / 16 / kGroupsK;
  static constexpr int kTiles = kRank / 8 / kGroupsN;  // of 8 ranks, of a warp
  // Of its rows' moments, which the groups of ranks share.
  static constexpr int kMomentTiles = kTilesM / kGroupsN;
  static constexpr int kStage = (kRows + kRank) * kCols * 2;
  static constexpr int kStages = std::min(6, 158 * 1024 / kStage);
  static constexpr int kPitch = kRank + 8;  // of the sums, so that a quad's banks differ
  static constexpr int kStatic = (kGroupsK + 1 + std::max(1, kRank / 64)) * kRows * 8 + 16;
  static constexpr int kShared = std::max(kStages * kStage, kGroupsK * kRows * kPitch * 4);
  static constexpr int kPart = kRows * (kRank + 2);  // floats that a slab leaves to the others
};

template <class T>
__device__ __forceinline__ float2 widen_pair(std::uint32_t pair) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000U));
  } else {
    __half2 halves;
    memcpy(&halves, &pair, sizeof halves);
    return __half22float2(halves);
  }
}
template <class T>
__device__ __forceinline__ std::uint32_t pack_pair(float low, float high) {
  T values[2];
  narrow_pair(low, high, values);
  std::uint32_t pair;
  memcpy(&pair, values, sizeof pair);
  return pair;
}

__device__ __forceinline__ uint4 load_shared16(std::uint32_t at) {
  uint4 value;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(at)
               : "memory");
  return value;
}

// In float32 to a few units of the last place, of which the results keep 11 bits or fewer.
__device__ __forceinline__ float sigmoid(float h) { return __fdividef(1.0F, 1.0F + __expf(-h)); }

__device__ __forceinline__ float activate(float h, Activation activation) {
  if (activation == Activation::relu) return h > 0 || isnan(h) ? h : 0.0F;
  if (activation == Activation::silu) return h * sigmoid(h);
  return 0.5F * h * (1.0F + erff(h * 0.70710678F));
}
__device__ __forceinline__ float activate_backward(float grad, float h, Activation activation) {
  if (activation == Activation::relu) return h > 0 || isnan(h) ? grad : 0.0F;
  if (activation == Activation::silu) {
    const float s = sigmoid(h);
    return grad * s * (1.0F + h * (1.0F - s));
  }
  const float cdf = 0.5F * (1.0F + erff(h * 0.70710678F));
  return grad * (cdf + h * 0.39894228F * __expf(-0.5F * h * h));
}

// Sums of a row's elements and of their squares, each less the same number.
struct Moments {
  float shift = 0, sum = 0, squares = 0;
  __device__ __forceinline__ void add(float2 pair) {
    const float low = pair.x - shift, high = pair.y - shift;
    sum += low + high;
    squares = fmaf(low, low, squares);
    squares = fmaf(high, high, squares);
  }
};

// Where a warp stands.
template <class S>
struct Place {
  int lane, group_m, group_n, group_k;
  __device__ __forceinline__ Place()
      : lane(static_cast<int>(threadIdx.x) % 32),
        group_m(static_cast<int>(threadIdx.x) / 32 % S::kGroupsM),
        group_n(static_cast<int>(threadIdx.x) / 32 / S::kGroupsM % S::kGroupsN),
        group_k(static_cast<int>(threadIdx.x) / 32 / (S::kGroupsM * S::kGroupsN)) {}
  // The row of the i-th of the moments.
  __device__ __forceinline__ int moment_row(int i) const {
    return group_m * S::kWarpRows + group_n * S::kMomentTiles * 16 + i * 8 + lane / 4;
  }
};

template <class S>
using RowMoments = Moments[S::kMomentTiles * 2];

// The operands of 16 columns.
template <class S>
struct Operands {
  std::uint32_t rows[S::kTilesM][4], ranks[S::kTiles / 2][4];

  template <class TileT, class TileF, bool kByRank>
  __device__ __forceinline__ void load(const Place<S>& place, std::uint32_t tile_t,
                                       std::uint32_t tile_f, int k) {
    const int lane = place.lane;
#pragma unroll
    for (int m = 0; m < S::kTilesM; ++m) {
      load_matrices<false>(rows[m],
                           tile_t + TileT::offset(place.group_m * S::kWarpRows + m * 16 + lane % 16,
                                                  k * 2 + lane / 16));
    }
#pragma unroll
    for (int n = 0; n < S::kTiles; n += 2) {
      const int rank = place.group_n * S::kTiles + n;
      if constexpr (kByRank) {
        load_matrices<false>(
            ranks[n / 2],
            tile_f + TileF::offset(rank * 8 + lane % 8 + lane / 16 * 8, k * 2 + lane / 8 % 2));
      } else {
        load_matrices<true>(ranks[n / 2],
                            tile_f + TileF::offset(k * 16 + lane % 16, rank + lane / 16));
      }
    }
  }
};

// The products of one chunk; the next operands are fetched ahead of the products with the last.
template <class T, class S, class TileT, class TileF, bool kByRank>
__device__ __forceinline__ void add_chunk(float (&sums)[S::kTilesM][S::kTiles][4],
                                          RowMoments<S>& moments, const Place<S>& place,
                                          std::uint32_t tile_t, std::uint32_t tile_f,
                                          bool with_moments, int cols) {
  Operands<S> operands[2];
  const int first = place.group_k * S::kSteps;
  operands[0].template load<TileT, TileF, kByRank>(place, tile_t, tile_f, first);
#pragma unroll
  for (int i = 0; i < S::kSteps; ++i) {
    const Operands<S>& its = operands[i % 2];
    if (i + 1 < S::kSteps) {
      operands[(i + 1) % 2].template load<TileT, TileF, kByRank>(place, tile_t, tile_f,
                                                                 first + i + 1);
    }
    if (with_moments) {
#pragma unroll
      for (int j = 0; j < S::kTilesM * 4; ++j) {
        const int m = j / 4, word = j % 4;
        // Columns beyond the row are zeros, which are not to be counted.
        if (m / S::kMomentTiles != place.group_n || (first + i) * 16 + word / 2 * 8 >= cols)
          continue;
        moments[m % S::kMomentTiles * 2 + word % 2].add(widen_pair<T>(its.rows[m][word]));
      }
    }
#pragma unroll
    for (int n = 0; n < S::kTiles; ++n) {
      const std::uint32_t (&pair)[4] = its.ranks[n / 2];
#pragma unroll
      for (int m = 0; m < S::kTilesM; ++m) {
        multiply<T>(sums[m][n], its.rows[m], pair[n % 2 * 2], pair[n % 2 * 2 + 1]);
      }
    }
  }
}

// Leaves the warps' sums in shared memory: [group of k][row][rank].
template <class S>
__device__ __forceinline__ void leave(float* shared, const Place<S>& place,
                                      const float (&sums)[S::kTilesM][S::kTiles][4]) {
  const int row = place.group_k * S::kRows + place.group_m * S::kWarpRows + place.lane / 4;
  float* to = shared + row * S::kPitch + place.group_n * S::kTiles * 8 + place.lane % 4 * 2;
#pragma unroll
  for (int m = 0; m < S::kTilesM; ++m) {
#pragma unroll
    for (int n = 0; n < S::kTiles; ++n) {
      const float (&c)[4] = sums[m][n];
      float* at = to + m * 16 * S::kPitch + n * 8;
      *reinterpret_cast<float2*>(at) = make_float2(c[0], c[1]);
      *reinterpret_cast<float2*>(at + 8 * S::kPitch) = make_float2(c[2], c[3]);
    }
  }
}

// The block's sums: over the groups of k in shared memory, or over the slabs in global memory.
template <class S>
struct Sums {
  const float* shared;
  const float2* shared_moments;  // [group of k][row]
  const float* parts;
  int slabs;

  __device__ __forceinline__ float2 operator()(int row, int rank) const {
    float2 sum = make_float2(0, 0);
    if (slabs > 1) {
#pragma unroll 4
      for (int slab = 0; slab < slabs; ++slab) {
        add(sum, *reinterpret_cast<const float2*>(parts + slab * S::kPart + row * S::kRank + rank));
      }
      return sum;
    }
#pragma unroll
    for (int k = 0; k < S::kGroupsK; ++k) {
      add(sum, *reinterpret_cast<const float2*>(shared + (k * S::kRows + row) * S::kPitch + rank));
    }
    return sum;
  }
  __device__ __forceinline__ float2 moments(int row) const {
    float2 sum = make_float2(0, 0);
    if (slabs > 1) {
      for (int slab = 0; slab < slabs; ++slab) {
        const float* moments_of = parts + slab * S::kPart + S::kRows * S::kRank;
        add(sum, reinterpret_cast<const float2*>(moments_of)[row]);
      }
      return sum;
    }
    for (int k = 0; k < S::kGroupsK; ++k) add(sum, shared_moments[k * S::kRows + row]);
    return sum;
  }
  static __device__ __forceinline__ void add(float2& sum, float2 part) {
    sum.x += part.x, sum.y += part.y;
  }
};

template <class S>
__device__ __forceinline__ void leave_moments(float2* shared, const Place<S>& place,
                                              const RowMoments<S>& moments) {
#pragma unroll
  for (int i = 0; i < S::kMomentTiles * 2; ++i) {
    float sum = moments[i].sum, squares = moments[i].squares;
    for (int step = 1; step < 4; step *= 2) {
      sum += __shfl_xor_sync(kAll, sum, step);
      squares += __shfl_xor_sync(kAll, squares, step);
    }
    if (place.lane % 4 == 0) {
      shared[place.group_k * S::kRows + place.moment_row(i)] = make_float2(sum, squares);
    }
  }
}

// The rows that a block finishes: `count` of those of its tile, which starts at `row`.
struct Span {
  int row, first, count;
};

// How kThreads threads share rows: each has two ranks, of one row out of kAtOnce.
template <class S, int kThreads>
struct Pairs {
  static constexpr int kPairs = S::kRank / 2, kAtOnce = kThreads / kPairs;
  static constexpr int kBatch = 4;  // rows whose loads are in flight together
  int rank = static_cast<int>(threadIdx.x) % kPairs * 2;

  // For each row calls visitor(row, in, load(row)), all threads at once; outside of `in` nothing
  // is loaded. The loop stays short: instructions that run but once take longer to come than to
  // run.
  template <class Load, class Visitor>
  __device__ __forceinline__ void visit(const Span& span, int rows, int ranks, const Load& load,
                                        const Visitor& visitor) const {
    const int first = span.first + static_cast<int>(threadIdx.x) / kPairs;
    const int steps = span.count / kAtOnce;
#pragma unroll 1
    for (int step = 0; step < steps; step += kBatch) {
      decltype(load(0)) loaded[kBatch] = {};
      const auto row = [&](int n) { return first + (step + n) * kAtOnce; };
      const auto in = [&](int n) { return rank < ranks && span.row + row(n) < rows; };
#pragma unroll
      for (int n = 0; n < kBatch; ++n) {
        if (step + n < steps && in(n)) loaded[n] = load(row(n));
      }
#pragma unroll
      for (int n = 0; n < kBatch; ++n) {
        if (step + n < steps) visitor(row(n), in(n), loaded[n]);
      }
    }
  }
};

// A slab's sums to where another kernel finds them.
template <class S>
__device__ __forceinline__ void store_part(const Sums<S>& sums, float* part, int rank) {
  const Pairs<S, S::kThreads> pairs;
  pairs.visit(
      {0, 0, S::kRows}, S::kRows, rank, [&](int i) { return sums(i, pairs.rank); },
      [&](int i, bool in, float2 sum) {
        if (in) *reinterpret_cast<float2*>(part + i * S::kRank + pairs.rank) = sum;
      });
  if (threadIdx.x < S::kRows) {
    reinterpret_cast<float2*>(part + S::kRows * S::kRank)[threadIdx.x] =
        sums.moments(static_cast<int>(threadIdx.x));
  }
}

template <class T>
__device__ __forceinline__ void store_pair(void* to, std::int64_t at, std::uint32_t pair) {
  *reinterpret_cast<std::uint32_t*>(static_cast<T*>(to) + at) = pair;
}
template <class T>
__device__ __forceinline__ float2 load_pair(const void* from, std::int64_t at) {
  return widen_pair<T>(*reinterpret_cast<const std::uint32_t*>(static_cast<const T*>(from) + at));
}

// Mean and one over the deviation of rows, from their shifted sums.
template <class T, class S>
__device__ __forceinline__ void find_stats(float2* stats, const Sums<S>& sums, const RowsArgs& args,
                                           const Span& span) {
  const int row = span.row, i = span.first + static_cast<int>(threadIdx.x);
  if (i >= span.first + span.count || row + i >= args.rows) return;
  const float shift = widen(static_cast<const T*>(args.t)[(row + i) * args.pitch]);
  const float2 moments = sums.moments(i);
  const auto cols = static_cast<float>(args.cols);
  const float mean = moments.x / cols;
  const float variance = fmaxf(moments.y / cols - mean * mean, 0.0F);
  stats[i] = make_float2(shift + mean, 1.0F / sqrtf(variance + args.eps));
  reinterpret_cast<float2*>(args.stats)[row + i] = stats[i];
}

// h and act(h) of the block's rows.
template <class T, class S, int kThreads>
__device__ __forceinline__ void finish_forward(const Sums<S>& sums, const float2* stats,
                                               const RowsArgs& args, const Span& span) {
  const Pairs<S, kThreads> pairs;
  const int r = pairs.rank;
  const auto* ranks = reinterpret_cast<const float4*>(args.ranks);
  float4 low = make_float4(1, 0, 0, 0), high = low;
  if (r < args.rank && ranks != nullptr) {
    low = ranks[r], high = ranks[r + 1];
  } else if (r < args.rank && args.bias != nullptr) {
    const float2 bias = load_pair<T>(args.bias, r);
    low.z = bias.x, high.z = bias.y;
  }
  pairs.visit(
      span, args.rows, args.rank, [&](int i) { return sums(i, r); },
      [&](int i, bool in, float2 sum) {
        if (!in) return;
        const auto [mean, scale] = ranks != nullptr ? stats[i] : make_float2(0, 1);
        sum.x = fmaf((sum.x - mean * low.y) * scale, low.x, low.z);
        sum.y = fmaf((sum.y - mean * high.y) * scale, high.x, high.z);
        const std::int64_t at = static_cast<std::int64_t>(span.row + i) * args.rank + r;
        const std::uint32_t h = pack_pair<T>(sum.x, sum.y);
        const float2 rounded = widen_pair<T>(h);
        store_pair<T>(args.h, at, h);
        store_pair<T>(args.active, at,
                      pack_pair<T>(activate(rounded.x, args.activation),
                                   activate(rounded.y, args.activation)));
      });
}

// dh and act(h), and the norm's gradient as far as rows decide it. With g = w (dh D) and xhat the
// normed row, dx - dy = (g - mean(g) - xhat mean(g xhat)) / deviation; sum(g) = dh . sum(D w) and
// sum(g xhat) = dh . (h - d - D b), so that neither needs g.
template <class T, class S, int kThreads>
__device__ __forceinline__ void finish_backward(const Sums<S>& sums, const RowsArgs& args,
                                                const Span& span) {
  using P = Pairs<S, kThreads>;
  constexpr int kLanes = std::min(32, P::kPairs), kGroups = P::kPairs / kLanes;
  __shared__ float2 row_sums[S::kRows][kGroups];
  struct Loaded {
    float2 sum, h;
  };
  const P pairs;
  const int r = pairs.rank;
  const auto* stats = reinterpret_cast<const float2*>(args.stats);
  float2 low = make_float2(0, 0), high = low;
  if (r < args.rank && stats != nullptr)
    low = stats[args.rows + r], high = stats[args.rows + r + 1];
  const auto at_of = [&](int i) { return static_cast<std::int64_t>(span.row + i) * args.rank + r; };
  pairs.visit(
      span, args.rows, args.rank,
      [&](int i) { return Loaded{sums(i, r), load_pair<T>(args.h, at_of(i))}; },
      [&](int i, bool in, const Loaded& loaded) {
        const auto [sum, h] = loaded;
        float sum_g = 0, sum_gx = 0;
        if (in) {
          const std::uint32_t dh = pack_pair<T>(activate_backward(sum.x, h.x, args.activation),
                                                activate_backward(sum.y, h.y, args.activation));
          store_pair<T>(args.dh, at_of(i), dh);
          store_pair<T>(
              args.active, at_of(i),
              pack_pair<T>(activate(h.x, args.activation), activate(h.y, args.activation)));
          const float2 d = widen_pair<T>(dh);
          sum_g = fmaf(d.x, low.x, d.y * high.x);
          sum_gx = fmaf(d.x, h.x - low.y, d.y * (h.y - high.y));
        }
        if (stats == nullptr) return;
#pragma unroll
        for (int step = 1; step < kLanes; step *= 2) {
          sum_g += __shfl_xor_sync(kAll, sum_g, step);
          sum_gx += __shfl_xor_sync(kAll, sum_gx, step);
        }
        if (threadIdx.x % kLanes == 0) {
          row_sums[i][threadIdx.x % P::kPairs / kLanes] = make_float2(sum_g, sum_gx);
        }
      });
  __syncthreads();
  const int i = span.first + static_cast<int>(threadIdx.x), at = span.row + i;
  if (stats == nullptr || i >= span.first + span.count || at >= args.rows) return;
  float2 sum = row_sums[i][0];
#pragma unroll
  for (int group = 1; group < kGroups; ++group) Sums<S>::add(sum, row_sums[i][group]);
  const auto [mean, scale] = stats[at];
  const auto cols = static_cast<float>(args.cols);
  const float slope = scale * scale * sum.y / cols;
  reinterpret_cast<float4*>(args.lines)[at] =
      make_float4(mean, scale, scale * sum.x / cols - slope * mean, slope);
}

template <class T, class S, bool kBackward, int kThreads>
__device__ __forceinline__ void finish(const Sums<S>& sums, float2* stats, const RowsArgs& args,
                                       const Span& span) {
  if constexpr (kBackward) {
    finish_backward<T, S, kThreads>(sums, args, span);
  } else {
    if (args.stats != nullptr) find_stats<T>(stats, sums, args, span);
    __syncthreads();
    finish_forward<T, S, kThreads>(sums, stats, args, span);
  }
}

template <class T, int kRank, bool kBackward>
__global__ void __launch_bounds__(RowsShape<kRank>::kThreads, 1)
    adapter_rows_kernel(const __grid_constant__ RowsArgs args) {
  using S = RowsShape<kRank>;
  using TileT = Tile<S::kRows, S::kCols / 8>;
  using TileF = std::conditional_t<kBackward, Tile<S::kCols, kRank / 8>, Tile<kRank, S::kCols / 8>>;
  static_assert(TileT::kBytes + TileF::kBytes == S::kStage);
  extern __shared__ __align__(128) char storage[];
  __shared__ float2 shared_moments[S::kGroupsK * S::kRows], stats[S::kRows];
  const int slab = static_cast<int>(blockIdx.x) % args.cut.slabs;
  const int block = static_cast<int>(blockIdx.x) / args.cut.slabs;
  const int row = block * S::kRows, first = slab * args.cut.chunks;
  const int chunks = min(args.cut.chunks, (args.cols + S::kCols - 1) / S::kCols - first);
  const std::uint32_t shared = shared_address(storage);
  Loader<S::kRows, S::kCols / 8, S::kThreads> load_t(args.t, args.pitch, row, first * S::kCols,
                                                     args.rows, args.cols);
  using LoadF =
      Loader<kBackward ? S::kCols : kRank, (kBackward ? kRank : S::kCols) / 8, S::kThreads>;
  LoadF load_f = kBackward
                     ? LoadF(args.factor, args.rank, first * S::kCols, 0, args.cols, args.rank)
                     : LoadF(args.factor, args.cols, 0, first * S::kCols, args.rank, args.cols);
  const auto issue_t = [&](int stage) {
    load_t.load(shared + stage * S::kStage);
    load_t.next_cols();
  };
  const auto issue_f = [&](int stage) {
    load_f.load(shared + stage * S::kStage + TileT::kBytes);
    if constexpr (kBackward) {
      load_f.next_rows();
    } else {
      load_f.next_cols();
    }
  };
  // The grid ahead, where it weighs D, waited for what made x.
  const bool early = !kBackward && args.ranks != nullptr;
  if (!early) wait_for_grid_before();
#pragma unroll
  for (int i = 0; i < S::kStages - 1; ++i) {
    if (i < chunks) issue_t(i);
  }
  if (early) wait_for_grid_before();
  launch_next_grid();
#pragma unroll
  for (int i = 0; i < S::kStages - 1; ++i) {
    if (i < chunks) issue_f(i);
    commit();
  }

  const Place<S> place;
  RowMoments<S> moments;
  const bool with_moments = !kBackward && args.stats != nullptr;
  if (with_moments) {
#pragma unroll
    for (int i = 0; i < S::kMomentTiles * 2; ++i) {
      const int at = row + place.moment_row(i);
      if (at < args.rows) {
        moments[i].shift = widen(static_cast<const T*>(args.t)[at * args.pitch]);
      }
    }
  }
  float products[S::kTilesM][S::kTiles][4] = {};
  Ring<S::kStages> ring;
  ring.next = S::kStages - 1;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const std::uint32_t tile = shared + ring.take() * S::kStage;
    wait<S::kStages - 2>();
    __syncthreads();
    if (chunk + S::kStages - 1 < chunks) {
      const int stage = ring.fill();
      issue_t(stage);
      issue_f(stage);
    }
    commit();
    add_chunk<T, S, TileT, TileF, !kBackward>(products, moments, place, tile, tile + TileT::kBytes,
                                              with_moments, args.cols - (first + chunk) * S::kCols);
  }
  wait<0>();
  __syncthreads();
  auto* left = reinterpret_cast<float*>(storage);
  leave(left, place, products);
  leave_moments(shared_moments, place, moments);
  __syncthreads();
  const Sums<S> sums{left, shared_moments, nullptr, 1};
  if (args.cut.slabs > 1) {
    store_part(sums, args.parts + static_cast<std::int64_t>(blockIdx.x) * S::kPart, args.rank);
  } else {
    finish<T, S, kBackward, S::kThreads>(sums, stats, args, {row, 0, S::kRows});
  }
}

// What is left to do where slabs are several; a block has a few rows.
template <int kRank>
struct FinishShape {
  static constexpr int kThreads = 256;
  static constexpr int kRows =
      kThreads / 32 * std::max(1, 64 / kRank);  // one for each warp's lanes
};
template <class T, int kRank, bool kBackward>
__global__ void __launch_bounds__(FinishShape<kRank>::kThreads)
    adapter_finish_kernel(const __grid_constant__ RowsArgs args) {
  using S = RowsShape<kRank>;
  using F = FinishShape<kRank>;
  static_assert(S::kRows % F::kRows == 0);
  __shared__ float2 stats[S::kRows];
  wait_for_grid_before();
  launch_next_grid();
  const int at = static_cast<int>(blockIdx.x) * F::kRows, first = at % S::kRows, row = at - first;
  const std::int64_t part = static_cast<std::int64_t>(row / S::kRows) * args.cut.slabs;
  const Sums<S> sums{nullptr, nullptr, args.parts + part * S::kPart, args.cut.slabs};
  finish<T, S, kBackward, F::kThreads>(sums, stats, args, {row, first, F::kRows});
}

}  // namespace pyfast::adapter
