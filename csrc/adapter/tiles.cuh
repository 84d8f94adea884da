// SPDX-License-Identifier: Apache-2.0
// The products of the adapter that have K columns, bound by reading and writing x, dy, y and dx. A
// block has a slab of columns, whose part of U or D stays in shared memory, and walks down a band
// of rows in chunks through a ring of cp.async stages.
//
// Of a group of 32 columns, product tile t and lane q of a quad have columns 8 q + 2 t and the
// next: all that a lane has of a row are 16 bytes in x, dy, y and dx.
#pragma once

#include "adapter/rows.cuh"

namespace pyfast::adapter {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kGroup = 32;  // columns

// The column that product column j of a group stands for.
__device__ __forceinline__ int column_of(int j) {
  return j / kGroup * kGroup + j % 8 / 2 * 8 + j % kGroup / 8 * 2 + j % 2;
}

// How a block's warps share chunks of kRows x kSlab with the columns in groups.
template <int kRankIn, int kSlabIn, int kRowsIn>
struct WalkShape {
  static constexpr int kRank = kRankIn, kSlab = kSlabIn, kRows = kRowsIn;
  static constexpr int kGroups = kSlab / kGroup, kGroupsM = kWarps / kGroups;
  static constexpr int kTilesM = kRows / 16 / kGroupsM;  // of 16 rows, of a warp
  static_assert(kTilesM > 0);
};

template <int kRank>
struct UpShape : WalkShape<kRank, 128, 64> {
  using Walk = WalkShape<kRank, 128, 64>;
  static constexpr int kFactor = Walk::kSlab * kRank * 2;
  static constexpr int kStage = Walk::kRows * (Walk::kSlab + kRank) * 2;
  static constexpr int kBlocks = kRank <= 64 ? 2 : 1;  // an SM
  static constexpr int kBudget = kRank <= 64 ? 113 : kRank <= 128 ? 160 : 227;
  static constexpr int kStages = std::min(4, (kBudget * 1024 - kFactor) / kStage);
  static constexpr int kShared = kFactor + kStages * kStage;
};

template <int kRank>
struct GradsShape
    : WalkShape<kRank, kRank <= 128 ? 128 : 64, kRank == 64 || kRank == 256 ? 64 : 32> {
  using Walk = WalkShape<kRank, kRank <= 128 ? 128 : 64, kRank == 64 || kRank == 256 ? 64 : 32>;
  static constexpr int kFactor = Walk::kSlab * kRank * 2;
  static constexpr int kTile = Walk::kRows * Walk::kSlab * 2, kTileR = Walk::kRows * kRank * 2;
  static constexpr int kStage = 2 * (kTile + kTileR) + Walk::kRows * 16;
  static constexpr int kBlocks = kRank <= 32 ? 2 : 1;
  static constexpr int kBudget = kRank <= 32 ? 113 : kRank <= 128 ? 163 : 227;
  static constexpr int kStages = std::min(4, (kBudget * 1024 - kFactor) / kStage);
  static constexpr int kShared = kFactor + kStages * kStage;
  // A warp's part of the gradients, [columns, ranks].
  static constexpr int kWarpsR = kRank <= 16 ? 1 : kRank <= 128 ? 2 : 4;
  static constexpr int kWarpsC = kWarps / kWarpsR;
  static constexpr int kTilesC = Walk::kSlab / 16 / kWarpsC;
  static constexpr int kTilesR = kRank / 8 / kWarpsR;
};

// A warp's part of [rows of a chunk, R] [R, columns of the slab].
template <class T, class S, class TileV, class TileF, bool kByRank>
__device__ __forceinline__ void multiply_chunk(float (&sums)[S::kTilesM][4][4],
                                               std::uint32_t tile_v, std::uint32_t tile_f) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = warp % S::kGroupsM * S::kTilesM * 16, group = warp / S::kGroupsM;
#pragma unroll 4
  for (int k = 0; k < S::kRank / 16; ++k) {
    std::uint32_t a[S::kTilesM][4];
#pragma unroll
    for (int m = 0; m < S::kTilesM; ++m) {
      load_matrices<false>(a[m],
                           tile_v + TileV::offset(row + m * 16 + lane % 16, k * 2 + lane / 16));
    }
#pragma unroll
    for (int n = 0; n < 4; n += 2) {
      std::uint32_t b[4];
      if constexpr (kByRank) {
        load_matrices<true>(b,
                            tile_f + TileF::offset(k * 16 + lane % 16, group * 4 + n + lane / 16));
      } else {
        load_matrices<false>(
            b, tile_f + TileF::offset(group * kGroup + n * 8 + lane % 8 + lane / 16 * 8,
                                      k * 2 + lane / 8 % 2));
      }
#pragma unroll
      for (int m = 0; m < S::kTilesM; ++m) {
        multiply<T>(sums[m][n], a[m], b[0], b[1]);
        multiply<T>(sums[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

__device__ __forceinline__ float4 load_shared_float4(std::uint32_t at) {
  float4 value;
  asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "r"(at)
               : "memory");
  return value;
}
__device__ __forceinline__ float2 load_shared_float2(std::uint32_t at) {
  float2 value;
  asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];"
               : "=f"(value.x), "=f"(value.y)
               : "r"(at)
               : "memory");
  return value;
}

// The eight values that a lane has of a vector over columns; zeros without one.
template <class T>
struct Eight {
  uint4 words = make_uint4(0, 0, 0, 0);
  __device__ __forceinline__ void load(const void* vector, int col, int cols) {
    if (vector == nullptr || col >= cols) return;
    words = *reinterpret_cast<const uint4*>(static_cast<const T*>(vector) + col);
  }
  __device__ __forceinline__ float2 operator[](int pair) const {
    return widen_pair<T>(reinterpret_cast<const std::uint32_t (&)[4]>(words)[pair]);
  }
};

// What a block walks through.
struct Walk {
  int col, first_row, chunks;
  __device__ __forceinline__ Walk(const Cut& cut, int rows, int chunk_rows, int slab)
      : col(static_cast<int>(blockIdx.x) % cut.slabs * slab),
        first_row(static_cast<int>(blockIdx.x) / cut.slabs * cut.chunks * chunk_rows),
        chunks(min(cut.chunks, (rows - first_row + chunk_rows - 1) / chunk_rows)) {}
};

// y or dx of eight neighbours in a row, and what they need of a lane's product tiles: the sums of
// the first or the second of their rows.
template <class T>
__device__ __forceinline__ void add_up(uint4& words, const float (&sums)[4][4], int half,
                                       const Eight<T>& bias) {
  std::uint32_t (&pairs)[4] = reinterpret_cast<std::uint32_t (&)[4]>(words);
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    const float2 x = widen_pair<T>(pairs[t]);
    pairs[t] = pack_pair<T>(x.x + (sums[t][half * 2] + bias[t].x),
                            x.y + (sums[t][half * 2 + 1] + bias[t].y));
  }
}

// y = x + act(h) U^T + u.
template <class T, int kRank>
__global__ void __launch_bounds__(kThreads, UpShape<kRank>::kBlocks)
    adapter_up_kernel(const __grid_constant__ UpArgs args) {
  using S = UpShape<kRank>;
  using TileX = Tile<S::kRows, S::kSlab / 8>;
  using TileA = Tile<S::kRows, kRank / 8>;
  using TileU = Tile<S::kSlab, kRank / 8>;
  extern __shared__ __align__(128) char storage[];
  const Walk walk(args.cut, args.rows, S::kRows, S::kSlab);
  const std::uint32_t factor = shared_address(storage), stages = factor + S::kFactor;
  wait_for_grid_before();
  launch_next_grid();

#pragma unroll 4
  for (int step = 0; step < S::kSlab * kRank / 8 / kThreads; ++step) {
    const int i = step * kThreads + static_cast<int>(threadIdx.x);
    const int j = i / (kRank / 8), unit = i % (kRank / 8), at = walk.col + column_of(j);
    const bool in = at < args.cols && unit * 8 < args.rank;
    const auto* from = static_cast<const T*>(args.up) +
                       (in ? static_cast<std::int64_t>(at) * args.rank + unit * 8 : 0);
    copy16(factor + TileU::offset(j, unit), from, in ? 16 : 0);
  }
  Loader<S::kRows, S::kSlab / 8, kThreads> load_x(args.x, args.pitch_x, walk.first_row, walk.col,
                                                  args.rows, args.cols);
  Loader<S::kRows, kRank / 8, kThreads> load_a(args.active, args.rank, walk.first_row, 0, args.rows,
                                               args.rank);
  Ring<S::kStages> ring;
  int issued = 0;
  const auto issue = [&] {
    if (issued < walk.chunks) {
      const std::uint32_t stage = stages + ring.fill() * S::kStage;
      load_x.load(stage);
      load_x.next_rows();
      load_a.load(stage + TileX::kBytes);
      load_a.next_rows();
      ++issued;
    }
    commit();
  };
#pragma unroll
  for (int i = 0; i < S::kStages - 1; ++i) issue();

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int unit = warp / S::kGroupsM * 4 + lane % 4, col = walk.col + unit * 8;
  Eight<T> bias;
  bias.load(args.bias, col, args.cols);
  for (int chunk = 0; chunk < walk.chunks; ++chunk) {
    const std::uint32_t tile = stages + ring.take() * S::kStage;
    wait<S::kStages - 2>();
    __syncthreads();
    issue();
    float sums[S::kTilesM][4][4] = {};
    multiply_chunk<T, S, TileA, TileU, false>(sums, tile + TileX::kBytes, factor);
#pragma unroll
    for (int i = 0; i < S::kTilesM * 2; ++i) {
      const int row = warp % S::kGroupsM * S::kTilesM * 16 + i * 8 + lane / 4;
      uint4 words = load_shared16(tile + TileX::offset(row, unit));
      add_up<T>(words, sums[i / 2], i % 2, bias);
      const int at = walk.first_row + chunk * S::kRows + row;
      if (at < args.rows && col < args.cols) {
        *reinterpret_cast<uint4*>(static_cast<T*>(args.y) +
                                  static_cast<std::int64_t>(at) * args.cols + col) = words;
      }
    }
  }
}

// Adds up both halves of words of an operand.
template <class T>
__device__ __forceinline__ void add_halves(float& sum, std::uint32_t first, std::uint32_t second) {
  const float2 a = widen_pair<T>(first), b = widen_pair<T>(second);
  sum += (a.x + a.y) + (b.x + b.y);
}

// Sums over rows: the products with ranks, and of the operands themselves.
template <class S>
struct Grads {
  float up[S::kTilesC][S::kTilesR][4] = {}, down[S::kTilesC][S::kTilesR][4] = {};
  float dy[S::kTilesC][2] = {}, dh[S::kTilesR] = {};
};

// Four words of x, of a column each and of rows 2 q, 2 q + 1 and eight further, normed.
template <class T>
__device__ __forceinline__ void norm_words(std::uint32_t (&words)[4], const float2 (&lines)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 x = widen_pair<T>(words[i]), low = lines[i / 2 * 2], high = lines[i / 2 * 2 + 1];
    words[i] = pack_pair<T>((x.x - low.x) * low.y, (x.y - high.x) * high.y);
  }
}

struct GradsTiles {
  std::uint32_t dy, x, dh, active, lines;
};

// Two neighbours of D, and a chunk's lines; zeros outside of them.
template <class T>
__device__ __forceinline__ void copy_pair(std::uint32_t to, int rank, int col,
                                          const GradsArgs& args) {
  const bool in = col < args.cols && rank < args.rank;
  const auto* from = static_cast<const T*>(args.down) +
                     (in ? static_cast<std::int64_t>(rank) * args.cols + col : 0);
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from),
               "r"(in ? 4 : 0));
}
template <int kRows>
__device__ __forceinline__ void copy_lines(std::uint32_t to, int first_row, const GradsArgs& args) {
  if (args.lines == nullptr || threadIdx.x >= kRows) return;
  const int at = first_row + static_cast<int>(threadIdx.x);
  copy16(to + threadIdx.x * 16, args.lines + (at < args.rows ? std::int64_t{at} * 4 : 0),
         at < args.rows ? 16 : 0);
}
// Of the 16 rows from `row` on, those of a lane's words.
__device__ __forceinline__ void load_lines(float2 (&lines)[4], std::uint32_t from, int row) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int at = row + i / 2 * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + i % 2;
    lines[i] = load_shared_float2(from + at * 16);
  }
}

// sums += t^T v over the chunk's rows.
template <class T, class S, bool kDown>
__device__ __forceinline__ void add_grads(Grads<S>& grads, const GradsTiles& tiles,
                                          const GradsArgs& args, bool first_slab) {
  using TileT = Tile<S::kRows, S::kSlab / 8>;
  using TileV = Tile<S::kRows, S::kRank / 8>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_c = warp % S::kWarpsC, warp_r = warp / S::kWarpsC;
  const std::uint32_t tile_t = kDown ? tiles.x : tiles.dy, tile_v = kDown ? tiles.dh : tiles.active;
#pragma unroll
  for (int k = 0; k < S::kRows / 16; ++k) {
    std::uint32_t a[S::kTilesC][4];
#pragma unroll
    for (int c = 0; c < S::kTilesC; ++c) {
      load_matrices<true>(a[c],
                          tile_t + TileT::offset(k * 16 + lane / 16 * 8 + lane % 8,
                                                 (warp_c * S::kTilesC + c) * 2 + lane / 8 % 2));
    }
    if (kDown && args.lines != nullptr) {
      float2 lines[4];
      load_lines(lines, tiles.lines, k * 16);
#pragma unroll
      for (int c = 0; c < S::kTilesC; ++c) norm_words<T>(a[c], lines);
    }
    if (!kDown && warp_r == 0 && args.dy_parts != nullptr) {
#pragma unroll
      for (int c = 0; c < S::kTilesC; ++c) {
        add_halves<T>(grads.dy[c][0], a[c][0], a[c][2]);
        add_halves<T>(grads.dy[c][1], a[c][1], a[c][3]);
      }
    }
    if (!kDown && args.up_parts == nullptr) continue;
#pragma unroll
    for (int n = 0; n < S::kTilesR; n += 2) {
      std::uint32_t b[4];
      load_matrices<true>(
          b, tile_v + TileV::offset(k * 16 + lane % 16, warp_r * S::kTilesR + n + lane / 16));
      if (kDown && first_slab && warp_c == 0) {
        add_halves<T>(grads.dh[n], b[0], b[1]);
        add_halves<T>(grads.dh[n + 1], b[2], b[3]);
      }
#pragma unroll
      for (int c = 0; c < S::kTilesC; ++c) {
        auto& sums = kDown ? grads.down[c] : grads.up[c];
        multiply<T>(sums[n], a[c], b[0], b[1]);
        multiply<T>(sums[n + 1], a[c], b[2], b[3]);
      }
    }
  }
}

// Stores a block's sums as its band's part.
template <class S>
__device__ __forceinline__ void store_products(float* parts,
                                               const float (&sums)[S::kTilesC][S::kTilesR][4],
                                               int band, int col, const GradsArgs& args) {
  if (parts == nullptr) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first = warp / S::kWarpsC * S::kTilesR * 8 + lane % 4 * 2;
  float* band_parts = parts + static_cast<std::int64_t>(band) * args.cols * args.rank;
#pragma unroll
  for (int i = 0; i < S::kTilesC * 2; ++i) {
    const int at = col + warp % S::kWarpsC * S::kTilesC * 16 + i * 8 + lane / 4;
#pragma unroll
    for (int n = 0; n < S::kTilesR; ++n) {
      const int rank = first + n * 8;
      if (at < args.cols && rank < args.rank) {
        const float (&c)[4] = sums[i / 2][n];
        *reinterpret_cast<float2*>(band_parts + static_cast<std::int64_t>(at) * args.rank + rank) =
            make_float2(c[i % 2 * 2], c[i % 2 * 2 + 1]);
      }
    }
  }
}

__device__ __forceinline__ float over_quad(float sum) {
  sum += __shfl_xor_sync(kAll, sum, 1);
  return sum + __shfl_xor_sync(kAll, sum, 2);
}
template <class S>
__device__ __forceinline__ void store_dy_sums(const float (&sums)[S::kTilesC][2], int band, int col,
                                              const GradsArgs& args) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (args.dy_parts == nullptr || warp >= S::kWarpsC) return;
#pragma unroll
  for (int i = 0; i < S::kTilesC * 2; ++i) {
    const float sum = over_quad(sums[i / 2][i % 2]);
    const int at = col + warp * S::kTilesC * 16 + i * 8 + lane / 4;
    if (lane % 4 == 0 && at < args.cols) {
      args.dy_parts[static_cast<std::int64_t>(band) * args.cols + at] = sum;
    }
  }
}
template <class S>
__device__ __forceinline__ void store_dh_sums(const float (&sums)[S::kTilesR], int band, int col,
                                              const GradsArgs& args) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (args.dh_parts == nullptr || col != 0 || warp % S::kWarpsC != 0) return;
#pragma unroll
  for (int n = 0; n < S::kTilesR; ++n) {
    const float sum = over_quad(sums[n]);
    const int rank = (warp / S::kWarpsC * S::kTilesR + n) * 8 + lane / 4;
    if (lane % 4 == 0 && rank < args.rank) args.dh_parts[band * args.rank + rank] = sum;
  }
}

// dx = dy + w (dh D) / deviation, less the norm's line in x, of eight neighbours of the chunk.
template <class T, class TileT, bool kNorm>
__device__ __forceinline__ void store_dx(const float (&sums)[4][4], int half,
                                         const Eight<T>& weight, const GradsTiles& tiles,
                                         const GradsArgs& args, int first_row, int row, int col,
                                         int unit) {
  uint4 words = load_shared16(tiles.dy + TileT::offset(row, unit)), x_words;
  std::uint32_t (&pairs)[4] = reinterpret_cast<std::uint32_t (&)[4]>(words);
  const std::uint32_t (&x_pairs)[4] = reinterpret_cast<const std::uint32_t (&)[4]>(x_words);
  float4 line;
  if constexpr (kNorm) {
    line = load_shared_float4(tiles.lines + row * 16);
    x_words = load_shared16(tiles.x + TileT::offset(row, unit));
  }
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    const float2 dy = widen_pair<T>(pairs[t]);
    float low = sums[t][half * 2], high = sums[t][half * 2 + 1];
    if constexpr (kNorm) {
      const float2 x = widen_pair<T>(x_pairs[t]);
      low = low * weight[t].x * line.y - fmaf(line.w, x.x, line.z);
      high = high * weight[t].y * line.y - fmaf(line.w, x.y, line.z);
    }
    pairs[t] = pack_pair<T>(dy.x + low, dy.y + high);
  }
  const int at = first_row + row;
  if (at < args.rows && col < args.cols) {
    *reinterpret_cast<uint4*>(static_cast<T*>(args.dx) + static_cast<std::int64_t>(at) * args.cols +
                              col) = words;
  }
}
// Calls visitor(integral_constant) with whether there is a norm.
template <class Visitor>
__device__ __forceinline__ void visit_norm(const GradsArgs& args, const Visitor& visitor) {
  if (args.lines != nullptr) return visitor(std::true_type{});
  visitor(std::false_type{});
}

template <class T, int kRank>
__global__ void __launch_bounds__(kThreads, GradsShape<kRank>::kBlocks)
    adapter_grads_kernel(const __grid_constant__ GradsArgs args) {
  using S = GradsShape<kRank>;
  using TileT = Tile<S::kRows, S::kSlab / 8>;
  using TileV = Tile<S::kRows, kRank / 8>;
  using TileD = Tile<kRank, S::kSlab / 8>;
  extern __shared__ __align__(128) char storage[];
  const Walk walk(args.cut, args.rows, S::kRows, S::kSlab);
  const std::uint32_t factor = shared_address(storage), stages = factor + S::kFactor;
  wait_for_grid_before();
  launch_next_grid();

#pragma unroll 4
  for (int step = 0; step < S::kSlab * kRank / 2 / kThreads; ++step) {
    const int i = step * kThreads + static_cast<int>(threadIdx.x);
    const int rank = i / (S::kSlab / 2), j = i % (S::kSlab / 2) * 2;
    copy_pair<T>(factor + TileD::offset(rank, j / 8) + j % 8 * 2, rank, walk.col + column_of(j),
                 args);
  }
  using LoadT = Loader<S::kRows, S::kSlab / 8, kThreads>;
  using LoadV = Loader<S::kRows, kRank / 8, kThreads>;
  const int at_row = walk.first_row;
  LoadT load_dy(args.dy, args.pitch_dy, at_row, walk.col, args.rows, args.cols);
  LoadT load_x(args.x, args.pitch_x, at_row, walk.col, args.rows, args.cols);
  LoadV load_dh(args.dh, args.rank, at_row, 0, args.rows, args.rank);
  LoadV load_a(args.active, args.rank, at_row, 0, args.rows, args.rank);
  const bool wants_down = args.down_parts != nullptr || args.dh_parts != nullptr;
  const bool wants_up = args.up_parts != nullptr || args.dy_parts != nullptr;
  const bool needs_x = args.down_parts != nullptr || args.lines != nullptr;
  Ring<S::kStages> ring;
  int issued = 0;
  const auto tiles_of = [&](int stage) {
    const std::uint32_t at = stages + stage * S::kStage;
    return GradsTiles{at, at + S::kTile, at + 2 * S::kTile, at + 2 * S::kTile + S::kTileR,
                      at + 2 * (S::kTile + S::kTileR)};
  };
  const auto issue = [&] {
    if (issued < walk.chunks) {
      const GradsTiles to = tiles_of(ring.fill());
      load_dy.load(to.dy);
      load_dy.next_rows();
      if (needs_x) load_x.load(to.x);
      load_x.next_rows();
      load_dh.load(to.dh);
      load_dh.next_rows();
      if (args.up_parts != nullptr) load_a.load(to.active);
      load_a.next_rows();
      copy_lines<S::kRows>(to.lines, walk.first_row + issued * S::kRows, args);
      ++issued;
    }
    commit();
  };
#pragma unroll
  for (int i = 0; i < S::kStages - 1; ++i) issue();

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int unit = warp / S::kGroupsM * 4 + lane % 4, col = walk.col + unit * 8;
  const bool first_slab = args.dh_parts != nullptr && walk.col == 0;
  Eight<T> weight;
  weight.load(args.weight, col, args.cols);
  Grads<S> grads;
  for (int chunk = 0; chunk < walk.chunks; ++chunk) {
    const GradsTiles tiles = tiles_of(ring.take());
    wait<S::kStages - 2>();
    __syncthreads();
    issue();
    if (args.dx != nullptr) {
      float sums[S::kTilesM][4][4] = {};
      multiply_chunk<T, S, TileV, TileD, true>(sums, tiles.dh, factor);
      visit_norm(args, [&](auto norm) {
#pragma unroll
        for (int i = 0; i < S::kTilesM * 2; ++i) {
          const int row = warp % S::kGroupsM * S::kTilesM * 16 + i * 8 + lane / 4;
          store_dx<T, TileT, decltype(norm)::value>(sums[i / 2], i % 2, weight, tiles, args,
                                                    walk.first_row + chunk * S::kRows, row, col,
                                                    unit);
        }
      });
    }
    if (wants_up) add_grads<T, S, false>(grads, tiles, args, first_slab);
    if (wants_down) add_grads<T, S, true>(grads, tiles, args, first_slab);
  }
  const int band = static_cast<int>(blockIdx.x) / args.cut.slabs;
  store_products<S>(args.down_parts, grads.down, band, walk.col, args);
  store_products<S>(args.up_parts, grads.up, band, walk.col, args);
  store_dy_sums<S>(grads.dy, band, walk.col, args);
  store_dh_sums<S>(grads.dh, band, walk.col, args);
}

}  // namespace pyfast::adapter
