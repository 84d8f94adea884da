// SPDX-License-Identifier: Apache-2.0
// Up to 16 rows of x, by mma.sync, fed by TMA. Bound by the one read of the weight.
//
// A block of threads has a tile of W's rows, as even as rows allow, in one or more passes. A warp
// of it has 32 rows and every groups_k-th chunk of 256 columns. One further warp copies chunks of W
// and x into a ring of slots: W begins before the grid ahead has ended, x when it has.
//
// In a block of 64 columns lane t of a quad has columns 16 t on: 8 bytes of a row of W and 32 of a
// row of x. The order in which a product takes its columns is free, so nothing is permuted.
#pragma once

#include <algorithm>

#include "nf4/few_rows_async.cuh"

namespace pyfast::nf4::few {

constexpr int kFedWarps = 8, kFedThreads = kFedWarps * 32 + 128;
constexpr int kFedAhead = 4;
constexpr int kFedTiles = 2, kFedRows = 16 * kFedTiles;  // of a warp

struct FedPlan {
  int rows;           // of a tile
  int passes;         //
  int log2_groups_k;  // groups_k times groups of 32 rows are the warps
  int slots;
  int ahead;  // chunks of W asked for ahead of the first x, which would queue behind more
};

template <int kTokens>
struct FedLayout {
  static constexpr int kScales = kTableBytes;
  static constexpr int kBarriers = kScales + kFedWarps * kFedRows * 16;
  static constexpr int kSums = kBarriers + 256;
  // [group of k][token][row]; the pad keeps the stores of a quad in different banks.
  static constexpr int kSumsBytes = kTokens * kFedWarps * (kFedRows + 4) * 4;
  static constexpr int kSlots = (kSums + kSumsBytes + 1023) / 1024 * 1024;
  static constexpr int kSlotX = kTokens * kChunkColumns * 2;
  static __host__ __device__ constexpr int slot_w(int rows) {
    return (rows * kChunkRow + 1023) / 1024 * 1024;
  }
  static __host__ __device__ constexpr int slot(int rows) { return slot_w(rows) + kSlotX; }
  static constexpr int bytes(int rows, int slots) { return kSlots + slots * slot(rows); }

  static FedPlan make_plan(int n, int sm_count) {
    FedPlan plan{};
    plan.passes = ceil_div(n, sm_count * kFedWarps * kFedRows);
    plan.rows = ceil_div(n, sm_count * plan.passes);
    plan.log2_groups_k = 3;
    while ((kFedWarps >> plan.log2_groups_k) * kFedRows < plan.rows) --plan.log2_groups_k;
    // Whole turns of the groups, as a warp must see every phase of the slots that it uses; two are
    // enough, and with more the first chunk of x comes later.
    const int groups_k = 1 << plan.log2_groups_k;
    const int fit = (kMostSharedBytes - kSlots) / slot(plan.rows) / groups_k * groups_k;
    plan.slots = std::min(fit, std::max(2 * groups_k, 4));
    plan.ahead = std::min(plan.slots, kFedAhead);
    return plan;
  }
};

template <class T, int kTokens, bool kNested>
__global__ void __launch_bounds__(kFedThreads, 1)
    few_rows_fed_kernel(const __grid_constant__ CUtensorMap map_w,
                        const __grid_constant__ CUtensorMap map_x, const FewRowsParams args,
                        const FedPlan plan) {
  using Layout = FedLayout<kTokens>;
  constexpr int kTokenTiles = kTokens / 8, kConsumerThreads = kFedWarps * 32;
  extern __shared__ __align__(1024) char storage[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const std::uint32_t shared = shared_address(storage);
  const int blocks = args.k / kBlock, chunks = (blocks + 3) / 4;
  const int groups_k = 1 << plan.log2_groups_k;
  const int slot_bytes = Layout::slot(plan.rows), slot_x = Layout::slot_w(plan.rows);
  const auto tile_of = [&](int pass) {
    return (pass * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x)) * plan.rows;
  };

  Slots ring(shared + Layout::kBarriers, plan.slots);
  if (threadIdx.x == 0) {
    ring.init(kFedWarps >> plan.log2_groups_k);
    fence_barriers();
  }
  __syncthreads();
  launch_next_grid();

  if (warp >= kFedWarps) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (warp == kFedWarps && lane == 0) {
      const std::uint64_t once = evict_first(), often = evict_last();
      const int bytes = plan.rows * kChunkRow + Layout::kSlotX;
      const auto load_w = [&](int slot, int tile, int chunk) {
        barrier_expect(ring.full + 8 * slot, bytes);
        load_box(shared + Layout::kSlots + slot * slot_bytes, &map_w, ring.full + 8 * slot,
                 chunk * kChunkRow, tile, once);
      };
      const auto load_x = [&](int slot, int chunk) {
        load_box3(shared + Layout::kSlots + slot * slot_bytes + slot_x, &map_x,
                  ring.full + 8 * slot, 0, chunk * 4, often);
      };
      const int ahead = min(plan.ahead, chunks);
      for (int chunk = 0; chunk < ahead; ++chunk) load_w(chunk, tile_of(0), chunk);
      wait_for_grid_before();
      for (int pass = 0; pass < plan.passes; ++pass) {
        for (int chunk = 0; chunk < chunks; ++chunk, ring.next()) {
          if (pass > 0 || chunk >= ahead) {
            barrier_wait(ring.empty_at(), ring.phase ^ 1);
            load_w(ring.slot, tile_of(pass), chunk);
          }
          load_x(ring.slot, chunk);
        }
      }
    }
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");

  float4* const scales = reinterpret_cast<float4*>(storage + Layout::kScales) + warp * kFedRows;
  float* const sums = reinterpret_cast<float*>(storage + Layout::kSums);
  const int group_k = warp & (groups_k - 1), group_rows = warp >> plan.log2_groups_k;
  const int first_row = group_rows * kFedRows;  // in a tile
  RawScales<kNested> raw;
  const auto load_scales = [&](int tile, int chunk) {
    const int in_tile = first_row + lane, row = tile + in_tile;
    if (in_tile < plan.rows && row < args.n && chunk < chunks) {
      load_chunk(raw, args, row, chunk * 4, blocks);
    }
  };
  load_scales(tile_of(0), group_k);
  fill_table<T>(storage);
  if constexpr (kNested) fill_map_beside(storage);
  const float offset = kNested ? __ldg(args.offset) : 0.0F;
  const auto meet = [] { asm volatile("bar.sync 1, %0;" ::"n"(kConsumerThreads) : "memory"); };
  meet();

  // Rows of W are swizzled by their number: row 2 g of the first eight, then row 2 g - 7, are the
  // rows g of a product, so that the lanes of half a warp meet no bank conflict.
  const int g = lane / 4, t = lane % 4, w_row = g < 4 ? 2 * g : 2 * g - 7;
  const std::uint32_t lane4 = lane * 4;
  const auto advance = [&] {
    ring.slot += groups_k;
    while (ring.slot >= plan.slots) ring.slot -= plan.slots, ring.phase ^= 1;
  };

  // Lanes of tokens that do not exist load nothing and keep zeros.
  uint4 tokens[kTokens > 8 ? 1 : 4][kTokenTiles][2] = {};

  for (int pass = 0; pass < plan.passes; ++pass) {
    const int tile = tile_of(pass);
    const int active = min(plan.rows, args.n - tile) - first_row;  // rows of this warp
    float total[kFedTiles][kTokenTiles][4] = {};
    const int before = pass * chunks + group_k;
    ring.slot = before % plan.slots, ring.phase = before / plan.slots % 2;
    for (int chunk = group_k; chunk < chunks; chunk += groups_k) {
      scales[lane] = raw.resolve(storage, lane4, offset);
      if (chunk + groups_k < chunks) {
        load_scales(tile, chunk + groups_k);
      } else if (pass + 1 < plan.passes) {
        load_scales(tile_of(pass + 1), group_k);
      }
      __syncwarp();
      float4 scale[kFedTiles][2];
#pragma unroll
      for (int i = 0; i < kFedTiles; ++i) {
        scale[i][0] = scales[i * 16 + w_row];
        scale[i][1] = scales[i * 16 + w_row + 8];
      }
      barrier_wait(ring.full_at(), ring.phase);
      const char* slot = storage + Layout::kSlots + ring.slot * slot_bytes;
      const char* words = slot + (first_row + w_row) * kChunkRow + t % 2 * 8;
      const char* x_row = slot + slot_x + g * (kBlock * 2);
      const auto multiply_block = [&](int block, auto tiles) {
        uint4(&x)[kTokenTiles][2] = tokens[kTokens > 8 ? 0 : block];
#pragma unroll
        for (int i = 0; i < kTokenTiles; ++i) {
          const char* from = x_row + (block * kTokens + i * 8) * (kBlock * 2);
          if (kTokens > 8 || g < args.m) {
            x[i][0] = *reinterpret_cast<const uint4*>(from + (2 * t ^ g) * 16);
            x[i][1] = *reinterpret_cast<const uint4*>(from + ((2 * t + 1) ^ g) * 16);
          }
        }
        const char* from = words + ((2 * block + t / 2) ^ w_row) * 16;
#pragma unroll
        for (int i = 0; i < decltype(tiles)::value; ++i) {
          const uint2 high = *reinterpret_cast<const uint2*>(from + i * 16 * kChunkRow);
          const uint2 low = *reinterpret_cast<const uint2*>(from + (i * 16 + 8) * kChunkRow);
          add_block<T>(total[i], storage, lane4, high, low, x, of_block(scale[i][0], block),
                       of_block(scale[i][1], block));
        }
      };
      // What lies beyond k is zero in x.
      const auto multiply_tiles = [&](auto tiles) {
#pragma unroll
        for (int block = 0; block < 4; ++block) multiply_block(block, tiles);
      };
      if (active > 16) {
        multiply_tiles(std::integral_constant<int, 2>{});
      } else if (active > 0) {
        multiply_tiles(std::integral_constant<int, 1>{});
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(ring.empty_at());
      advance();
    }
    // Adds up the groups of k, in order.
    const int pitch = (kFedRows * kFedWarps >> plan.log2_groups_k) + 4;
    float* mine = sums + group_k * kTokens * pitch + first_row + w_row;
#pragma unroll
    for (int i = 0; i < kFedTiles; ++i) store_sums(total[i], mine + i * 16, pitch);
    meet();
    store_rows<T, kFedWarps, kTokens>(args, sums, pitch, groups_k, tile,
                                      min(plan.rows, args.n - tile));
    if (pass + 1 < plan.passes) meet();
  }
}

}  // namespace pyfast::nf4::few
