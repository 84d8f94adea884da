// SPDX-License-Identifier: Apache-2.0
// The backward of x * scale in one pass over dy and x. A block has 256 columns and a band of rows;
// a warp has every eighth row of it, a lane eight columns. The sums of warps, then of bands, are
// added up in order.
#include <cuda_runtime.h>

#include <algorithm>

#include "adapter/scale.h"
#include "common/check.h"
#include "common/launch.h"
#include "common/vec.cuh"

namespace pyfast::adapter {
namespace {

constexpr const char* kOp = "adapter_scale";
constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kLaneCols = 8, kSlabCols = 32 * kLaneCols;
constexpr int kRowsAtOnce = 4;  // of a warp
constexpr int kSumCols = 32;    // of a block that adds up

// The lane's columns of a row.
template <class T>
struct Eight {
  static constexpr int kCount = Pack16<T>::kCount, kPacks = kLaneCols / kCount;
  Pack16<T> packs[kPacks] = {};

  __device__ __forceinline__ void load(const T* from) {
#pragma unroll
    for (int p = 0; p < kPacks; ++p) packs[p] = reinterpret_cast<const Pack16<T>*>(from)[p];
  }
  __device__ __forceinline__ void store(T* to) const {
#pragma unroll
    for (int p = 0; p < kPacks; ++p) reinterpret_cast<Pack16<T>*>(to)[p] = packs[p];
  }
  __device__ __forceinline__ T& operator[](int i) { return packs[i / kCount].values[i % kCount]; }
};

template <class T, class S>
__global__ void __launch_bounds__(kThreads)
    adapter_scale_kernel(const __grid_constant__ ScaleArgs args, const int slabs,
                         const std::int64_t band_rows, float* const parts) {
  __shared__ float sums[kWarps][kSlabCols];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const std::int64_t band = blockIdx.x / slabs, begin = band * band_rows;
  const std::int64_t end = min(begin + band_rows, args.rows);
  const std::int64_t col =
      static_cast<std::int64_t>(blockIdx.x % slabs) * kSlabCols + lane * kLaneCols;
  const bool in = col < args.cols;
  const auto* dy = static_cast<const T*>(args.dy) + col;
  const auto* x = static_cast<const T*>(args.x) + col;
  float scale[kLaneCols] = {}, sum[kLaneCols] = {};
  if (in) {
#pragma unroll
    for (int i = 0; i < kLaneCols; ++i)
      scale[i] = widen(static_cast<const S*>(args.scale)[col + i]);
  }
  for (std::int64_t row = begin + warp; in && row < end; row += kWarps * kRowsAtOnce) {
    Eight<T> grads[kRowsAtOnce], inputs[kRowsAtOnce];
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      const std::int64_t at = row + i * kWarps;
      if (at >= end) continue;
      grads[i].load(dy + at * args.pitch_dy);
      if (parts != nullptr) inputs[i].load(x + at * args.pitch_x);
    }
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      const std::int64_t at = row + i * kWarps;
#pragma unroll
      for (int j = 0; j < kLaneCols; ++j) {
        const float grad = widen(grads[i][j]);
        sum[j] = fmaf(grad, widen(inputs[i][j]), sum[j]);
        narrow(__fmul_rn(grad, scale[j]), &grads[i][j]);
      }
      if (args.dx != nullptr && at < end) {
        grads[i].store(static_cast<T*>(args.dx) + at * args.cols + col);
      }
    }
  }
  if (parts == nullptr) return;
#pragma unroll
  for (int i = 0; i < kLaneCols; ++i) sums[warp][lane * kLaneCols + i] = sum[i];
  __syncthreads();
  const std::int64_t mine = static_cast<std::int64_t>(blockIdx.x % slabs) * kSlabCols + threadIdx.x;
  if (mine >= args.cols) return;
  float total = 0;
  for (const auto& of_warp : sums) total += of_warp[threadIdx.x];
  parts[band * args.cols + mine] = total;
}

template <class S>
__global__ void __launch_bounds__(kThreads)
    adapter_scale_sum_kernel(const float* parts, const int bands, const std::int64_t pitch,
                             const std::int64_t cols, S* out) {
  __shared__ float sums[kWarps][kSumCols];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const std::int64_t col = static_cast<std::int64_t>(blockIdx.x) * kSumCols + lane;
  float sum = 0;
  if (col < cols) {
#pragma unroll 8
    for (int band = warp; band < bands; band += kWarps) sum += parts[band * pitch + col];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || col >= cols) return;
  for (int i = 1; i < kWarps; ++i) sum += sums[i][lane];
  narrow(sum, out + col);
}

struct Cut {
  std::int64_t slabs, bands, rows;
};
Cut cut(std::int64_t rows, std::int64_t cols, int sm_count) {
  Cut cut{};
  cut.slabs = ceil_div(cols, kSlabCols);
  const std::int64_t step = kWarps * kRowsAtOnce;
  const std::int64_t bands = std::max<std::int64_t>(1, std::int64_t{sm_count} * 4 / cut.slabs);
  cut.rows = std::max(ceil_div(ceil_div(rows, bands), step) * step, step);
  cut.bands = ceil_div(rows, cut.rows);
  return cut;
}

}  // namespace

std::int64_t scale_workspace(std::int64_t rows, std::int64_t cols, int device) {
  return cut(rows, cols, cuda_device(device).sm_count).bands * cols * 4;
}

void launch_scale(const ScaleArgs& args, int sm_count, void* stream_handle) {
  auto* stream = static_cast<cudaStream_t>(stream_handle);
  const Cut grid = cut(args.rows, args.cols, sm_count);
  float* parts = args.d_scale == nullptr ? nullptr : args.parts;
  visit_cuda_dtype(args.scale_dtype, [&](auto scale_zero) {
    using S = decltype(scale_zero);
    visit_cuda_dtype(args.dtype, [&](auto zero) {
      using T = decltype(zero);
      adapter_scale_kernel<T, S>
          <<<static_cast<unsigned>(grid.slabs * grid.bands), kThreads, 0, stream>>>(
              args, static_cast<int>(grid.slabs), grid.rows, parts);
    });
  });
  CUDA_CHECK(kOp, cudaGetLastError());
  if (parts == nullptr) return;
  launch_scale_sum({.parts = parts,
                    .bands = static_cast<int>(grid.bands),
                    .pitch = args.cols,
                    .cols = args.cols,
                    .dtype = args.scale_dtype,
                    .out = args.d_scale},
                   stream_handle);
}

void launch_scale_sum(const ScaleSum& sum, void* stream) {
  visit_cuda_dtype(sum.dtype, [&](auto zero) {
    using S = decltype(zero);
    adapter_scale_sum_kernel<S><<<static_cast<unsigned>(ceil_div(sum.cols, kSumCols)), kThreads, 0,
                                  static_cast<cudaStream_t>(stream)>>>(
        sum.parts, sum.bands, sum.pitch, sum.cols, static_cast<S*>(sum.out));
  });
  CUDA_CHECK(kOp, cudaGetLastError());
}

}  // namespace pyfast::adapter
