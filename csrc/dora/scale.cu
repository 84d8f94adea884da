// SPDX-License-Identifier: Apache-2.0
// A matrix times c, by rows or by columns, and dmagnitude. All bound by memory.
#include <cuda_runtime.h>

#include <algorithm>

#include "common/check.h"
#include "dora/columns.cuh"
#include "dora/kernels.h"

namespace pyfast::dora {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kUnroll = 4;

struct FactorB {
  Columns c;
  DType dtype;
  unsigned count, r;
  int blocks;  // the first of the grid
  const void* b;
  void* out;
};

// A few hundred KiB.
__device__ void scale_factor(const FactorB& args, unsigned block) {
  const unsigned first = block * (kThreads * kUnroll) + threadIdx.x;
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const unsigned at = first + u * kThreads;
    if (at < args.count) {
      store(load(args.b, args.dtype, at) * factor(args.c, at / args.r), args.out, args.dtype, at);
    }
  }
}

struct Matrix {
  const void* x;
  void* out;
  unsigned vectors;  // in all, and of a row
  unsigned width, pitch;
};

__global__ void __launch_bounds__(kThreads)
    scale_rows_kernel(const Matrix matrix, const Columns c, const FactorB b) {
  const int block = static_cast<int>(blockIdx.x) - b.blocks;
  if (block < 0) return scale_factor(b, blockIdx.x);
  const unsigned first = static_cast<unsigned>(block) * (kThreads * kUnroll) + threadIdx.x;
  Eight values[kUnroll];
  unsigned rows[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const unsigned at = first + u * kThreads;
    rows[u] = at / matrix.width;
    if (at < matrix.vectors) {
      const std::int64_t start = static_cast<std::int64_t>(rows[u]) * matrix.pitch;
      values[u] = load_eight(matrix.x, start + (at - rows[u] * matrix.width));
    }
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const unsigned at = first + u * kThreads;
    if (at < matrix.vectors) {
      const float value = factor(c, rows[u]);
      store_eight(scaled(values[u], [&](int) { return value; }), matrix.out, at);
    }
  }
}

// A warp has kTileColumns columns, eight a lane, of every kWarps-th row of a slice.
struct Tile {
  int column;  // of eight
  std::int64_t row, end;

  __device__ __forceinline__ Tile(std::int64_t rows, int width, int block) {
    column = block * 32 + static_cast<int>(threadIdx.x) % 32;
    const std::int64_t share = (rows + gridDim.y - 1) / gridDim.y, first = share * blockIdx.y;
    row = first + threadIdx.x / 32;
    end = column < width ? min(first + share, rows) : 0;
  }
};

__global__ void __launch_bounds__(kThreads)
    scale_columns_kernel(const Matrix matrix, std::int64_t rows, const Columns c, const FactorB b) {
  const int block = static_cast<int>(blockIdx.x) - b.blocks;
  if (block < 0) return scale_factor(b, blockIdx.x * gridDim.y + blockIdx.y);
  Tile tile(rows, static_cast<int>(matrix.width), block);
  if (tile.row >= tile.end) return;
  float factors[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) factors[i] = factor(c, tile.column * 8 + i);
  for (; tile.row < tile.end; tile.row += kWarps * kUnroll) {
    Eight values[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const std::int64_t row = tile.row + u * kWarps;
      if (row < tile.end) values[u] = load_eight(matrix.x, row * matrix.pitch + tile.column);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const std::int64_t row = tile.row + u * kWarps;
      if (row < tile.end) {
        store_eight(scaled(values[u], [&](int i) { return factors[i]; }), matrix.out,
                    row * matrix.width + tile.column);
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    factors_kernel(std::int64_t n, const Columns c, float* out) {
  const std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at < n) out[at] = factor(c, at);
}

struct SumsArgs {
  const void* dy;
  const void* y;
  void* scaled_dy;
  float* parts;
  std::int64_t m;
  unsigned width, pitch_dy;  // of eight elements
};

constexpr int kRowsAtOnce = 2;  // of dy and y; more do not fit the registers

template <bool kScaled>
__global__ void __launch_bounds__(kThreads, 4) sums_kernel(const SumsArgs args, const Columns c) {
  __shared__ float sums[kWarps][8][33];
  Tile tile(args.m, static_cast<int>(args.width), static_cast<int>(blockIdx.x));
  float factors[8];
  if (kScaled && tile.row < tile.end) {
#pragma unroll
    for (int i = 0; i < 8; ++i) factors[i] = factor(c, tile.column * 8 + i);
  }
  float sum[8] = {};
  for (; tile.row < tile.end; tile.row += kWarps * kRowsAtOnce) {
    Eight dy[kRowsAtOnce], y[kRowsAtOnce];
#pragma unroll
    for (int u = 0; u < kRowsAtOnce; ++u) {
      const std::int64_t row = tile.row + u * kWarps;
      if (row < tile.end) {
        dy[u] = load_eight(args.dy, row * args.pitch_dy + tile.column);
        y[u] = load_eight(args.y, row * args.width + tile.column);
      } else {
        dy[u] = y[u] = Eight{};
      }
    }
#pragma unroll
    for (int u = 0; u < kRowsAtOnce; ++u) {
      const std::int64_t row = tile.row + u * kWarps;
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[i] += widen(dy[u].values[i]) * widen(y[u].values[i]);
      if (kScaled && row < tile.end) {
        store_eight(scaled(dy[u], [&](int i) { return factors[i]; }), args.scaled_dy,
                    row * args.width + tile.column);
      }
    }
  }
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
  for (int i = 0; i < 8; ++i) sums[warp][i][lane] = sum[i];
  __syncthreads();
  // A thread has one of the tile's columns.
  const int mine = static_cast<int>(threadIdx.x) / 8, element = static_cast<int>(threadIdx.x) % 8;
  float total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total += sums[w][element][mine];
  const std::int64_t n = std::int64_t{8} * args.width;
  const std::int64_t column = static_cast<std::int64_t>(blockIdx.x) * kTileColumns + threadIdx.x;
  if (column < n) args.parts[blockIdx.y * n + column] = total;
}

struct FinishArgs {
  const float* parts;
  void* dmagnitude;
  void* db;
  DType factor_dtype;
  std::int64_t n;
  int r, slices;
};

// 32 columns a block.
__global__ void __launch_bounds__(kThreads) finish_kernel(const FinishArgs args, const Columns c) {
  __shared__ float sums[kWarps][32], factors[32];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * 32, column = first + lane;
  const bool inside = column < args.n;
  float sum = 0;
  if (args.dmagnitude != nullptr && inside) {
    for (int slice = warp; slice < args.slices; slice += kWarps) {
      sum += args.parts[slice * args.n + column];
    }
  }
  sums[warp][lane] = sum;
  if (warp == 0) factors[lane] = inside ? exact_factor(c, column) : 0.0F;
  __syncthreads();
  if (args.dmagnitude != nullptr && warp == 0 && inside) {
#pragma unroll
    for (int w = 1; w < kWarps; ++w) sum += sums[w][lane];
    store(sum / factor(c, column) / divisor(c, column), args.dmagnitude, c.dtype, column);
  }
  if (args.db == nullptr) return;
  const int rows = static_cast<int>(min(args.n - first, std::int64_t{32}));
  for (int i = static_cast<int>(threadIdx.x); i < rows * args.r; i += kThreads) {
    const std::int64_t at = first * args.r + i;
    store(load(args.db, args.factor_dtype, at) * factors[i / args.r], args.db, args.factor_dtype,
          at);
  }
}

unsigned blocks_for(std::int64_t count, std::int64_t each) {
  return static_cast<unsigned>((count + each - 1) / each);
}

}  // namespace

void launch_scale(const Scale& params, void* stream) {
  auto* on = static_cast<cudaStream_t>(stream);
  const std::int64_t width = params.columns / 8;
  const Matrix matrix{params.x, params.out, static_cast<unsigned>(params.rows * width),
                      static_cast<unsigned>(width), static_cast<unsigned>(params.pitch / 8)};
  const std::int64_t n = params.by_row ? params.rows : params.columns;
  FactorB b{params.c,
            params.factor_dtype,
            params.b == nullptr ? 0 : static_cast<unsigned>(n * params.r),
            static_cast<unsigned>(params.r),
            0,
            params.b,
            params.scaled_b};
  const unsigned ahead = blocks_for(b.count, kThreads * kUnroll);
  if (params.by_row) {
    b.blocks = static_cast<int>(ahead);
    const unsigned blocks = ahead + blocks_for(matrix.vectors, kThreads * kUnroll);
    scale_rows_kernel<<<blocks, kThreads, 0, on>>>(matrix, params.c, b);
  } else {
    // Two rounds of kUnroll rows for each warp.
    const unsigned slices = std::min(blocks_for(params.rows, 2 * kWarps * kUnroll), 65535U);
    b.blocks = static_cast<int>(blocks_for(ahead, slices));
    const dim3 grid(static_cast<unsigned>(b.blocks) + blocks_for(width, 32), slices);
    scale_columns_kernel<<<grid, kThreads, 0, on>>>(matrix, params.rows, params.c, b);
  }
  CUDA_CHECK("dora_linear", cudaGetLastError());
}

void launch_factors(std::int64_t n, const Columns& c, float* out, void* stream) {
  factors_kernel<<<blocks_for(n, kThreads), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(n, c,
                                                                                              out);
  CUDA_CHECK("dora_linear", cudaGetLastError());
}

void launch_sums(const Sums& params, std::int64_t slices, void* stream) {
  const SumsArgs args{params.dy,
                      params.y,
                      params.scaled_dy,
                      params.parts,
                      params.m,
                      static_cast<unsigned>(params.n / 8),
                      static_cast<unsigned>(params.pitch_dy / 8)};
  const dim3 grid(blocks_for(params.n, kTileColumns), static_cast<unsigned>(slices));
  auto* on = static_cast<cudaStream_t>(stream);
  if (params.scaled_dy == nullptr) {
    sums_kernel<false><<<grid, kThreads, 0, on>>>(args, params.c);
  } else {
    sums_kernel<true><<<grid, kThreads, 0, on>>>(args, params.c);
  }
  CUDA_CHECK("dora_linear_backward", cudaGetLastError());
}

void launch_finish(const Finish& params, std::int64_t slices, void* stream) {
  const FinishArgs args{params.parts,
                        params.dmagnitude,
                        params.db,
                        params.factor_dtype,
                        params.n,
                        static_cast<int>(params.r),
                        static_cast<int>(slices)};
  finish_kernel<<<blocks_for(params.n, 32), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      args, params.c);
  CUDA_CHECK("dora_linear_backward", cudaGetLastError());
}

}  // namespace pyfast::dora
