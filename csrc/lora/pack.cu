// SPDX-License-Identifier: Apache-2.0
// Compute copies of the LoRA factors: a few hundred KiB, so that launches decide; both in one.
#include <cuda_runtime.h>

#include <algorithm>

#include "common/check.h"
#include "common/vec.cuh"
#include "lora/kernels.h"

namespace pyfast::lora {
namespace {

constexpr int kThreads = 256;

__device__ float load(const void* from, DType dtype, std::int64_t at) {
  switch (dtype) {
    case DType::f32:
      return static_cast<const float*>(from)[at];
    case DType::f16:
      return widen(static_cast<const __half*>(from)[at]);
    default:
      return widen(static_cast<const __nv_bfloat16*>(from)[at]);
  }
}

__device__ void pack(const PackArgs& args) {
  const std::int64_t lines = args.transpose ? args.cols : args.rows;
  const int filled = args.transpose ? args.rows : args.cols;
  const std::int64_t count = lines * args.pitch;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += step) {
    const std::int64_t line = i / args.pitch, at = i % args.pitch;
    float value = 0;
    if (at < filled) {
      value = load(args.from, args.from_dtype,
                   args.transpose ? at * args.cols + line : line * args.cols + at);
    }
    if (args.to_dtype == DType::f16) {
      narrow(value, static_cast<__half*>(args.to) + i);
    } else {
      narrow(value, static_cast<__nv_bfloat16*>(args.to) + i);
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    pack_kernel(const PackArgs first, const PackArgs second) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");  // they wait for the end of this grid
#endif
  pack(blockIdx.y == 0 ? first : second);
}

}  // namespace

void launch_pack(const PackArgs& first, const PackArgs& second, void* stream) {
  const auto count = [](const PackArgs& args) {
    return (args.transpose ? args.cols : args.rows) * args.pitch;
  };
  const std::int64_t most = std::max(count(first), count(second));
  if (most == 0) return;
  const auto blocks =
      static_cast<unsigned>(std::clamp<std::int64_t>(most / (kThreads * 4), 1, 512));
  pack_kernel<<<dim3(blocks, second.from == nullptr ? 1 : 2), kThreads, 0,
                static_cast<cudaStream_t>(stream)>>>(first, second);
  CUDA_CHECK("lora_linear", cudaGetLastError());
}

}  // namespace pyfast::lora
