// SPDX-License-Identifier: Apache-2.0
// 17 to 256 rows of x, by wgmma with the weight as left operand in registers: D[row of W, token].
//
// A tile of W's rows is done by one block of threads, a warpgroup having 64 rows and all columns.
// Where that leaves most of the GPU idle, a cluster of two blocks has a tile of 64 rows, and each
// of its four warpgroups a quarter of the columns: then they trade sums. Further warps feed them:
// one copies the packed weight by TMA, one x (blocks of 64 columns), two work out scales.
//
// While products run, the other instructions of an SM come at a quarter of their rate, so their
// number a weight decides: weights are decoded two at a time by look-up, and the products of a
// block get its scales afterwards, which costs an FFMA a sum. With so many tokens that it would
// cost more than scaling the weights does, codes are looked up in fixed point and scaled in
// registers.
#pragma once

#include <cutlass/cutlass.h>

#include <algorithm>
#include <cute/arch/mma_sm90_desc.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <utility>

#include "nf4/few_rows_cluster.cuh"
#include "nf4/few_rows_decode.cuh"

namespace pyfast::nf4::few {

constexpr int kGroups = 2, kGroupThreads = 128, kGroupRows = 64;
constexpr int kTileRows = kGroups * kGroupRows;
static_assert(kConsumers == kGroups * kGroupThreads);
constexpr int kBlockRow = kBlock * 2;  // bytes of a row of x

// With so many tokens, scaling a weight costs less than scaling all sums.
constexpr bool scales_weights(int tokens) { return tokens > 128; }

struct WgmmaPlan {
  int rows;     // of a tile
  bool shared;  // by a cluster of two blocks
};

// What a block of threads does: tiles of `rows` rows of W, chunks [begin, end) of their columns.
struct WgmmaTask {
  int rows, first, turn, tiles, begin, end;

  __device__ __forceinline__ WgmmaTask(const FewRowsParams& args, const WgmmaPlan& plan)
      : rows(plan.rows),
        first(static_cast<int>(blockIdx.x) / (plan.shared ? 2 : 1)),
        turn(static_cast<int>(gridDim.x) / (plan.shared ? 2 : 1)) {
    tiles = (ceil_div(args.n, rows) - first + turn - 1) / turn;
    const int chunks = (args.k / kBlock + 3) / 4, rank = plan.shared ? cluster_rank() : 0;
    begin = plan.shared ? chunks * rank / 2 : 0;
    end = plan.shared ? chunks * (rank + 1) / 2 : chunks;
  }
  __device__ __forceinline__ int row(int tile) const { return (tile * turn + first) * rows; }
};

// The half of each row of the table that is free holds what is small.
template <int kTokens>
struct WgmmaLayout {
  static constexpr int kThreads = kConsumers + kGroupThreads;
  static constexpr int kSlotW = kTileRows * kChunkRow;
  // Few tokens take so short that waiting for every block by itself would show.
  static constexpr int kBlocksX = kTokens > 64 ? 1 : 2, kBlockX = kTokens * kBlockRow;
  static constexpr int kSlotX = kBlocksX * kBlockX;
  static constexpr int kRingW = kTokens > 64 ? 32768 : 65536;
  static constexpr int kSlotsW = kRingW / kSlotW;
  static constexpr int kW = kTableBytes;
  static constexpr int kX = kW + kSlotsW * kSlotW;
  // Warpgroups that take turns with slots must see every phase of theirs: an even number.
  static constexpr int kFitX = (kMostSharedBytes - kMapBytes - kX) / kSlotX / kGroups * kGroups;
  static constexpr int kSlotsX = std::min(kFitX, 12);
  static constexpr int kMap = kX + kSlotsX * kSlotX, kBytes = kMap + kMapBytes;
  // In the free halves of the table's rows: barriers, and the scales of a slot of W, four blocks of
  // eight rows in 128 bytes.
  static constexpr int kBarriers = 128, kScales = kBarriers + 4 * kTableRow;
  static constexpr int kSlotScales = kTileRows / 8 * kTableRow;
  static_assert(kScales + kSlotsW * kSlotScales <= kTableBytes + 128);
  static_assert(kSlotsX >= 4 && 16 * kSlotsW <= 128 && 8 * kSlotsX <= 128);
  // Where x was, sums are exchanged.
  static_assert(kTokens / 2 * kConsumers * 4 <= kSlotsX * kSlotX);
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
PYFAST_WGMMA(192)
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

// Accumulators are not to be moved from here on.
template <int kCount>
__device__ __forceinline__ void pin(float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(values[i])::"memory");
}

// Where products go: to the sums themselves, or to those of a block.
template <bool kScaled, int kSums>
__device__ __forceinline__ float (&sums_of(float (&total)[kSums], float (&part)[kSums])) [kSums] {
  if constexpr (kScaled) {
    return total;
  } else {
    return part;
  }
}

// Writes the scales of W's chunks beside the chunks, for the slots w of both: two warps.
template <class Layout, bool kNested, bool kFixed>
__device__ __forceinline__
    void feed_scales(const FewRowsParams& args, const WgmmaTask& task, char* storage, Slots w) {
  constexpr int kRows = kTileRows / 64;  // of a thread, 64 apart
  const int thread = static_cast<int>(threadIdx.x) - kConsumers - 64;
  float* const map = reinterpret_cast<float*>(storage + Layout::kMap);
  if constexpr (kNested) {
    for (int i = thread; i < 256; i += 64) map[i] = d_dynamic_map[i];
    asm volatile("bar.sync 2, 64;" ::: "memory");
  }
  const float offset = kNested ? __ldg(args.offset) : 0.0F;
  RawScales<kNested> raw[kRows];
  const int rows = task.rows;
  int tile = 0, chunk = task.begin;
  const auto load = [&]() __attribute__((always_inline)) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int in_tile = thread + i * 64, row = task.row(tile) + in_tile;
      if (in_tile < rows && row < args.n) {
        load_chunk(raw[i], args, row, chunk * 4, args.k / kBlock);
      }
    }
  };
  if (chunk == task.end) return;
  load();
  while (tile < task.tiles) {
    float4 values[kRows];
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      values[j] = raw[j].resolve(map, offset);
      if constexpr (kFixed) values[j] = fixed_scales(values[j]);
    }
    if (++chunk == task.end) chunk = task.begin, ++tile;
    if (tile < task.tiles) load();
    barrier_wait(w.empty_at(), w.phase ^ 1);
    char* const to = storage + Layout::kScales + w.slot * Layout::kSlotScales;
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const int row = thread + j * 64;
      *reinterpret_cast<float4*>(to + row / 8 * kTableRow + row % 8 * 16) = values[j];
    }
    barrier_arrive(w.full_at());
    w.next();
  }
}

// Adds the products of a warpgroup's 64 rows of W with every kTurns-th slot of x to `total`. Where
// weights are scaled, warps without rows have nothing to decode.
template <class T, int kTokens, int kTurns>
__device__ __forceinline__ void multiply(float (&total)[kTokens / 2], const char* storage,
                                         std::uint32_t shared, Slots& w, Slots& ring_x, int chunks,
                                         bool has_rows) {
  using Layout = WgmmaLayout<kTokens>;
  constexpr int kSums = kTokens / 2, kSteps = 4 / kTurns, kBlocksX = Layout::kBlocksX;
  // Scaled weights add up in place; else sums of a block wait for its scales, of two blocks at a
  // time where registers allow.
  constexpr bool kScaled = scales_weights(kTokens);
  constexpr int kBuffers = !kScaled && kTokens <= 64 ? 2 : 1;
  if (chunks == 0) return;
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const int g = lane / 4, turn = kTurns > 1 ? warp / 4 : 0;
  const int warp_row = (kTurns > 1 ? warp % 4 : warp) * 16;  // in a tile
  const std::uint32_t lane4 = static_cast<std::uint32_t>(lane) * 4;
  const std::uint32_t select = 0x7704U | static_cast<std::uint32_t>(lane % 4) << 4;
  Slots x = ring_x;
  x.full += 8 * turn, x.empty += 8 * turn;
  const std::uint32_t x_slots = shared + Layout::kX + turn * Layout::kSlotX;
  [[maybe_unused]] float parts[kBuffers][kSums];
  Operand a[2] = {};
  Words words = {};
  float scales[2][kSteps];  // of a chunk: rows g and g + 8
  float by[2][2];           // of steps, even or odd
  unsigned rows = 0;
  std::uint32_t used = 0;
  const auto block_of = [&](int step) __attribute__((always_inline)) {
    return (step / kBlocksX * kTurns + turn) * kBlocksX + step % kBlocksX;
  };
  const auto open_chunk = [&]() __attribute__((always_inline)) {
    barrier_wait(w.full_at(), w.phase);
    rows = Layout::kW + w.slot * Layout::kSlotW + (warp_row + g) * kChunkRow + g * 16;
    const char* from = storage + Layout::kScales + w.slot * Layout::kSlotScales +
                       warp_row / 8 * kTableRow + g * 16;
#pragma unroll
    for (int i = 0; i < 2; ++i, from += kTableRow) {
      if constexpr (kTurns == 1) {
        const float4 four = *reinterpret_cast<const float4*>(from);
        scales[i][0] = four.x, scales[i][1] = four.y, scales[i][2] = four.z, scales[i][3] = four.w;
      } else {
#pragma unroll
        for (int j = 0; j < kSteps; ++j) {
          scales[i][j] = reinterpret_cast<const float*>(from)[block_of(j)];
        }
      }
    }
  };
  const auto close_chunk = [&]() __attribute__((always_inline)) {
    barrier_arrive(w.empty_at());
    w.next();
  };
  const auto load = [&](int step) __attribute__((always_inline)) {
    if (!kScaled || has_rows) words.load(storage, rows, block_of(step));
  };
  const auto decode = [&](int step) __attribute__((always_inline)) {
    Operand& to = a[step % 2];
    by[step % 2][0] = scales[0][step], by[step % 2][1] = scales[1][step];
    if (kScaled && !has_rows) return;
    look_up(to, words, storage, lane4, select);
    if constexpr (kScaled) apply_scales<T>(to, by[step % 2][0], by[step % 2][1]);
  };
  const auto promote = [&](int step) __attribute__((always_inline)) {
    if constexpr (!kScaled) {
      float (&part)[kSums] = parts[step % kBuffers];
      pin(part);
#pragma unroll
      for (int j = 0; j < kSums; ++j) total[j] += by[step % 2][j % 4 / 2] * part[j];
    }
  };
  // Whoever has a slot alone arrives for all.
  const auto release = [&](std::uint32_t slot) __attribute__((always_inline)) {
    if (lane == 0) barrier_arrive<kTurns>(slot);
  };
  open_chunk();
  load(0);
  decode(0);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const bool more_chunks = chunk + 1 < chunks;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const bool last = step == kSteps - 1, more = !last || more_chunks;
      const int next = (step + 1) % kSteps, in_slot = step % kBlocksX;
      float (&d)[kSums] = sums_of<kScaled>(total, parts[step % kBuffers]);
      Operand& operand = a[step % 2];
      if (in_slot == 0) barrier_wait(x.full_at(), x.phase);
      const std::uint64_t from =
          describe_x(x_slots + x.slot * Layout::kSlotX + in_slot * Layout::kBlockX);
      pin(d);
      cute::warpgroup_arrive();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        Wgmma<T, kTokens>::start(operand + k * 4, from + k * 2, d, kScaled || k > 0,
                                 std::make_index_sequence<kSums>{});
      }
      cute::warpgroup_commit_batch();
      if (last) {
        close_chunk();
        if (more) open_chunk();
      }
      // Sums in flight are not to be read beyond the loop's end: ptxas would serialise products.
      const bool drained = !kScaled && (last || kBuffers == 1);
      if (more) load(next);
      if constexpr (kScaled || kBuffers == 2) {
        if (step > 0 || kScaled) {
          cute::warpgroup_wait<1>();
          if (step > 0) promote(step - 1);
          if (used != 0) release(used), used = 0;
        }
      }
      if (more) decode(next);
      if (drained) {
        cute::warpgroup_wait<0>();
        promote(step);
      }
      if (in_slot == kBlocksX - 1) {
        if (drained) {
          release(x.empty_at());
        } else {
          used = x.empty_at();
        }
        for (int i = 0; i < kTurns; ++i) x.next();
      }
    }
  }
  if constexpr (kScaled) {
    cute::warpgroup_wait<0>();
    pin(total);
    release(used);
  }
  ring_x.slot = x.slot, ring_x.phase = x.phase;
}

// Eight lines of eight 2-byte values, of which lane 4 g + t has those at 2 t of line g: the same of
// the columns.
__device__ __forceinline__ std::uint32_t transpose(std::uint32_t pair) {
  std::uint32_t turned;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(turned) : "r"(pair));
  return turned;
}

// Stores the first kCount sums of a warp, which has 16 rows from `row` on of tokens from `token`
// on, as far as rows are below `end`: four rows of a token at a time, 32 bytes side by side.
template <class T, int kCount, int kSums>
__device__ __forceinline__ void store(const FewRowsParams& args, const float (&total)[kSums],
                                      int row, int end, int token) {
  const int lane = static_cast<int>(threadIdx.x % 32), g = lane / 4, t = lane % 4;
  const bool odd = t % 2 == 1;
  const auto bias_of = [&](int at) __attribute__((always_inline)) {
    const bool exists = args.bias != nullptr && at < end;
    return exists ? widen(static_cast<const T*>(args.bias)[at]) : 0.0F;
  };
  const float bias[2] = {bias_of(row + g), bias_of(row + g + 8)};
  row += (odd ? 8 : 0) + t / 2 * 4;
  token += g;
  T* to = static_cast<T*>(args.y) + token * args.pitch_y + row;
  const bool whole = row + 4 <= end && args.pitch_y % 4 == 0 &&
                     reinterpret_cast<std::uintptr_t>(to) % sizeof(uint2) == 0;
#pragma unroll
  for (int j = 0; j < kCount; j += 4) {
    const std::uint32_t upper = transpose(pair_of<T>(total[j] + bias[0], total[j + 1] + bias[0]));
    const std::uint32_t lower =
        transpose(pair_of<T>(total[j + 2] + bias[1], total[j + 3] + bias[1]));
    // Of two lanes with rows 2 t and 2 t + 2, of either half, one gets the upper four.
    const std::uint32_t other = __shfl_xor_sync(~0U, odd ? upper : lower, 1);
    const uint2 four = odd ? make_uint2(other, lower) : make_uint2(upper, other);
    if (token < args.m) {
      if (whole) {
        *reinterpret_cast<uint2*>(to) = four;
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const std::uint32_t pair = i < 2 ? four.x : four.y;
          const auto value = static_cast<unsigned short>(i % 2 == 0 ? pair : pair >> 16);
          if (row + i < end) reinterpret_cast<unsigned short*>(to)[i] = value;
        }
      }
    }
    to += 8 * args.pitch_y;
    token += 8;
  }
}

template <class T, int kTokens, bool kNested>
__global__ void __launch_bounds__(WgmmaLayout<kTokens>::kThreads, 1)
    few_rows_wgmma_kernel(const __grid_constant__ CUtensorMap map_w,
                          const __grid_constant__ CUtensorMap map_x, const FewRowsParams args,
                          const WgmmaPlan plan) {
  using Layout = WgmmaLayout<kTokens>;
  constexpr int kSums = kTokens / 2;
  constexpr bool kScaled = scales_weights(kTokens);
  extern __shared__ __align__(1024) char storage[];
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const std::uint32_t shared = shared_address(storage);
  const WgmmaTask task(args, plan);

  Slots w(shared + Layout::kBarriers, Layout::kSlotsW);
  Slots x(shared + Layout::kBarriers + kTableRow, Layout::kSlotsX);
  x.empty = x.full + kTableRow;
  Exchange exchange(x.empty + kTableRow);
  if (threadIdx.x == 0) {
    prefetch_map(&map_w);
    prefetch_map(&map_x);
    w.init(kConsumers, 1 + 64);  // each thread that reads, or writes a scale, and TMA's
    x.init(4 * kGroups);
    exchange.init();
    fence_barriers();
  }
  if (plan.shared) {
    arrive_cluster();
    wait_cluster();
  } else {
    __syncthreads();
  }
  launch_next_grid();

  if (warp >= 4 * kGroups) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 72;");
    if (warp == 4 * kGroups && lane == 0) {
      const std::uint64_t policy = evict_first();
      for (int tile = 0; tile < task.tiles; ++tile) {
        for (int chunk = task.begin; chunk < task.end; ++chunk, w.next()) {
          barrier_wait(w.empty_at(), w.phase ^ 1);
          barrier_expect(w.full_at(), task.rows * kChunkRow);
          load_box(shared + Layout::kW + w.slot * Layout::kSlotW, &map_w, w.full_at(),
                   chunk * kChunkRow, task.row(tile), policy);
        }
      }
    }
    if (warp == 4 * kGroups + 1 && lane == 0) {
      const std::uint64_t policy = evict_last();
      wait_for_grid_before();
      for (int tile = 0; tile < task.tiles; ++tile) {
        if (plan.shared && tile > 0) exchange.wait_until_taken();
        for (int block = task.begin * 4; block < task.end * 4; x.next()) {
          barrier_wait(x.empty_at(), x.phase ^ 1);
          // The rest of a slot is the products of tokens that do not exist.
          barrier_expect(x.full_at(), Layout::kBlocksX * args.m * kBlockRow);
#pragma unroll
          for (int i = 0; i < Layout::kBlocksX; ++i, ++block) {
            load_box3(shared + Layout::kX + x.slot * Layout::kSlotX + i * Layout::kBlockX, &map_x,
                      x.full_at(), 0, block, policy);
          }
        }
      }
    }
    if (warp >= 4 * kGroups + 2) feed_scales<Layout, kNested, kScaled>(args, task, storage, w);
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 216;");
  if constexpr (kScaled) {
    fill_fixed_table(storage);
  } else {
    fill_table<T>(storage);
  }
  meet_consumers();

  const int group = warp / 4, chunks = task.end - task.begin;
  for (int tile = 0; tile < task.tiles; ++tile) {
    float total[kSums] = {};
    if (!plan.shared) {
      const int end = std::min(task.row(tile) + task.rows, args.n);
      multiply<T, kTokens, 1>(total, storage, shared, w, x, chunks, warp * 16 < task.rows);
      store<T, kSums>(args, total, task.row(tile) + warp * 16, end, 0);
    } else {
      const int mine = static_cast<int>(blockIdx.x) % 2 * 2 + group;
      multiply<T, kTokens, 2>(total, storage, shared, w, x, chunks, true);
      meet_consumers();  // no product reads x any more
      exchange.add_up(total, shared + Layout::kX, group, mine, tile + 1 == task.tiles);
      store<T, kSums / 4>(args, total, task.row(tile) + warp % 4 * 16, args.n, mine * kTokens / 4);
    }
  }
  // The other block may still read this one's sums.
  if (plan.shared) wait_cluster();
}

}  // namespace pyfast::nf4::few
