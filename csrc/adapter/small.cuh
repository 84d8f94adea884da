// SPDX-License-Identifier: Apache-2.0
// What is done with the adapter's parameters alone, ahead of the products and after them.
#pragma once

#include "adapter/tiles.cuh"

namespace pyfast::adapter {

// The sum, or the largest, over the block, in a fixed order; for all threads.
template <class Combine>
__device__ __forceinline__ float over_block(float value, const Combine& combine) {
  __shared__ float parts[kWarps];
  for (int step = 1; step < 32; step *= 2) {
    value = combine(value, __shfl_xor_sync(kAll, value, step));
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  value = parts[0];
  for (int i = 1; i < kWarps; ++i) value = combine(value, parts[i]);
  return value;
}

// A block has one rank.
template <class T>
__global__ void __launch_bounds__(kThreads)
    adapter_weigh_kernel(const __grid_constant__ WeighArgs args) {
  launch_next_grid();
  const int rank = static_cast<int>(blockIdx.x);
  const std::int64_t line = static_cast<std::int64_t>(rank) * args.cols;
  const auto add = [](float a, float b) { return a + b; };
  const auto product = [&](int col) {
    const float2 d = load_pair<T>(args.down, line + col), w = load_pair<T>(args.weight, col);
    return make_float2(d.x * w.x, d.y * w.y);
  };
  float sum = 0, offset = 0, largest = 0;
  for (int col = static_cast<int>(threadIdx.x) * 2; col < args.cols; col += kThreads * 2) {
    const float2 dw = product(col);
    sum += dw.x + dw.y;
    largest = fmaxf(largest, fmaxf(fabsf(dw.x), fabsf(dw.y)));
    if (args.bias != nullptr) {
      const float2 d = load_pair<T>(args.down, line + col), b = load_pair<T>(args.bias, col);
      offset = fmaf(d.x, b.x, fmaf(d.y, b.y, offset));
    }
  }
  largest = over_block(largest, [](float a, float b) { return fmaxf(a, b); });
  int exponent = 0;
  if (largest > 0 && largest < 1e38F) frexpf(largest, &exponent);
  exponent = min(max(exponent, -100), 100);
  const float scale = ldexpf(1.0F, -exponent);
  float weighted = 0;
  for (int col = static_cast<int>(threadIdx.x) * 2; col < args.cols; col += kThreads * 2) {
    const float2 dw = product(col);
    const std::uint32_t pair = pack_pair<T>(dw.x * scale, dw.y * scale);
    const float2 rounded = widen_pair<T>(pair);
    weighted += rounded.x + rounded.y;
    store_pair<T>(args.weighted, line + col, pair);
  }
  sum = over_block(sum, add);
  offset = over_block(offset, add);
  weighted = over_block(weighted, add);
  if (threadIdx.x == 0) {
    if (args.down_bias != nullptr) offset += widen(static_cast<const T*>(args.down_bias)[rank]);
    reinterpret_cast<float4*>(args.ranks)[rank] =
        make_float4(ldexpf(1.0F, exponent), weighted, offset, 0.0F);
    reinterpret_cast<float2*>(args.sums)[rank] = make_float2(sum, offset);
  }
}

constexpr int kSumCols = 16, kSumLines = kThreads / kSumCols;  // of ranks, at once

template <class T>
__device__ __forceinline__ float at_or(const void* vector, std::int64_t at, float without) {
  return vector == nullptr ? without : widen(static_cast<const T*>(vector)[at]);
}

// A block has kSumCols columns and all ranks. With P = dh^T xhat and s the sum of dh over rows,
// dD = P w + s b, dw = sum over ranks of D P, db = s D.
template <class T>
__global__ void __launch_bounds__(kThreads)
    adapter_sum_kernel(const __grid_constant__ SumArgs args) {
  __shared__ float products[kSumCols][kMostRank + 1];
  __shared__ float sums_dh[kMostRank];
  __shared__ float2 by_line[kSumLines][kSumCols];
  const int first = static_cast<int>(blockIdx.x) * kSumCols;
  const int cols = min(kSumCols, args.cols - first), rank = args.rank;
  const auto thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kSumCols, line = thread / kSumCols, col = first + lane;
  // What is needed of D comes while the grids ahead still run.
  T d[kMostRank / kSumLines];
  const bool sums_ranks = args.d_weight != nullptr || args.d_bias != nullptr;
#pragma unroll
  for (int i = 0; i < kMostRank / kSumLines; ++i) {
    const int r = i * kSumLines + line;
    const bool in = sums_ranks && lane < cols && r < rank;
    d[i] = in ? static_cast<const T*>(args.down)[static_cast<std::int64_t>(r) * args.cols + col]
              : T(0.0F);
  }
  wait_for_grid_before();
  launch_next_grid();
  const auto total = [&](const float* parts, std::int64_t at, std::int64_t step) {
    float sum = 0;
    for (int band = 0; band < args.bands; ++band) sum += parts[band * step + at];
    return sum;
  };
  if (args.dh_parts != nullptr && thread < rank) {
    const float sum = total(args.dh_parts, thread, rank);
    sums_dh[thread] = sum;
    if (args.d_down_bias != nullptr && blockIdx.x == 0) {
      narrow(sum, static_cast<T*>(args.d_down_bias) + thread);
    }
  }
  if (args.d_up_bias != nullptr && thread < cols) {
    narrow(total(args.dy_parts, first + thread, args.cols),
           static_cast<T*>(args.d_up_bias) + first + thread);
  }
  const std::int64_t begin = static_cast<std::int64_t>(first) * rank;
  const std::int64_t step = static_cast<std::int64_t>(args.cols) * rank;
  const auto add = [](float4& sum, const float* part) {
    const float4 its = *reinterpret_cast<const float4*>(part);
    sum.x += its.x, sum.y += its.y, sum.z += its.z, sum.w += its.w;
  };
  for (int i = thread * 4; i < cols * rank; i += kThreads * 4) {
    float4 up = make_float4(0, 0, 0, 0), down = up;
#pragma unroll 4
    for (int band = 0; band < args.bands; ++band) {
      const std::int64_t at = band * step + begin + i;
      if (args.up_parts != nullptr) add(up, args.up_parts + at);
      if (args.down_parts != nullptr) add(down, args.down_parts + at);
    }
    if (args.d_up != nullptr) {
      store_pair<T>(args.d_up, begin + i, pack_pair<T>(up.x, up.y));
      store_pair<T>(args.d_up, begin + i + 2, pack_pair<T>(up.z, up.w));
    }
    float* to = &products[i / rank][i % rank];
    to[0] = down.x, to[1] = down.y, to[2] = down.z, to[3] = down.w;
  }
  __syncthreads();
  float d_weight = 0, d_bias = 0;
  if (lane < cols) {
    const float w = at_or<T>(args.weight, col, 1.0F), b = at_or<T>(args.bias, col, 0.0F);
#pragma unroll
    for (int i = 0; i < kMostRank / kSumLines; ++i) {
      const int r = i * kSumLines + line;
      if (r >= rank) break;
      const std::int64_t at = static_cast<std::int64_t>(r) * args.cols + col;
      const float sum_dh = args.dh_parts == nullptr ? 0.0F : sums_dh[r];
      const float p = args.down_parts == nullptr ? 0.0F : products[lane][r];
      if (args.d_down != nullptr) {
        const float with_bias = args.bias == nullptr ? p * w : fmaf(p, w, sum_dh * b);
        narrow(with_bias, static_cast<T*>(args.d_down) + at);
      }
      d_weight = fmaf(widen(d[i]), p, d_weight);
      d_bias = fmaf(widen(d[i]), sum_dh, d_bias);
    }
  }
  by_line[line][lane] = make_float2(d_weight, d_bias);
  __syncthreads();
  if (thread >= cols) return;
  float2 sum = by_line[0][thread];
  for (int i = 1; i < kSumLines; ++i) sum.x += by_line[i][thread].x, sum.y += by_line[i][thread].y;
  if (args.d_weight != nullptr) narrow(sum.x, static_cast<T*>(args.d_weight) + first + thread);
  if (args.d_bias != nullptr) narrow(sum.y, static_cast<T*>(args.d_bias) + first + thread);
}

}  // namespace pyfast::adapter
