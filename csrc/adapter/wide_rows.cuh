// SPDX-License-Identifier: Apache-2.0
// rows.cuh's products above 64 ranks on Hopper, by wgmma. A block has 128 rows, 64 for each of its
// two warpgroups, or 64 and half of the ranks for each. The blocks that share rows, each with a
// slab of the columns, are a cluster and add up their sums through shared memory, each those of its
// part of the rows.
#pragma once

#include <cute/arch/cluster_sm90.hpp>

#include "adapter/wgmma.cuh"

namespace pyfast::adapter {

constexpr int kMostSlabs = 8;  // a cluster's size is a power of two up to this

template <int kRankIn, int kRowsIn>
struct WideRowsShape {
  static constexpr int kRank = kRankIn, kThreads = 2 * kWarpgroup, kWarps = kThreads / 32;
  static constexpr int kRows = kRowsIn, kCols = 64;  // of a chunk
  static constexpr int kGroupsM = kRows / 64, kGroupsN = 2 / kGroupsM, kGroupsK = 1;
  static constexpr int kRanks = kRank / kGroupsN;  // of a warpgroup
  static constexpr int kStage = (kRows + kRank) * kCols * 2;
  static constexpr int kStages = std::min(6, 192 * 1024 / kStage);
  static constexpr int kPitch = kRank + 8;  // of the sums, so that a quad's banks differ
  static constexpr int kPart = 0;           // slabs do not meet in global memory
  static constexpr int kShared = std::max(kStages * kStage, kRows * kPitch * 4);
};

__device__ __forceinline__ float4 load_of_block(const void* shared, int block) {
  float4 value;
  asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "r"(cute::set_block_rank(shared_address(shared), block))
               : "memory");
  return value;
}

// Adds up what the kBlocks blocks of a cluster have there, each block those rows that it finishes.
template <class S, int kBlocks>
__device__ __forceinline__ void add_blocks(float* left, float2* moments) {
  constexpr int kRows = S::kRows / kBlocks, kOfRow = S::kRank / 4, kCount = kRows * kOfRow;
  static_assert(kCount % S::kThreads == 0);
  const int first = static_cast<int>(blockIdx.x) % kBlocks * kRows;
  const auto thread = static_cast<int>(threadIdx.x);
  auto* mine = reinterpret_cast<float4*>(left + first * S::kPitch);
  auto* its_moments = reinterpret_cast<float4*>(moments + first);
  float4 sums[kCount / S::kThreads] = {}, its = make_float4(0, 0, 0, 0);
  const auto at = [&](int i) {
    const int n = i * S::kThreads + thread;
    return n / kOfRow * (S::kPitch / 4) + n % kOfRow;
  };
  const auto add = [](float4& sum, const float4& part) {
    sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
  };
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
    for (int i = 0; i < kCount / S::kThreads; ++i) {
      add(sums[i], load_of_block(mine + at(i), block));
    }
    if (thread < kRows / 2) add(its, load_of_block(its_moments + thread, block));
  }
#pragma unroll
  for (int i = 0; i < kCount / S::kThreads; ++i) mine[at(i)] = sums[i];
  if (thread < kRows / 2) its_moments[thread] = its;
}

template <class T, int kRank, int kRows, bool kBackward>
__global__ void __launch_bounds__(WideRowsShape<kRank, kRows>::kThreads, 1)
    adapter_wide_rows_kernel(const __grid_constant__ RowsArgs args) {
  using S = WideRowsShape<kRank, kRows>;
  using TileT = BlockTile<S::kRows, S::kCols / 8>;
  using TileF =
      std::conditional_t<kBackward, BlockTile<S::kCols, kRank / 8>, BlockTile<kRank, S::kCols / 8>>;
  static_assert(TileT::kBytes + TileF::kBytes == S::kStage && S::kStage % 1024 == 0);
  extern __shared__ __align__(1024) char swizzled[];
  __shared__ __align__(16) float2 shared_moments[S::kRows];
  __shared__ float2 stats[S::kRows];
  const int slabs = args.cut.slabs, slab = static_cast<int>(blockIdx.x) % slabs;
  const int row = static_cast<int>(blockIdx.x) / slabs * S::kRows, first = slab * args.cut.chunks;
  const int chunks = min(args.cut.chunks, (args.cols + S::kCols - 1) / S::kCols - first);
  const std::uint32_t shared = shared_address(swizzled);
  Loader<S::kRows, S::kCols / 8, S::kThreads, TileT> load_t(args.t, args.pitch, row,
                                                            first * S::kCols, args.rows, args.cols);
  using LoadF =
      Loader<kBackward ? S::kCols : kRank, (kBackward ? kRank : S::kCols) / 8, S::kThreads, TileF>;
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
  // A stage is filled again once the products with it are complete: one chunk after they began.
  constexpr int kAhead = S::kStages - 2;
  // The grid ahead, where it weighs D, waited for what made x.
  const bool early = !kBackward && args.ranks != nullptr;
  if (!early) wait_for_grid_before();
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    if (i < chunks) issue_t(i);
  }
  if (early) wait_for_grid_before();
  launch_next_grid();
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    if (i < chunks) issue_f(i);
    commit();
  }

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group_m = warp / 4 % S::kGroupsM, group_n = warp / 4 / S::kGroupsM;
  const std::uint32_t rows_at = group_m * 64 * 128;
  const std::uint32_t ranks_at =
      TileT::kBytes + group_n * (kBackward ? S::kRanks / 64 * TileF::kBlock : S::kRanks * 128);
  // Of its row's moments a thread has half of the columns.
  Moments moments;
  const int moment_row = warp * 16 + lane % 16, moment_unit = lane / 16 * 4;
  const bool with_moments = !kBackward && args.stats != nullptr && warp < S::kRows / 16;
  if (with_moments && row + moment_row < args.rows) {
    moments.shift = widen(
        static_cast<const T*>(args.t)[static_cast<std::int64_t>(row + moment_row) * args.pitch]);
  }
  float products[S::kRanks / 8][4] = {};
  float (&sums)[S::kRanks / 2] = reinterpret_cast<float (&)[S::kRanks / 2]>(products);
  Ring<S::kStages> ring;
  ring.next = kAhead;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const std::uint32_t tile = shared + ring.take() * S::kStage;
    wait<kAhead - 1>();
    show_copies();
    __syncthreads();
    fence_sums(sums);
    cute::warpgroup_arrive();
#pragma unroll
    for (int step = 0; step < S::kCols / 16; ++step) {
      multiply_step<T, !kBackward>(sums, of_columns<TileT>(tile + rows_at, step),
                                   kBackward ? of_rows<TileF>(tile + ranks_at, step)
                                             : of_columns<TileF>(tile + ranks_at, step));
    }
    cute::warpgroup_commit_batch();
    if (chunk + kAhead < chunks) {
      const int stage = ring.fill();
      issue_t(stage);
      issue_f(stage);
    }
    commit();
    if (with_moments) {
      const int cols = args.cols - (first + chunk) * S::kCols;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // Columns beyond the row are zeros, which are not to be counted.
        if ((moment_unit + i) * 8 >= cols) continue;
        const uint4 words = load_shared16(tile + TileT::offset(moment_row, moment_unit + i));
        for (const std::uint32_t word : {words.x, words.y, words.z, words.w}) {
          moments.add(widen_pair<T>(word));
        }
      }
    }
    cute::warpgroup_wait<1>();
    fence_sums(sums);
  }
  cute::warpgroup_wait<0>();
  fence_sums(sums);
  wait<0>();
  __syncthreads();

  auto* left = reinterpret_cast<float*>(swizzled);
  float* to = left + (group_m * 64 + warp % 4 * 16 + lane / 4) * S::kPitch + group_n * S::kRanks +
              lane % 4 * 2;
#pragma unroll
  for (int n = 0; n < S::kRanks / 8; ++n) {
    const float (&c)[4] = products[n];
    *reinterpret_cast<float2*>(to + n * 8) = make_float2(c[0], c[1]);
    *reinterpret_cast<float2*>(to + 8 * S::kPitch + n * 8) = make_float2(c[2], c[3]);
  }
  moments.sum += __shfl_xor_sync(kAll, moments.sum, 16);
  moments.squares += __shfl_xor_sync(kAll, moments.squares, 16);
  if (with_moments && lane < 16)
    shared_moments[moment_row] = make_float2(moments.sum, moments.squares);
  const Span span{row, slab * (S::kRows / slabs), S::kRows / slabs};
  if (slabs > 1) {
    cute::cluster_arrive();
    cute::cluster_wait();
    if (slabs == 2) add_blocks<S, 2>(left, shared_moments);
    if (slabs == 4) add_blocks<S, 4>(left, shared_moments);
    if (slabs == 8) add_blocks<S, 8>(left, shared_moments);
    cute::cluster_arrive();  // it has read all that is not its own
  }
  __syncthreads();
  finish<T, S, kBackward, S::kThreads>(Sums<S>{left, shared_moments, nullptr, 1}, stats, args,
                                       span);
  if (slabs > 1) cute::cluster_wait();
}

}  // namespace pyfast::adapter
