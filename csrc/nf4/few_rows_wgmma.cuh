// SPDX-License-Identifier: Apache-2.0
// 17 to 256 rows of x, by wgmma with the weight as left operand in registers: D[row of W, token].
//
// A warpgroup has 64 rows of W, all tokens, and every kGroupsK-th block of 64 columns. Two further
// warps copy by TMA, one the packed weight (chunks of 256 columns), one x (blocks of 64). As x lies
// in its natural order, lane t of a quad needs byte t of every word of a row: the PRMT that makes
// the address of a look-up picks it, and quads read the same words.
//
// kExact: the table has pairs of floats, which the scale multiplies before they are rounded to what
// bitsandbytes dequantises to. Otherwise codes are multiplied as they are and the sums of a block
// get the scale: fewer instructions a weight and half of the bytes from shared memory, but a second
// set of sums.
#pragma once

#include <cutlass/cutlass.h>

#include <cute/arch/mma_sm90_desc.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <utility>

#include "nf4/few_rows_async.cuh"

namespace pyfast::nf4::few {

constexpr int kGroupThreads = 128;
constexpr int kBlockRow = kBlock * 2;  // bytes of a row of x

struct WgmmaPlan {
  int rows;  // of a tile
  int passes;
};

template <int kTokens, bool kExact, int kGroupsRows, int kGroupsK>
struct WgmmaLayout {
  static constexpr int kGroups = kGroupsRows * kGroupsK, kThreads = (kGroups + 1) * kGroupThreads;
  static constexpr int kMostRows = 64 * kGroupsRows;
  static constexpr int kSlotW = kMostRows * kChunkRow;
  static constexpr int kSlotX = kTokens * kBlockRow;
  static constexpr int kSlotsW = kSlotW > 16384 || kTokens > 64 ? 2 : 4;
  static constexpr int kMap = kTableBytes;
  static constexpr int kScales = kMap + kMapBytes;
  static constexpr int kBarriers = kScales + 4 * kGroups * 16 * 16;
  // Sums that a group of k hands over at a time: [kHanded][thread of the other group].
  static constexpr int kHanded = 8;
  static constexpr int kSums = kBarriers + 256;
  static constexpr int kSumsBytes = kGroupsK == 1 ? 0 : kHanded * kGroupsRows * kGroupThreads * 4;
  static constexpr int kW = (kSums + kSumsBytes + 1023) / 1024 * 1024;
  static constexpr int kX = kW + kSlotsW * kSlotW;
  static constexpr int kFitX = (kMostSharedBytes - kX) / kSlotX / kGroupsK * kGroupsK;
  static constexpr int kSlotsX = kFitX > 12 ? 12 : kFitX;
  static constexpr int kBytes = kX + kSlotsX * kSlotX;
  static_assert(kSlotsX >= 3 && 16 * (kSlotsW + kSlotsX) <= 256);
};

// Starts D (+)= A X over one step of 16 columns.
template <class T, int kTokens>
struct Wgmma;
#define PYFAST_WGMMA(TOKENS)                                                                     \
  template <class T>                                                                             \
  struct Wgmma<T, TOKENS> {                                                                      \
    static constexpr auto kK = cute::SM90::GMMA::Major::K;                                       \
    using Op = std::conditional_t<std::is_same_v<T, __nv_bfloat16>,                              \
                                  cute::SM90::GMMA::MMA_64x##TOKENS##x16_F32BF16BF16_RS<kK, kK>, \
                                  cute::SM90::GMMA::MMA_64x##TOKENS##x16_F32F16F16_RS<kK, kK>>;  \
    template <std::size_t... kAt>                                                                \
    static __device__ __forceinline__ void start(const std::uint32_t* a, std::uint64_t x,        \
                                                 float* d, bool add,                             \
                                                 std::index_sequence<kAt...>) {                  \
      Op::fma(a[0], a[1], a[2], a[3], x, d[kAt]...,                                              \
              add ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero);         \
    }                                                                                            \
  };
PYFAST_WGMMA(32)
PYFAST_WGMMA(64)
PYFAST_WGMMA(128)
PYFAST_WGMMA(256)
#undef PYFAST_WGMMA

// Rows of 128 bytes as TMA swizzles them, eight following one another.
__device__ __forceinline__ std::uint64_t describe_x(std::uint32_t rows) {
  cute::GmmaDescriptor descriptor;
  descriptor.bitfield.start_address_ = rows >> 4;
  descriptor.bitfield.leading_byte_offset_ = 1;
  descriptor.bitfield.stride_byte_offset_ = 8 * kBlockRow >> 4;
  descriptor.bitfield.layout_type_ = static_cast<std::uint8_t>(cute::SM90::GMMA::LayoutType::B128);
  return descriptor;
}

// Pairs of floats, one to a lane.
__device__ __forceinline__ void fill_exact_table(char* table) {
  for (unsigned row = threadIdx.x; row < 256; row += blockDim.x) {
    const float high = c_codes[row >> 4], low = c_codes[row & 15];
    const float4 unit = make_float4(high, low, high, low);
#pragma unroll
    for (unsigned i = 0; i < 16; ++i) {
      *reinterpret_cast<float4*>(table + row * kTableRow + ((i + row) % 16) * 16) = unit;
    }
  }
}

// The left operand of a block of 64 columns: [step of 16][register]. `row` is the lane's row g of a
// chunk, whose units of 16 bytes are swizzled by g.
using Operand = std::uint32_t[16];

template <class T, bool kExact>
__device__ __forceinline__ void decode(Operand& a, const char* table, const char* row, int g,
                                       int block, std::uint32_t lane_at, std::uint32_t select,
                                       float upper, float lower) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int half = i / 2, below = i % 2;
    const char* at = row + ((block * 2 + half) ^ g) * 16 + below * 8 * kChunkRow;
    const uint4 loaded = *reinterpret_cast<const uint4*>(at);
    const std::uint32_t words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const char* entry = table + __byte_perm(words[j], lane_at, select);
      std::uint32_t& to = a[half * 8 + j * 2 + below];
      if constexpr (kExact) {
        const float scale = below == 0 ? upper : lower;
        const float2 pair = *reinterpret_cast<const float2*>(entry);
        to = pair_of<T>(__fmul_rn(pair.x, scale), __fmul_rn(pair.y, scale));
      } else {
        to = *reinterpret_cast<const std::uint32_t*>(entry);
      }
    }
  }
}

// Accumulators are not to be moved from here on.
template <int kCount>
__device__ __forceinline__ void pin(float (&values)[kCount]) {
#pragma unroll
  for (float& value : values) asm volatile("" : "+f"(value)::"memory");
}

// Where products go: to the sums themselves, or to those of a block.
template <bool kExact, int kCount>
__device__ __forceinline__ float (&sums_of(float (&total)[kCount], float (&part)[kCount]))
    [kCount] {
      if constexpr (kExact) {
        return total;
      } else {
        return part;
      }
    }

template <class T, int kTokens, bool kExact, bool kNested, int kGroupsRows, int kGroupsK>
__global__ void __launch_bounds__(WgmmaLayout<kTokens, kExact, kGroupsRows, kGroupsK>::kThreads, 1)
    few_rows_wgmma_kernel(const __grid_constant__ CUtensorMap map_w,
                          const __grid_constant__ CUtensorMap map_x, const FewRowsParams args,
                          const WgmmaPlan plan) {
  using Layout = WgmmaLayout<kTokens, kExact, kGroupsRows, kGroupsK>;
  constexpr int kSums = kTokens / 2, kGroups = Layout::kGroups;
  // Two warpgroups have registers to decode a block while the product of the one ahead runs; four
  // take turns.
  constexpr bool kAhead = kGroups == 2;
  extern __shared__ __align__(1024) char storage[];
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const std::uint32_t shared = shared_address(storage);
  const int blocks = args.k / kBlock, chunks = (blocks + 3) / 4;
  const auto tile_of = [&](int pass) {
    return (pass * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x)) * plan.rows;
  };

  Slots w(shared + Layout::kBarriers, Layout::kSlotsW);
  Slots x(shared + Layout::kBarriers + 16 * Layout::kSlotsW, Layout::kSlotsX);
  if (threadIdx.x == 0) {
    w.init(4 * kGroups);
    x.init(4 * kGroupsRows);
    fence_barriers();
  }
  __syncthreads();
  launch_next_grid();

  if (warp >= 4 * kGroups) {
    if constexpr (kAhead) {
      asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    } else {
      asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
    }
    if (warp == 4 * kGroups && lane == 0) {
      const std::uint64_t policy = evict_first();
      for (int pass = 0; pass < plan.passes; ++pass) {
        for (int chunk = 0; chunk < chunks; ++chunk, w.next()) {
          barrier_wait(w.empty_at(), w.phase ^ 1);
          barrier_expect(w.full_at(), plan.rows * kChunkRow);
          load_box(shared + Layout::kW + w.slot * Layout::kSlotW, &map_w, w.full_at(),
                   chunk * kChunkRow, tile_of(pass), policy);
        }
      }
    }
    if (warp == 4 * kGroups + 1 && lane == 0) {
      const std::uint64_t policy = evict_last();
      wait_for_grid_before();
      for (int pass = 0; pass < plan.passes; ++pass) {
        for (int block = 0; block < chunks * 4; ++block, x.next()) {
          barrier_wait(x.empty_at(), x.phase ^ 1);
          barrier_expect(x.full_at(), Layout::kSlotX);
          load_box3(shared + Layout::kX + x.slot * Layout::kSlotX, &map_x, x.full_at(), 0, block,
                    policy);
        }
      }
    }
    return;
  }
  if constexpr (kAhead) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 112;");
  }

  float* const map = reinterpret_cast<float*>(storage + Layout::kMap);
  float4* const scales = reinterpret_cast<float4*>(storage + Layout::kScales) + warp * 16;
  const int g = lane / 4, t = lane % 4;
  const int group_rows = warp / 4 % kGroupsRows, group_k = warp / 4 / kGroupsRows;
  const int warp_row = group_rows * 64 + warp % 4 * 16;  // in a tile
  RawScales<kNested> raw;
  const auto load_scales = [&](int tile, int chunk) {
    const int in_tile = warp_row + lane % 16, row = tile + in_tile;
    if (in_tile < plan.rows && row < args.n) load_chunk(raw, args, row, chunk * 4, blocks);
  };
  load_scales(tile_of(0), 0);
  if constexpr (kExact) {
    fill_exact_table(storage);
  } else {
    fill_table<T>(storage);
  }
  if constexpr (kNested) fill_map(map);
  const float offset = kNested ? __ldg(args.offset) : 0.0F;
  const auto meet = [] {
    asm volatile("bar.sync 1, %0;" ::"n"(kGroups * kGroupThreads) : "memory");
  };
  meet();

  const std::uint32_t lane_at = static_cast<std::uint32_t>(lane) * (kExact ? 8 : 4);
  const std::uint32_t select = 0x7704U | static_cast<std::uint32_t>(t) << 4;
  const float* const scale = reinterpret_cast<const float*>(scales + g);
  for (int i = 0; i < group_k; ++i) x.next();

  for (int pass = 0; pass < plan.passes; ++pass) {
    const int tile = tile_of(pass);
    float total[kSums];
    [[maybe_unused]] float part[kSums];
    Operand a[kAhead ? 2 : 1];
    if constexpr (!kExact) {
#pragma unroll
      for (float& sum : total) sum = 0;
    }
    const char* rows = nullptr;
    const auto open_chunk = [&](int chunk) {
      if (lane < 16) scales[lane] = raw.resolve(map, offset);
      if (chunk + 1 < chunks) {
        load_scales(tile, chunk + 1);
      } else if (pass + 1 < plan.passes) {
        load_scales(tile_of(pass + 1), 0);
      }
      __syncwarp();
      barrier_wait(w.full_at(), w.phase);
      rows = storage + Layout::kW + w.slot * Layout::kSlotW + (warp_row + g) * kChunkRow;
    };
    const auto close_chunk = [&] {
      __syncwarp();  // every lane has decoded its words
      if (lane == 0) barrier_arrive(w.empty_at());
      w.next();
    };
    const auto decode_block = [&](Operand& to, int block) {
      decode<T, kExact>(to, storage, rows, g, block, lane_at, select, scale[block],
                        scale[32 + block]);
    };
    float (&d)[kSums] = sums_of<kExact>(total, part);
    if constexpr (kAhead) {
      open_chunk(0);
      decode_block(a[0], group_k);
    }
    for (int chunk = 0; chunk < chunks; ++chunk) {
      if constexpr (!kAhead) open_chunk(chunk);
#pragma unroll
      for (int step = 0; step < 4 / kGroupsK; ++step) {
        const int block = step * kGroupsK + group_k;
        Operand& operand = a[kAhead ? step % 2 : 0];
        const float upper = scale[block], lower = scale[32 + block];
        if constexpr (!kAhead) decode_block(operand, block);
        barrier_wait(x.full_at(), x.phase);
        const std::uint64_t from = describe_x(shared + Layout::kX + x.slot * Layout::kSlotX);
        const bool fresh = !kExact || (chunk == 0 && step == 0);
        pin(d);
        cute::warpgroup_arrive();
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          Wgmma<T, kTokens>::start(operand + k * 4, from + k * 2, d, k > 0 || !fresh,
                                   std::make_index_sequence<kSums>{});
        }
        cute::warpgroup_commit_batch();
        const bool last = step + 1 == 4 / kGroupsK;
        if (last) close_chunk();
        if constexpr (kAhead) {
          if (!last) {
            decode_block(a[(step + 1) % 2], block + kGroupsK);
          } else if (chunk + 1 < chunks) {
            open_chunk(chunk + 1);
            decode_block(a[0], group_k);
          }
        }
        cute::warpgroup_wait<0>();
        pin(d);
        if constexpr (!kExact) {
#pragma unroll
          for (int j = 0; j < kSums; ++j) total[j] += (j % 4 < 2 ? upper : lower) * part[j];
        }
        if (lane == 0) barrier_arrive(x.empty_at());
        for (int i = 0; i < kGroupsK; ++i) x.next();
      }
    }
    if constexpr (kGroupsK > 1) {
      // The first group of k adds the second one's sums, a few at a time.
      float* const handed = reinterpret_cast<float*>(storage + Layout::kSums) +
                            group_rows * kGroupThreads + threadIdx.x % kGroupThreads;
      constexpr int kPitch = kGroupsRows * kGroupThreads;
#pragma unroll
      for (int from = 0; from < kSums; from += Layout::kHanded) {
        meet();
#pragma unroll
        for (int j = 0; j < Layout::kHanded; ++j) {
          if (group_k == 1) handed[j * kPitch] = total[from + j];
        }
        meet();
#pragma unroll
        for (int j = 0; j < Layout::kHanded; ++j) {
          if (group_k == 0) total[from + j] += handed[j * kPitch];
        }
      }
      if (group_k == 1) continue;
    }
    const int in_tile = warp_row + g, row = tile + in_tile;
    const bool first = in_tile < plan.rows && row < args.n;
    const bool second = in_tile + 8 < plan.rows && row + 8 < args.n;
    const T* bias = static_cast<const T*>(args.bias) + row;
    const float bias_first = first && args.bias != nullptr ? widen(bias[0]) : 0.0F;
    const float bias_second = second && args.bias != nullptr ? widen(bias[8]) : 0.0F;
    T* to = static_cast<T*>(args.y) + t * 2 * args.pitch_y + row;
#pragma unroll
    for (int j = 0; j < kSums; j += 2) {
      const int odd = j / 2 % 2, at = j / 4 * 4 + odd;  // sums of one token, rows g and g + 8
      const bool exists = j / 4 * 8 + t * 2 + odd < args.m;
      if (exists && first) narrow(total[at] + bias_first, to);
      if (exists && second) narrow(total[at + 2] + bias_second, to + 8);
      to += odd == 0 ? args.pitch_y : 7 * args.pitch_y;
    }
  }
}

}  // namespace pyfast::nf4::few
