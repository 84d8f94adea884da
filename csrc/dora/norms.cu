// SPDX-License-Identifier: Apache-2.0
// ||W + s B A|| of each row, reading W once. B A is made on the tensor cores in TF32: exact
// products for factors of half types; float32 ones are each split in two, so that about 22 bits of
// a product count.
#include <cuda_runtime.h>

#include "common/check.h"
#include "common/shared_memory.cuh"
#include "dora/columns.cuh"
#include "dora/kernels.h"

namespace pyfast::dora {
namespace {

// A block has 32 rows, in two tiles of the instruction's 16, and its warps 32 columns at a time.
constexpr int kWarps = 16, kThreads = kWarps * 32, kTiles = 2, kRows = 16 * kTiles, kColumns = 32;
constexpr int kStep = 8;  // ranks of an instruction
// 16 bytes of W that a thread has at a time.
template <class W>
constexpr int kUnitsOf = 2 * kTiles * 8 * static_cast<int>(sizeof(W)) / 16;

struct Args {
  const void* w;
  const void* a;
  const void* b;
  float* norms;
  std::int64_t pitch_w;
  float scale;
  int n, k, r;
};

__device__ __forceinline__ float to_tf32(float value) {
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return __uint_as_float(bits);
}

__device__ __forceinline__ void mma(float (&sums)[4], const float4& left, float low, float high) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(__float_as_uint(left.x)), "r"(__float_as_uint(left.y)), "r"(__float_as_uint(left.z)),
        "r"(__float_as_uint(left.w)), "r"(__float_as_uint(low)), "r"(__float_as_uint(high)));
}

// Neighbours of a row.
template <class T, int kCount>
struct alignas(kCount * sizeof(T) < 16 ? kCount * sizeof(T) : 16) Neighbours {
  T values[kCount];
};

// 16 bytes, or zeros; only this thread will read them.
__device__ __forceinline__ void fetch(uint4* to, const void* from, bool inside) {
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
               "r"(inside ? 16 : 0)
               : "memory");
}

// The rows of W that a thread has of its warp's columns, in flight without a register each: kStages
// times 32 or, of float32, 64 KiB.
template <class W>
struct Ahead {
  static constexpr int kStages = sizeof(W) == 2 ? 2 : 1;
  static constexpr int kUnits = kUnitsOf<W>, kBytes = kStages * kUnits * kThreads * 16;
  uint4* ring;
  const W* from;  // the thread's first row and column
  std::int64_t pitch;
  int column, end;  // in reach
  unsigned rows;    // a bit for each that there is
  int stage = 0;

  __device__ __forceinline__ Ahead(const Args& args, uint4* shared, int row, int first_column)
      : ring(shared + threadIdx.x),
        from(static_cast<const W*>(args.w) + row * args.pitch_w + first_column),
        pitch(8 * args.pitch_w),
        column(first_column),
        end(args.k),
        rows(0) {
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) rows |= row + i * 8 < args.n ? 1U << i : 0U;
#pragma unroll
    for (int i = 0; i < kStages; ++i) request();
  }

  __device__ __forceinline__ void request() {
    constexpr int kEach = kUnits / (2 * kTiles);
    uint4* to = ring + stage * kUnits * kThreads;
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      const bool inside = column < end && (rows >> i & 1U) != 0;
      const auto* source = reinterpret_cast<const uint4*>(inside ? from + i * pitch : from);
#pragma unroll
      for (int part = 0; part < kEach; ++part) {
        fetch(to + (i * kEach + part) * kThreads, source + (inside ? part : 0), inside);
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
    stage = (stage + 1) % kStages;
    column += kWarps * kColumns;
    if (column < end) from += kWarps * kColumns;
  }

  // Those of the next columns; others take their place.
  __device__ __forceinline__ void take(uint4 (&to)[kUnits]) {
    asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 1) : "memory");
    const uint4* source = ring + stage * kUnits * kThreads;
#pragma unroll
    for (int i = 0; i < kUnits; ++i) to[i] = source[i * kThreads];
    request();
  }
};

// B of the block's rows as the instruction wants it: [ranks / 8][tile][lane]; `low` is the rest of
// what was rounded.
template <bool kSplit, class T>
__device__ void place_factor(const Args& args, int first_row, int steps, float4* high,
                             float4* low) {
  const T* b = static_cast<const T*>(args.b);
  for (int i = static_cast<int>(threadIdx.x); i < steps * kTiles * 32; i += kThreads) {
    const int lane = i % 32, tile = i / 32 % kTiles, step = i / (32 * kTiles);
    float whole[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int row = first_row + tile * 16 + lane / 4 + e % 2 * 8;
      const int rank = step * kStep + lane % 4 + e / 2 * 4;
      const bool inside = row < args.n && rank < args.r;
      whole[e] = inside ? widen(b[static_cast<std::int64_t>(row) * args.r + rank]) : 0.0F;
    }
    if constexpr (kSplit) {
      float top[4], rest[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        top[e] = to_tf32(whole[e]);
        rest[e] = to_tf32(whole[e] - top[e]);
      }
      high[i] = make_float4(top[0], top[1], top[2], top[3]);
      low[i] = make_float4(rest[0], rest[1], rest[2], rest[3]);
    } else {
      high[i] = make_float4(whole[0], whole[1], whole[2], whole[3]);
    }
  }
}

// Lane q of four has columns 8 q to 8 q + 7 of W's 32: with tile j of the product's four it shares
// columns 8 q + j and 8 q + 4 + j, which the instruction counts as 2 q and 2 q + 1. So lane g of
// eight brings columns 4 g to 4 g + 3 of A, one to each tile.
template <class W, class T>
__global__ void __launch_bounds__(kThreads, 1) norms_kernel(const Args args) {
  constexpr bool kSplit = sizeof(T) == 4;
  constexpr int kUnits = kUnitsOf<W>, kStride = kWarps * kColumns;
  using Four = Neighbours<T, 4>;
  extern __shared__ uint4 shared[];
  __shared__ float parts[kWarps][kRows];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int group = lane / 4, quarter = lane % 4;
  const int first_row = static_cast<int>(blockIdx.x) * kRows, first_column = warp * kColumns;
  Ahead<W> ahead(args, shared, first_row + group, first_column + quarter * 8);

  const int steps = (args.r + kStep - 1) / kStep, size = steps * kTiles * 32;
  auto* placed = reinterpret_cast<float4*>(shared + Ahead<W>::kBytes / 16);
  place_factor<kSplit, T>(args, first_row, steps, placed, placed + size);
  const T* a =
      static_cast<const T*>(args.a) + static_cast<std::int64_t>(quarter) * args.k + group * 4;
  const auto load_a = [&](int column, int rank) {
    if (rank + quarter >= args.r || column + group * 4 >= args.k) return Four{};
    return *reinterpret_cast<const Four*>(a + static_cast<std::int64_t>(rank) * args.k + column);
  };
  Four next[2] = {load_a(first_column, 0), load_a(first_column, 4)};
  __syncthreads();

  float squares[2 * kTiles] = {};
  for (int column = first_column; column < args.k; column += kStride) {
    float sums[kTiles][4][4] = {};
    for (int step = 0; step < steps; ++step) {
      float top[2][4], rest[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float whole = widen(next[half].values[j]);
          top[half][j] = kSplit ? to_tf32(whole) : whole;
          rest[half][j] = kSplit ? to_tf32(whole - top[half][j]) : 0.0F;
        }
      }
      const bool last = step + 1 == steps;
      const int then = last ? column + kStride : column, rank = last ? 0 : (step + 1) * kStep;
      next[0] = load_a(then, rank);
      next[1] = load_a(then, rank + 4);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const int at = (step * kTiles + tile) * 32 + lane;
        const float4 high = placed[at];
        auto& to = sums[tile];
        if constexpr (kSplit) {
          const float4 low = placed[size + at];
#pragma unroll
          for (int j = 0; j < 4; ++j) mma(to[j], low, top[0][j], top[1][j]);
#pragma unroll
          for (int j = 0; j < 4; ++j) mma(to[j], high, rest[0][j], rest[1][j]);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) mma(to[j], high, top[0][j], top[1][j]);
      }
    }
    uint4 units[kUnits];
    ahead.take(units);
    const auto* mine = reinterpret_cast<const Neighbours<W, 8>*>(units);
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const float update = sums[i / 2][e % 4][i % 2 * 2 + e / 4];
        const float total = fmaf(args.scale, update, widen(mine[i].values[e]));
        squares[i] = fmaf(total, total, squares[i]);
      }
    }
  }

  asm volatile("cp.async.wait_all;" ::: "memory");
#pragma unroll
  for (int i = 0; i < 2 * kTiles; ++i) {
    squares[i] += __shfl_xor_sync(0xFFFFFFFFU, squares[i], 1);
    squares[i] += __shfl_xor_sync(0xFFFFFFFFU, squares[i], 2);
    if (quarter == 0) parts[warp][i * 8 + group] = squares[i];
  }
  __syncthreads();
  const int row = first_row + lane;
  if (warp == 0 && row < args.n) {
    float total = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) total += parts[i][lane];
    args.norms[row] = sqrtf(total);
  }
}

template <class W, class T>
void launch(const Args& args, void* stream) {
  constexpr int kStepBytes = 16 * 32 * kTiles * (sizeof(T) == 4 ? 2 : 1);
  // With a rank of 128 and `parts` it is just below the 99 KiB of the devices that have least.
  constexpr int kMost = Ahead<W>::kBytes + kStepBytes * (kMostRank / kStep);
  allow_shared_memory<norms_kernel<W, T>>("dora_norms", kMost);
  const int bytes = Ahead<W>::kBytes + kStepBytes * ((args.r + kStep - 1) / kStep);
  const auto blocks = static_cast<unsigned>((args.n + kRows - 1) / kRows);
  norms_kernel<W, T>
      <<<blocks, kThreads, static_cast<std::size_t>(bytes), static_cast<cudaStream_t>(stream)>>>(
          args);
  CUDA_CHECK("dora_norms", cudaGetLastError());
}

}  // namespace

void launch_norms(const Norms& params, void* stream) {
  const Args args{params.w,
                  params.a,
                  params.b,
                  params.norms,
                  params.pitch_w,
                  params.scale,
                  static_cast<int>(params.n),
                  static_cast<int>(params.k),
                  static_cast<int>(params.r)};
  visit_cuda_dtype(params.dtype, [&](auto weight) {
    visit_cuda_dtype(params.adapter_dtype, [&](auto factor) {
      launch<decltype(weight), decltype(factor)>(args, stream);
    });
  });
}

}  // namespace pyfast::dora
