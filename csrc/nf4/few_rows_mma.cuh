// SPDX-License-Identifier: Apache-2.0
// Up to 16 rows of x, by mma.sync and cp.async: for GPUs without TMA. Bound by the one read of W.
//
// A block of threads has a band of W's rows, as even as rows allow, in one or more passes. Of a
// pass a warp has 16 rows and every groups_k-th chunk of 256 columns. All warps walk along k in
// step, through a ring of stages that holds their rows of W and the chunks of x, which warps with
// the same columns share. In a block of 64 columns lane t of a quad has columns 16 t on: 8 bytes of
// a row of W and 32 of a row of x. The order in which a product takes its columns is free.
#pragma once

#include "nf4/few_rows.cuh"

namespace pyfast::nf4::few {

constexpr int kBandWarps = 8, kBandThreads = kBandWarps * 32, kBandRows = 16;  // rows of a warp
constexpr int kBandChunk = 256, kBandChunkRow = kBandChunk / 2;                // bytes of W
constexpr int kPitchX = kBandChunk * 2 + 16;  // bytes of a row of x: quads meet no bank conflict

struct BandPlan {
  int log2_groups_k;  // groups_k times groups of 16 rows are the warps
  int stages;         // 2 or 3
};

template <int kTokens>
struct BandLayout {
  static constexpr int kScales = kTableBytes;
  static constexpr int kSums = kScales + kBandThreads / 2 * 16;
  // [group of k][token][row]; the pad keeps the stores of a quad in different banks.
  static constexpr int kStages = kSums + kTokens * kBandWarps * (kBandRows + 4) * 4;
  static constexpr int kStageW = kBandWarps * kBandRows * kBandChunkRow;
  static __host__ __device__ constexpr int stage(int groups_k, int m) {
    return kStageW + (groups_k * m * kPitchX + 127) / 128 * 128;
  }
};

template <class T, int kTokens, bool kNested>
__global__ void __launch_bounds__(kBandThreads, 1)
    few_rows_band_kernel(const FewRowsParams args, const BandPlan plan) {
  using Layout = BandLayout<kTokens>;
  constexpr int kTokenTiles = kTokens / 8;
  extern __shared__ __align__(128) char storage[];
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const int groups_k = 1 << plan.log2_groups_k;
  const int group_k = warp & (groups_k - 1), group_rows = warp >> plan.log2_groups_k;
  const int row_blocks = args.k / kBlock;
  const int steps = (args.k + kBandChunk * groups_k - 1) / (kBandChunk * groups_k);
  const auto band = [&](unsigned i) {
    return static_cast<int>(static_cast<std::int64_t>(args.n) * i / gridDim.x);
  };
  const int band_end = band(blockIdx.x + 1);
  const int pass_rows = (kBandWarps >> plan.log2_groups_k) * kBandRows;
  const int above = group_rows * kBandRows;  // rows of a pass ahead of this warp's
  const int first_row = band(blockIdx.x) + above;

  const int stage_bytes = Layout::stage(groups_k, args.m);
  const std::uint32_t stages = shared_address(storage) + Layout::kStages;
  const std::uint64_t once = evict_first(), often = evict_last();
  const std::int64_t pitch_w = args.k / 2;

  // The next stage to copy; it runs ahead of the one that is used.
  int copy_row = first_row, copy_step = 0, copy_slot = 0;
  const auto copy = [&] {
    if (copy_row - above < band_end) {
      const std::uint32_t slot = stages + copy_slot * stage_bytes;
      const int byte = (copy_step * groups_k + group_k) * kBandChunkRow + lane % 8 * 16;
      const std::uint8_t* from = args.packed + (copy_row + lane / 8) * pitch_w + byte;
      // Units of 16 bytes in an order by which eight rows of a column of pairs lie in all banks.
      const std::uint32_t to = slot + warp * (kBandRows * kBandChunkRow) +
                               lane / 8 * kBandChunkRow + ((lane % 8) ^ (lane / 8 % 4 * 2)) * 16;
      const int rows = byte < pitch_w ? band_end - copy_row - lane / 8 : 0;
#pragma unroll
      for (int i = 0; i < kBandRows; i += 4) {
        if (i < rows) copy16(to + i * kBandChunkRow, from + i * pitch_w, 16, once);
      }
      for (int i = warp; i < groups_k * args.m; i += kBandWarps) {
        const int group = i & (groups_k - 1), token = i >> plan.log2_groups_k;
        const int col = (copy_step * groups_k + group) * kBandChunk + lane * 8;
        const T* x = static_cast<const T*>(args.x) + token * args.pitch_x;
        copy16(slot + Layout::kStageW + (group * args.m + token) * kPitchX + lane * 16,
               col < args.k ? x + col : x, col < args.k ? 16 : 0, often);
      }
      copy_slot = copy_slot + 1 == plan.stages ? 0 : copy_slot + 1;
      if (++copy_step == steps) copy_step = 0, copy_row += pass_rows;
    }
    commit();
  };
  for (int i = 1; i < plan.stages; ++i) copy();

  float4* const scales = reinterpret_cast<float4*>(storage + Layout::kScales) + warp * kBandRows;
  float* const sums = reinterpret_cast<float*>(storage + Layout::kSums);
  RawScales<kNested> raw;
  const auto load_scales = [&](int row, int step) {
    const int block = (step * groups_k + group_k) * 4;
    if (lane < kBandRows && row + lane < band_end && block < row_blocks) {
      load_chunk(raw, args, row + lane, block, row_blocks);
    }
  };
  load_scales(first_row, 0);
  fill_table<T>(storage);
  if constexpr (kNested) fill_map_beside(storage);
  const float offset = kNested ? __ldg(args.offset) : 0.0F;

  // Of the lane: its words in a stage, in the row g.
  const int g = lane / 4, t = lane % 4;
  const std::uint32_t lane4 = static_cast<std::uint32_t>(lane) * 4;
  const int word = (warp * kBandRows + g) * kBandChunkRow + t * 8;
  int x_at[kTokenTiles];
#pragma unroll
  for (int i = 0; i < kTokenTiles; ++i) {
    // Tokens that do not exist read the last one; nobody stores their sums.
    x_at[i] = Layout::kStageW + (group_k * args.m + min(i * 8 + g, args.m - 1)) * kPitchX + t * 32;
  }

  int slot = 0;
  for (int row = first_row; row - above < band_end; row += pass_rows) {
    float total[kTokenTiles][4] = {};
    for (int step = 0; step < steps; ++step) {
      if (plan.stages == 3) {
        wait<1>();
      } else {
        wait<0>();
      }
      __syncthreads();
      copy();
      if (lane < kBandRows) scales[lane] = raw.resolve(storage, lane4, offset);
      if (step + 1 < steps) {
        load_scales(row, step + 1);
      } else {
        load_scales(row + pass_rows, 0);
      }
      __syncwarp();
      const char* stage = storage + Layout::kStages + slot * stage_bytes;
      slot = slot + 1 == plan.stages ? 0 : slot + 1;
      if (row >= band_end) continue;
      const float4 upper = scales[g], lower = scales[g + 8];
#pragma unroll
      for (int block = 0; block < 4; ++block) {
        uint4 x[kTokenTiles][2];
#pragma unroll
        for (int i = 0; i < kTokenTiles; ++i) {
          x[i][0] = *reinterpret_cast<const uint4*>(stage + x_at[i] + block * 128);
          x[i][1] = *reinterpret_cast<const uint4*>(stage + x_at[i] + block * 128 + 16);
        }
        const char* words = stage + word + (block ^ g % 4) * 32;
        const uint2 high = *reinterpret_cast<const uint2*>(words);
        const uint2 low = *reinterpret_cast<const uint2*>(words + 8 * kBandChunkRow);
        add_block<T>(total, storage, lane4, high, low, x, of_block(upper, block),
                     of_block(lower, block));
      }
    }
    const int pitch = pass_rows + 4;
    store_sums(total, sums + group_k * kTokens * pitch + above + g, pitch);
    __syncthreads();
    store_rows<T, kBandWarps, kTokens>(args, sums, pitch, groups_k, row - above,
                                       min(pass_rows, band_end - (row - above)));
  }
}

}  // namespace pyfast::nf4::few
