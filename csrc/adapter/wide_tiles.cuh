// SPDX-License-Identifier: Apache-2.0
// tiles.cuh's products above 64 ranks on Hopper, by wgmma: a chunk has 64 rows, and a warpgroup
// half of the slab's columns.
#pragma once

#include "adapter/tiles.cuh"
#include "adapter/wgmma.cuh"

namespace pyfast::adapter {

template <int kRankIn>
struct WideUpShape {
  static constexpr int kRank = kRankIn, kRows = 64, kSlab = 256;
  static constexpr int kGroups = kSlab / 2 / kGroup;  // of columns, of a warp
  static constexpr int kFactor = kSlab * kRank * 2;
  static constexpr int kStage = kRows * kRank * 2;
  static constexpr int kStages = std::min(4, (227 * 1024 - kFactor) / kStage);
  static constexpr int kShared = kFactor + kStages * kStage;
  static constexpr int kBlocks = 1;
};

// Where a lane stands in a chunk: of the rows row() and of those 8 further it has, of each group of
// 32 columns, one unit of 16 bytes.
template <class S>
struct WidePlace {
  int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  __device__ __forceinline__ int row(int half) const { return warp % 4 * 16 + half * 8 + lane / 4; }
  __device__ __forceinline__ int unit(int group) const {
    return (warp / 4 * S::kGroups + group) * 4 + lane % 4;
  }
};

// The lane's part of a chunk of x; zeros outside of it.
template <class S>
struct WideRows {
  uint4 words[2][S::kGroups];

  __device__ __forceinline__ void load(const UpArgs& args, const WidePlace<S>& place, int first_row,
                                       int first_col) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + place.row(half);
      const auto* from = static_cast<const char*>(args.x) + row * args.pitch_x * 2;
#pragma unroll
      for (int group = 0; group < S::kGroups; ++group) {
        const int col = first_col + place.unit(group) * 8;
        words[half][group] = make_uint4(0, 0, 0, 0);
        if (row < args.rows && col < args.cols) {
          words[half][group] = __ldg(reinterpret_cast<const uint4*>(from + col * 2LL));
        }
      }
    }
  }
};

// x goes to registers, one chunk ahead, so that shared memory holds a wide slab of U: the wider it
// is, the fewer times act(h) is read.
template <class T, int kRank>
__global__ void __launch_bounds__(kThreads, 1)
    adapter_wide_up_kernel(const __grid_constant__ UpArgs args) {
  using S = WideUpShape<kRank>;
  using TileA = BlockTile<S::kRows, kRank / 8>;
  using TileU = BlockTile<S::kSlab, kRank / 8>;
  extern __shared__ __align__(1024) char swizzled[];
  const Walk walk(args.cut, args.rows, S::kRows, S::kSlab);
  const std::uint32_t factor = shared_address(swizzled), stages = factor + S::kFactor;

  // What the grid ahead does not make need not wait for its end.
#pragma unroll 4
  for (int step = 0; step < S::kSlab * kRank / 8 / kThreads; ++step) {
    const int i = step * kThreads + static_cast<int>(threadIdx.x);
    const int j = i / (kRank / 8), unit = i % (kRank / 8), at = walk.col + column_of(j);
    const bool in = at < args.cols && unit * 8 < args.rank;
    const auto* from = static_cast<const T*>(args.up) +
                       (in ? static_cast<std::int64_t>(at) * args.rank + unit * 8 : 0);
    copy16(factor + TileU::offset(j, unit), from, in ? 16 : 0);
  }
  const WidePlace<S> place;
  WideRows<S> x, next;
  x.load(args, place, walk.first_row, walk.col);
  Eight<T> bias[S::kGroups];
#pragma unroll
  for (int group = 0; group < S::kGroups; ++group) {
    bias[group].load(args.bias, walk.col + place.unit(group) * 8, args.cols);
  }
  wait_for_grid_before();
  launch_next_grid();
  Loader<S::kRows, kRank / 8, kThreads, TileA> load_a(args.active, args.rank, walk.first_row, 0,
                                                      args.rows, args.rank);
  Ring<S::kStages> ring;
  int issued = 0;
  const auto issue = [&] {
    if (issued < walk.chunks) {
      load_a.load(stages + ring.fill() * S::kStage);
      load_a.next_rows();
      ++issued;
    }
    commit();
  };
#pragma unroll
  for (int i = 0; i < S::kStages - 1; ++i) issue();

  for (int chunk = 0; chunk < walk.chunks; ++chunk) {
    const int row = walk.first_row + chunk * S::kRows;
    const std::uint32_t tile = stages + ring.take() * S::kStage;
    wait<S::kStages - 2>();
    show_copies();
    __syncthreads();
    issue();
    float products[S::kGroups][4][4] = {};
    constexpr int kSums = S::kGroups * 16;
    float (&sums)[kSums] = reinterpret_cast<float (&)[kSums]>(products);
    fence_sums(sums);
    cute::warpgroup_arrive();
#pragma unroll
    for (int step = 0; step < kRank / 16; ++step) {
      const std::uint32_t its_columns =
          factor + static_cast<std::uint32_t>(place.warp / 4 * (S::kSlab / 2) * 128);
      multiply_step<T, true>(sums, of_columns<TileA>(tile, step),
                             of_columns<TileU>(its_columns, step));
    }
    cute::warpgroup_commit_batch();
    if (chunk + 1 < walk.chunks) next.load(args, place, row + S::kRows, walk.col);
    cute::warpgroup_wait<0>();
    fence_sums(sums);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = row + place.row(half);
      T* to = static_cast<T*>(args.y) + static_cast<std::int64_t>(at) * args.cols;
#pragma unroll
      for (int group = 0; group < S::kGroups; ++group) {
        const int col = walk.col + place.unit(group) * 8;
        add_up<T>(x.words[half][group], products[group], half, bias[group]);
        if (at < args.rows && col < args.cols) {
          *reinterpret_cast<uint4*>(to + col) = x.words[half][group];
        }
      }
    }
    x = next;
  }
}

// What a launch makes. Where the registers do not hold the sums of both products with ranks, there
// is one for all but U's gradient, and one for that.
enum class Makes : int { both, down, up };

template <int kRankIn, Makes kMakesIn>
struct WideGradsShape {
  static constexpr int kRank = kRankIn, kRows = 64, kSlab = 128;
  static constexpr Makes kMakes = kMakesIn;
  static constexpr bool kDown = kMakes != Makes::up, kUp = kMakes != Makes::down;
  static constexpr int kGroups = kSlab / 2 / kGroup;
  static constexpr int kFactor = kDown ? kSlab * kRank * 2 : 0;
  static constexpr int kTile = kRows * kSlab * 2, kTileR = kRows * kRank * 2;
  static constexpr int kLines = kRows * 16;
  static constexpr int kTiles = kMakes == Makes::both ? 2 : 1;  // of x or dy, and of ranks
  static constexpr int kStage = (kDown ? 2 : 1) * kTile + kTiles * kTileR + kLines;
  static constexpr int kStages = std::min(4, (227 * 1024 - kFactor) / kStage);
  static constexpr int kShared = kFactor + kStages * kStage;
  static_assert(kStage % 1024 == 0 && kStages > 1);
  static constexpr int kBlocks = 1;
  // As store_products and store_dy_sums have it: a warp has 16 columns and all ranks.
  static constexpr int kWarpsR = 1, kWarpsC = kWarps, kTilesC = 1, kTilesR = kRank / 8;
};

// The chunk's rows as the left operand of the products with ranks: 16 columns and all rows.
template <class S>
using ColumnWords = std::uint32_t[S::kRows / 16][4];

template <class S, class TileT>
__device__ __forceinline__ void load_columns(ColumnWords<S>& words, std::uint32_t tile) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < S::kRows / 16; ++k) {
    load_matrices<true>(
        words[k], tile + TileT::offset(k * 16 + lane / 16 * 8 + lane % 8, warp * 2 + lane / 8 % 2));
  }
}

// Starts sums += words of columns [rows, ranks of a tile].
template <class T, class S, class TileV, int kCount>
__device__ __forceinline__ void start_columns(float (&sums)[kCount], ColumnWords<S>& words,
                                              std::uint32_t tile) {
#pragma unroll
  for (int k = 0; k < S::kRows / 16; ++k) fence_words(words[k]);
  fence_sums(sums);
  cute::warpgroup_arrive();
#pragma unroll
  for (int k = 0; k < S::kRows / 16; ++k) {
    multiply_step<T>(sums, words[k], of_rows<TileV>(tile, k));
  }
  cute::warpgroup_commit_batch();
}

// A thread's part of the sums of dh over rows: two ranks, and a part of a chunk's rows.
template <class S>
struct DhSums {
  static constexpr int kParts = kThreads / (S::kRank / 2), kRowsOfPart = S::kRows / kParts;
  int pair = static_cast<int>(threadIdx.x) % (S::kRank / 2);
  int part = static_cast<int>(threadIdx.x) / (S::kRank / 2);
  float2 sum = make_float2(0, 0);

  template <class T, class TileV>
  __device__ __forceinline__ void add(std::uint32_t tile) {
#pragma unroll 8
    for (int i = 0; i < kRowsOfPart; ++i) {
      std::uint32_t word;
      asm volatile("ld.shared.u32 %0, [%1];"
                   : "=r"(word)
                   : "r"(tile + TileV::offset(part * kRowsOfPart + i, pair / 4) + pair % 4 * 4)
                   : "memory");
      const float2 dh = widen_pair<T>(word);
      sum.x += dh.x, sum.y += dh.y;
    }
  }
  // All threads; what `shared` held is lost.
  __device__ __forceinline__ void store(float* to, float2* shared, int rank) const {
    shared[threadIdx.x] = sum;
    __syncthreads();
    if (part != 0 || pair * 2 >= rank) return;
    float2 total = sum;
    for (int i = 1; i < kParts; ++i) {
      const float2 its = shared[i * (S::kRank / 2) + pair];
      total.x += its.x, total.y += its.y;
    }
    *reinterpret_cast<float2*>(to + pair * 2) = total;
  }
};

template <class T, int kRank, Makes kMakes>
__global__ void __launch_bounds__(kThreads, 1)
    adapter_wide_grads_kernel(const __grid_constant__ GradsArgs args) {
  using S = WideGradsShape<kRank, kMakes>;
  using TileT = Tile<S::kRows, S::kSlab / 8>;
  using TileV = BlockTile<S::kRows, kRank / 8>;
  using TileD = BlockTile<kRank, S::kSlab / 8>;
  extern __shared__ __align__(1024) char swizzled[];
  const Walk walk(args.cut, args.rows, S::kRows, S::kSlab);
  const std::uint32_t factor = shared_address(swizzled), stages = factor + S::kFactor;

  if constexpr (S::kDown) {  // what the grid ahead does not make need not wait for its end
#pragma unroll 4
    for (int step = 0; step < S::kSlab * kRank / 2 / kThreads; ++step) {
      const int i = step * kThreads + static_cast<int>(threadIdx.x);
      const int rank = i / (S::kSlab / 2), j = i % (S::kSlab / 2) * 2;
      copy_pair<T>(factor + TileD::offset(rank, j / 8) + j % 8 * 2, rank, walk.col + column_of(j),
                   args);
    }
  }
  wait_for_grid_before();
  launch_next_grid();
  using LoadT = Loader<S::kRows, S::kSlab / 8, kThreads>;
  using LoadV = Loader<S::kRows, kRank / 8, kThreads, TileV>;
  const int at_row = walk.first_row;
  LoadT load_dy(args.dy, args.pitch_dy, at_row, walk.col, args.rows, args.cols);
  LoadT load_x(args.x, args.pitch_x, at_row, walk.col, args.rows, args.cols);
  LoadV load_dh(args.dh, args.rank, at_row, 0, args.rows, args.rank);
  LoadV load_a(args.active, args.rank, at_row, 0, args.rows, args.rank);
  const bool needs_x = args.down_parts != nullptr || args.lines != nullptr;
  Ring<S::kStages> ring;
  int issued = 0;
  const auto tiles_of = [&](int stage) {
    const std::uint32_t at = stages + stage * S::kStage;
    const std::uint32_t ranks = at + (S::kDown ? 2 : 1) * S::kTile;
    return GradsTiles{at, at + S::kTile, ranks, ranks + (S::kTiles - 1) * S::kTileR,
                      ranks + S::kTiles * S::kTileR};
  };
  const auto issue = [&] {
    if (issued < walk.chunks) {
      const GradsTiles to = tiles_of(ring.fill());
      load_dy.load(to.dy);
      load_dy.next_rows();
      if constexpr (S::kDown) {
        if (needs_x) load_x.load(to.x);
        load_x.next_rows();
        load_dh.load(to.dh);
        load_dh.next_rows();
        copy_lines<S::kRows>(to.lines, walk.first_row + issued * S::kRows, args);
      }
      if constexpr (S::kUp) {
        if (args.up_parts != nullptr) load_a.load(to.active);
        load_a.next_rows();
      }
      ++issued;
    }
    commit();
  };
#pragma unroll
  for (int i = 0; i < S::kStages - 1; ++i) issue();

  const WidePlace<S> place;
  const bool sums_dh = args.dh_parts != nullptr && walk.col == 0;
  Eight<T> weight[S::kGroups];
#pragma unroll
  for (int group = 0; group < S::kGroups; ++group) {
    weight[group].load(args.weight, walk.col + place.unit(group) * 8, args.cols);
  }
  // All is made, and what is not wanted is not stored: products are not to lie in branches.
  float down[1][kRank / 8][4] = {}, up[1][kRank / 8][4] = {}, dy[1][2] = {};
  DhSums<S> dh;
  for (int chunk = 0; chunk < walk.chunks; ++chunk) {
    const int row = walk.first_row + chunk * S::kRows;
    const GradsTiles tiles = tiles_of(ring.take());
    wait<S::kStages - 2>();
    show_copies();
    __syncthreads();
    issue();
    float products[S::kGroups][4][4] = {};
    constexpr int kSums = S::kGroups * 16;
    float (&sums)[kSums] = reinterpret_cast<float (&)[kSums]>(products);
    if constexpr (S::kDown) {
      fence_sums(sums);
      cute::warpgroup_arrive();
#pragma unroll
      for (int step = 0; step < kRank / 16; ++step) {
        const std::uint32_t its_columns = factor + place.warp / 4 * TileD::kBlock;
        multiply_step<T, false>(sums, of_columns<TileV>(tiles.dh, step),
                                of_rows<TileD>(its_columns, step));
      }
      cute::warpgroup_commit_batch();
    }
    ColumnWords<S> dy_words;
    load_columns<S, TileT>(dy_words, tiles.dy);
#pragma unroll
    for (int k = 0; k < S::kRows / 16; ++k) {
      add_halves<T>(dy[0][0], dy_words[k][0], dy_words[k][2]);
      add_halves<T>(dy[0][1], dy_words[k][1], dy_words[k][3]);
    }
    if constexpr (S::kUp) {
      start_columns<T, S, TileV>(reinterpret_cast<float (&)[kRank / 2]>(up), dy_words,
                                 tiles.active);
    }
    if constexpr (S::kDown) {
      ColumnWords<S> x_words;
      load_columns<S, TileT>(x_words, tiles.x);
      if (args.lines != nullptr) {
#pragma unroll
        for (int k = 0; k < S::kRows / 16; ++k) {
          float2 lines[4];
          load_lines(lines, tiles.lines, k * 16);
          norm_words<T>(x_words[k], lines);
        }
      }
      start_columns<T, S, TileV>(reinterpret_cast<float (&)[kRank / 2]>(down), x_words, tiles.dh);
      cute::warpgroup_wait<S::kUp ? 2 : 1>();
      fence_sums(sums);
      // Else they are widened ahead of the loop, to more registers than there are.
#pragma unroll
      for (Eight<T>& its : weight) fence_words(reinterpret_cast<std::uint32_t (&)[4]>(its.words));
      if (args.dx != nullptr) {
#pragma unroll
        for (int i = 0; i < S::kGroups * 2; ++i) {
          const int unit = place.unit(i / 2);
          visit_norm(args, [&](auto norm) {
            store_dx<T, TileT, decltype(norm)::value>(products[i / 2], i % 2, weight[i / 2], tiles,
                                                      args, row, place.row(i % 2),
                                                      walk.col + unit * 8, unit);
          });
        }
      }
      if (sums_dh) dh.template add<T, TileV>(tiles.dh);
    }
    cute::warpgroup_wait<0>();
    if constexpr (S::kDown) fence_sums(reinterpret_cast<float (&)[kRank / 2]>(down));
    if constexpr (S::kUp) fence_sums(reinterpret_cast<float (&)[kRank / 2]>(up));
  }
  const int band = static_cast<int>(blockIdx.x) / args.cut.slabs;
  if constexpr (S::kUp) store_products<S>(args.up_parts, up, band, walk.col, args);
  if constexpr (S::kDown) {
    store_products<S>(args.down_parts, down, band, walk.col, args);
    store_dy_sums<S>(dy, band, walk.col, args);
    if (sums_dh) {
      __syncthreads();
      dh.store(args.dh_parts + static_cast<std::int64_t>(band) * args.rank,
               reinterpret_cast<float2*>(swizzled), args.rank);
    }
  }
}

}  // namespace pyfast::adapter
