// SPDX-License-Identifier: Apache-2.0
// The skinny products, bound by the one read of T. A block streams chunks of 64 rows x 128 columns
// through a ring of cp.async stages; rows of 256 bytes stream 5 % faster than rows of 128.
//
// The grid cuts T into slabs of columns times bands of rows. A slab's part of P and a band's part
// of Q are float32 partial sums; the last block to arrive adds them in a fixed order, so that
// results do not depend on timing.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "common/philox.h"
#include "common/vec.cuh"
#include "lora/kernels.h"

namespace pyfast::lora {

constexpr int kSkinnyThreads = 256;
constexpr int kSkinnyRows = 64;   // of a chunk
constexpr int kSkinnyCols = 128;  // of a chunk

// How the grid covers T: slabs of `slab_chunks` chunks in a row, bands of `band_blocks` in a
// column. A block of the rows product has one row of chunks, of the columns product one column.
struct SkinnyGrid {
  int slab_chunks = 1;
  int slabs = 1;
  int band_blocks = 1;
  int bands = 1;
};

namespace skinny {

__device__ const std::int64_t kNoSeed[2] = {0, 0};

// Programmatic dependent launch; before sm_90 grids follow one another anyway.
__device__ __forceinline__ void wait_for_grid_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void launch_next_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes to shared memory, of which `bytes` come from global memory and the rest are zero.
__device__ __forceinline__ void copy16(std::uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes));
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;"); }
template <int kPending>
__device__ __forceinline__ void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 2-byte elements; each lane names one row of 16 bytes.
template <bool kTranspose>
__device__ __forceinline__ void load_matrices(std::uint32_t (&out)[4], std::uint32_t row) {
  if constexpr (kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(row)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(row)
                 : "memory");
  }
}

template <class T>
__device__ __forceinline__ void multiply(float (&c)[4], const std::uint32_t (&a)[4],
                                         std::uint32_t b0, std::uint32_t b1) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// A [kTileRows, kUnits * 8] tile of 2-byte elements in 16-byte units, permuted so that eight rows
// of one column of units lie in eight different groups of banks.
template <int kTileRows, int kUnits>
struct Tile {
  static constexpr int kRowBytes = kUnits * 16, kBytes = kTileRows * kRowBytes;
  static constexpr int kPerLine = kUnits >= 8 ? 1 : 8 / kUnits;  // rows in 128 bytes
  static constexpr int kMask = kUnits >= 8 ? 7 : kUnits - 1;
  static __device__ __forceinline__ std::uint32_t offset(int row, int unit) {
    return static_cast<std::uint32_t>((row * kUnits + (unit ^ (row / kPerLine & kMask))) * 16);
  }
  // Copies the tile whose corner is source[row][8 unit]; outside [rows, cols] it is zero.
  static __device__ __forceinline__ void load(std::uint32_t tile, const char* source,
                                              std::int64_t pitch, int row, int col, int rows,
                                              int cols) {
#pragma unroll
    for (int i = threadIdx.x; i < kTileRows * kUnits; i += kSkinnyThreads) {
      const int r = i / kUnits, unit = i % kUnits;
      const int at_row = row + r, at_col = col + unit * 8;
      const int left = at_row < rows ? min(max(cols - at_col, 0), 8) : 0;
      const char* from = left > 0 ? source + (at_row * pitch + at_col) * 2 : source;
      copy16(tile + offset(r, unit), from, left * 2);
    }
  }
};

constexpr int kUnitsT = kSkinnyCols / 8;

// Two neighbours of a unit: ones in the halves whose bit is set in the top bits of bytes 2 * pair
// and 2 * pair + 1.
__device__ __forceinline__ std::uint32_t kept_halves(std::uint32_t bits, int pair) {
  std::uint32_t halves;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(halves) : "r"(bits), "r"(0x9988 + pair * 0x2222));
  return halves;
}

// Clears what dropout drops in the 16-byte units that this thread itself copied. A word of the mask
// covers four of them, those of four lanes; each lane draws one word, and they trade. The scale of
// what is kept is applied to the sums.
template <class TileT>
__device__ __forceinline__ void drop(std::uint32_t tile, int row, int col, const MaskLevel& level,
                                     const MaskSeed& seed) {
  static_assert(kSkinnyRows * kSkinnyCols == kSkinnyThreads * kMaskColumns);
  constexpr int kRowsAtOnce = kSkinnyThreads / kUnitsT, kWords = kSkinnyCols / kMaskColumns;
  const int lane = threadIdx.x % 32;
  const int its_row = lane / 8 * kRowsAtOnce + threadIdx.x / 32 * 2 + lane % 8 / kWords;
  const std::uint32_t drawn =
      keep_word(seed, static_cast<std::uint32_t>(row + its_row),
                static_cast<std::uint32_t>(col / kMaskColumns + lane % kWords), level);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const std::uint32_t word = __shfl_sync(0xFFFFFFFF, drawn, i * 8 + lane / 4);
    const std::uint32_t bits = word >> lane % 4 * 8;
    // The bits of four elements each, spread to the top bits of bytes.
    const std::uint32_t low = (bits & 0x0FU) * 0x10204080U, high = (bits & 0xF0U) * 0x01020408U;
    const std::uint32_t at =
        tile + TileT::offset(i * kRowsAtOnce + threadIdx.x / kUnitsT, threadIdx.x % kUnitsT);
    std::uint32_t pairs[4];
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(pairs[0]), "=r"(pairs[1]), "=r"(pairs[2]), "=r"(pairs[3])
                 : "r"(at)
                 : "memory");
#pragma unroll
    for (int j = 0; j < 4; ++j) pairs[j] &= kept_halves(j < 2 ? low : high, j % 2);
    asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(at), "r"(pairs[0]), "r"(pairs[1]),
                 "r"(pairs[2]), "r"(pairs[3])
                 : "memory");
  }
}

// Adds up `parts` partial sums of one block's registers. Every block stores its own, and the last
// to arrive at the counter reads all of them in order; true for that block, whose registers then
// hold the sum. Layout: [part][register / 4][thread][4].
template <int kCount>
__device__ __forceinline__ bool reduce(float (&values)[kCount], int part, int parts,
                                       float* partials, unsigned* counter) {
  if (parts == 1) return true;
  constexpr int kStep = kSkinnyThreads * 4;
  float* mine = partials + static_cast<std::int64_t>(part) * kCount * kSkinnyThreads;
#pragma unroll
  for (int i = 0; i < kCount / 4; ++i) {
    __stcg(reinterpret_cast<float4*>(mine + i * kStep) + threadIdx.x,
           make_float4(values[4 * i], values[4 * i + 1], values[4 * i + 2], values[4 * i + 3]));
  }
  __threadfence();
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(counter, 1U) == static_cast<unsigned>(parts - 1);
    if (last) *counter = 0;
  }
  __syncthreads();
  if (!last) return false;
  __threadfence();
#pragma unroll
  for (int i = 0; i < kCount / 4; ++i) {
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 8
    for (int other = 0; other < parts; ++other) {
      const float* source = partials + static_cast<std::int64_t>(other) * kCount * kSkinnyThreads;
      const float4 add = __ldcg(reinterpret_cast<const float4*>(source + i * kStep) + threadIdx.x);
      sum.x += add.x, sum.y += add.y, sum.z += add.z, sum.w += add.w;
    }
    values[4 * i] = sum.x, values[4 * i + 1] = sum.y;
    values[4 * i + 2] = sum.z, values[4 * i + 3] = sum.w;
  }
  return true;
}

// The ring of stages: keeps the copies of the next chunks in flight while one is used.
template <int kStages>
struct Ring {
  int stage = 0, next = 0;
  __device__ __forceinline__ int fill() {
    const int filled = next;
    next = next + 1 == kStages ? 0 : next + 1;
    return filled;
  }
  __device__ __forceinline__ int take() {
    const int taken = stage;
    stage = stage + 1 == kStages ? 0 : stage + 1;
    return taken;
  }
};

// The right operand of 16 ranks a step of 16: [pair of tiles of 8 ranks][step].
template <int kTiles, int kSteps>
struct Factors {
  std::uint32_t words[kTiles / 2][kSteps][4];
};

constexpr int kRowSteps = kSkinnyCols / 16;  // of P's contraction in a chunk
constexpr int kColSteps = kSkinnyRows / 16;  // of Q's

// U for one of the parts into which the columns of a chunk are cut, from a tile of 8 ranks on.
template <class TileU, bool kByRank, int kTiles, int kSteps>
__device__ __forceinline__ void load_u(Factors<kTiles, kSteps>& u, std::uint32_t tile, int part,
                                       int first = 0) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < kTiles; n += 2) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int k = part * kSteps + step;
      if constexpr (kByRank) {
        load_matrices<false>(
            u.words[n / 2][step],
            tile + TileU::offset((first + n) * 8 + lane % 8 + lane / 16 * 8, k * 2 + lane / 8 % 2));
      } else {
        load_matrices<true>(u.words[n / 2][step],
                            tile + TileU::offset(k * 16 + lane % 16, first + n + lane / 16));
      }
    }
  }
}

template <class TileV, int kTiles>
__device__ __forceinline__ void load_v(Factors<kTiles, kColSteps>& v, std::uint32_t tile,
                                       int first = 0) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < kTiles; n += 2) {
#pragma unroll
    for (int k = 0; k < kColSteps; ++k) {
      load_matrices<true>(v.words[n / 2][k],
                          tile + TileV::offset(k * 16 + lane % 16, first + n + lane / 16));
    }
  }
}

// Adds a b to the sums of the tiles of ranks from `first` on.
template <class T, int kAll, int kTiles, int kSteps>
__device__ __forceinline__ void multiply_all(float (&sums)[kAll][4],
                                             const std::uint32_t (&a)[kSteps][4],
                                             const Factors<kTiles, kSteps>& b, int first = 0) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const std::uint32_t (&pair)[4] = b.words[n / 2][step];
      multiply<T>(sums[first + n], a[step], pair[n % 2 * 2], pair[n % 2 * 2 + 1]);
    }
  }
}

// T as the left operand of P: 16 rows, one part of the columns of a chunk.
template <class TileT, int kSteps>
__device__ __forceinline__ void load_rows(std::uint32_t (&a)[kSteps][4], std::uint32_t tile,
                                          int rows, int part) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int k = part * kSteps + step;
    load_matrices<false>(a[step], tile + TileT::offset(rows * 16 + lane % 16, k * 2 + lane / 16));
  }
}

// T as the left operand of Q: 16 columns, all rows of a chunk.
template <class TileT>
__device__ __forceinline__ void load_cols(std::uint32_t (&a)[kColSteps][4], std::uint32_t tile,
                                          int columns) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < kColSteps; ++k) {
    load_matrices<true>(
        a[k], tile + TileT::offset(k * 16 + lane / 16 * 8 + lane % 8, columns * 2 + lane / 8 % 2));
  }
}

// Stores the columns product's sums for the 16 columns from `col` on.
template <class T, int kTiles>
__device__ __forceinline__ void store_cols(const float (&q)[kTiles][4], int col, int cols,
                                           const SkinnyArgs::Part& part, float scale,
                                           std::int64_t pitch, DType dtype, bool by_rank) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kTiles * 4; ++i) {
    const int at_col = col + lane / 4 + i % 4 / 2 * 8;
    const int rank = i / 4 * 8 + lane % 4 * 2 + i % 2 - part.first;
    if (at_col < cols && rank >= 0 && rank < part.ranks) {
      const std::int64_t at = by_rank ? rank * pitch + at_col : at_col * pitch + rank;
      const float value = q[i / 4][i % 4] * scale;
      if (dtype == DType::f32) {
        float* to = static_cast<float*>(part.q) + at;
        *to = part.accumulate ? *to + value : value;
      } else {
        T* to = static_cast<T*>(part.q) + at;
        narrow(part.accumulate ? static_cast<float>(*to) + value : value, to);
      }
    }
  }
}

__device__ __forceinline__ void begin(Order order) {
  if (order == Order::kAfter) wait_for_grid_before();
  launch_next_grid();  // it waits for the end of this grid before it reads the result
}
// A grid that began before the one ahead of it had ended must end after it: whoever waits for this
// one relies on both. One block waits; the others make room for those to come.
__device__ __forceinline__ void end(Order order) {
  if (order == Order::kBeside && blockIdx.x == gridDim.x - 1) wait_for_grid_before();
}

}  // namespace skinny

// P[rows, rank] = scale D(T) U. A block has 64 rows and a slab of columns; of a chunk a warp has 16
// rows and half of the columns.
template <class T, int kRank, bool kByRank, bool kDrop, int kStages>
__global__ void __launch_bounds__(kSkinnyThreads, 2)
    skinny_rows_kernel(const SkinnyArgs args, const SkinnyGrid grid, const Order order) {
  using namespace skinny;
  using TileT = Tile<kSkinnyRows, kUnitsT>;
  using TileU = std::conditional_t<kByRank, Tile<kRank, kUnitsT>, Tile<kSkinnyCols, kRank / 8>>;
  constexpr int kStage = TileT::kBytes + TileU::kBytes;
  constexpr int kTiles = kRank / 8;  // of 8 ranks
  extern __shared__ __align__(128) char storage[];
  begin(order);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int slab = blockIdx.x % grid.slabs, block = blockIdx.x / grid.slabs;
  const int row = block * kSkinnyRows;
  const int first = slab * grid.slab_chunks;
  const int chunks = min(grid.slab_chunks, (args.cols + kSkinnyCols - 1) / kSkinnyCols - first);
  const std::uint32_t shared = shared_address(storage);
  Ring<kStages> ring;
  int issued = 0;
  const auto issue = [&] {
    if (issued < chunks) {
      const int col = (first + issued) * kSkinnyCols;
      const std::uint32_t stage = shared + ring.fill() * kStage;
      const char* u = static_cast<const char*>(args.u);
      TileT::load(stage, static_cast<const char*>(args.t), args.pitch_t, row, col, args.rows,
                  args.cols);
      if constexpr (kByRank) {
        TileU::load(stage + TileT::kBytes, u, args.pitch_u, 0, col, args.rank, args.cols);
      } else {
        TileU::load(stage + TileT::kBytes, u, args.pitch_u, col, 0, args.cols, args.rank);
      }
      ++issued;
    }
    commit();
  };
  const MaskSeed seed(kDrop ? args.seed : kNoSeed);
  const MaskLevel level(args.threshold);
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) issue();

  float p[kTiles][4] = {};
  const int half = warp / 4;  // of the columns
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const std::uint32_t tile_t = shared + ring.take() * kStage, tile_u = tile_t + TileT::kBytes;
    wait<kStages - 2>();
    if constexpr (kDrop) drop<TileT>(tile_t, row, (first + chunk) * kSkinnyCols, level, seed);
    __syncthreads();
    issue();
    std::uint32_t a[kRowSteps / 2][4];
    load_rows<TileT>(a, tile_t, warp % 4, half);
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      Factors<2, kRowSteps / 2> u;
      load_u<TileU, kByRank>(u, tile_u, half, n);
      multiply_all<T>(p, a, u, n);
    }
  }

  // The halves of the columns meet: each warp gives the other half's ranks away and keeps its own.
  wait<0>();
  __syncthreads();
  float4* meet = reinterpret_cast<float4*>(storage) + warp % 4 * kTiles * 32 + lane;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    if (n / (kTiles / 2) != half) meet[n * 32] = make_float4(p[n][0], p[n][1], p[n][2], p[n][3]);
  }
  __syncthreads();
  float sums[kTiles / 2 * 4];
#pragma unroll
  for (int n = 0; n < kTiles / 2; ++n) {
    const float4 other = meet[(half * (kTiles / 2) + n) * 32];
    const float (&low)[4] = p[n];
    const float (&high)[4] = p[kTiles / 2 + n];
    sums[4 * n] = (half == 0 ? low[0] : high[0]) + other.x;
    sums[4 * n + 1] = (half == 0 ? low[1] : high[1]) + other.y;
    sums[4 * n + 2] = (half == 0 ? low[2] : high[2]) + other.z;
    sums[4 * n + 3] = (half == 0 ? low[3] : high[3]) + other.w;
  }
  float* partials = args.partials +
                    static_cast<std::int64_t>(block) * grid.slabs * kTiles / 2 * 4 * kSkinnyThreads;
  if (reduce(sums, slab, grid.slabs, partials, args.counters + block)) {
#pragma unroll
    for (int i = 0; i < kTiles / 2 * 2; ++i) {
      const int at_row = row + warp % 4 * 16 + lane / 4 + i % 2 * 8;
      const int at_col = (half * (kTiles / 2) + i / 2) * 8 + lane % 4 * 2;
      if (at_row < args.rows && at_col < (args.rank + 7) / 8 * 8) {
        narrow_pair(sums[2 * i] * args.scale, sums[2 * i + 1] * args.scale,
                    static_cast<T*>(args.p) + at_row * args.pitch_p + at_col);
      }
    }
  }
  end(order);
}

// One product of a launch, and how its blocks follow the grid before.
struct SkinnyJob {
  SkinnyArgs args;
  SkinnyGrid grid;
  Order order = Order::kAlone;
};

// Q[cols, rank] = scale D(T)^T V, for one or two products: the first blocks make `first`. A block
// has 128 columns and a band of rows; a warp has 16 of the columns.
template <class T, int kRank, bool kDrop, int kStages>
__global__ void __launch_bounds__(kSkinnyThreads, 2)
    skinny_cols_kernel(const __grid_constant__ SkinnyJob first_job,
                       const __grid_constant__ SkinnyJob second_job) {
  using namespace skinny;
  using TileT = Tile<kSkinnyRows, kUnitsT>;
  using TileV = Tile<kSkinnyRows, kRank / 8>;
  constexpr int kStage = TileT::kBytes + TileV::kBytes;
  constexpr int kTiles = kRank / 8;  // of 8 ranks
  extern __shared__ __align__(128) char storage[];
  const int blocks_first = first_job.grid.slabs * first_job.grid.bands;
  const bool is_first = static_cast<int>(blockIdx.x) < blocks_first;
  const SkinnyArgs args = is_first ? first_job.args : second_job.args;
  const SkinnyGrid grid = is_first ? first_job.grid : second_job.grid;
  const Order order = is_first ? first_job.order : second_job.order;
  const int job_block = static_cast<int>(blockIdx.x) - (is_first ? 0 : blocks_first);
  begin(order);

  const int warp = threadIdx.x / 32;
  const int slab = job_block % grid.slabs, band = job_block / grid.slabs;
  const int col = slab * kSkinnyCols;
  const int first = band * grid.band_blocks;
  const int blocks = min(grid.band_blocks, (args.rows + kSkinnyRows - 1) / kSkinnyRows - first);
  const std::uint32_t shared = shared_address(storage);
  Ring<kStages> ring;
  int issued = 0;
  const auto issue = [&] {
    if (issued < blocks) {
      const int row = (first + issued) * kSkinnyRows;
      const std::uint32_t stage = shared + ring.fill() * kStage;
      TileT::load(stage, static_cast<const char*>(args.t), args.pitch_t, row, col, args.rows,
                  args.cols);
      TileV::load(stage + TileT::kBytes, static_cast<const char*>(args.v), args.pitch_v, row, 0,
                  args.rows, args.rank);
      ++issued;
    }
    commit();
  };
  // With dropout there is one product.
  const MaskSeed seed(kDrop ? first_job.args.seed : kNoSeed);
  const MaskLevel level(first_job.args.threshold);
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) issue();

  float q[kTiles][4] = {};
  for (int block = 0; block < blocks; ++block) {
    const std::uint32_t tile_t = shared + ring.take() * kStage, tile_v = tile_t + TileT::kBytes;
    wait<kStages - 2>();
    if constexpr (kDrop) drop<TileT>(tile_t, (first + block) * kSkinnyRows, col, level, seed);
    __syncthreads();
    issue();
    std::uint32_t a[kColSteps][4];
    load_cols<TileT>(a, tile_t, warp);
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      Factors<2, kColSteps> v;
      load_v<TileV>(v, tile_v, n);
      multiply_all<T>(q, a, v, n);
    }
  }

  float (&sums)[kTiles * 4] = reinterpret_cast<float (&)[kTiles * 4]>(q);
  float* partials =
      args.partials + static_cast<std::int64_t>(slab) * grid.bands * kTiles * 4 * kSkinnyThreads;
  if (reduce(sums, band, grid.bands, partials, args.counters + slab)) {
    const SkinnyArgs& out = is_first ? first_job.args : second_job.args;
    for (int i = 0; i < max(out.part_count, 1); ++i) {
      const auto part =
          out.part_count > 0 ? out.parts[i] : SkinnyArgs::Part{out.q, 0, out.rank, out.accumulate};
      store_cols<T>(q, col + warp * 16, out.cols, part, out.scale, out.pitch_q, out.dtype_q,
                    out.q_by_rank);
    }
  }
  end(order);
}

}  // namespace pyfast::lora
