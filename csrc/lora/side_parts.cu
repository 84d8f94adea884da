// SPDX-License-Identifier: Apache-2.0
// Adds up the sums that a GEMM has made of dB and dA side by side, in a fixed order.
#include "common/check.h"
#include "lora/skinny.cuh"

namespace pyfast::lora {
namespace {

constexpr int kColumns = 64, kThreads = 128;

// A block has 64 columns. A thread's sums lie as in narrow_wgmma.cuh: a warp has 16 columns, as
// store_cols wants them.
template <class T>
__global__ void __launch_bounds__(kThreads)
    side_parts_kernel(const __grid_constant__ SideSum first, const __grid_constant__ SideSum second,
                      int blocks_first) {
  skinny::launch_next_grid();  // it waits for the end of this one
  const bool is_first = static_cast<int>(blockIdx.x) < blocks_first;
  const SideSum& sum = is_first ? first : second;
  const int tile = static_cast<int>(blockIdx.x) - (is_first ? 0 : blocks_first);
  const std::int64_t stride = sum.width / kColumns * 2 * kThreads;  // float4 of one row's sums
  const auto* from = reinterpret_cast<const float4*>(sum.parts) + tile * 2 * kThreads + threadIdx.x;
  float q[2][4] = {};
#pragma unroll 8
  for (int row = 0; row < sum.rows; ++row) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float4 part = __ldcg(from + row * stride + i * kThreads);
      q[i][0] += part.x, q[i][1] += part.y, q[i][2] += part.z, q[i][3] += part.w;
    }
  }
  skinny::store_cols<T>(q, tile * kColumns + static_cast<int>(threadIdx.x) / 32 * 16, sum.columns,
                        {sum.out, 0, sum.rank, sum.accumulate}, sum.scale, sum.pitch, sum.dtype,
                        sum.by_rank);
}

}  // namespace

void launch_side_parts(const SideSum& first, const SideSum& second, DType dtype, void* stream) {
  const auto blocks = [](const SideSum& sum) {
    return sum.parts == nullptr ? 0 : (sum.columns + kColumns - 1) / kColumns;
  };
  const int all = blocks(first) + blocks(second);
  if (all == 0) return;
  // Not launched early: half of the blocks would crowd on the few SMs that the GEMM leaves free.
  auto* kernel =
      dtype == DType::bf16 ? &side_parts_kernel<__nv_bfloat16> : &side_parts_kernel<__half>;
  kernel<<<static_cast<unsigned>(all), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      first, second, blocks(first));
  CUDA_CHECK("lora_linear", cudaGetLastError());
}

}  // namespace pyfast::lora
