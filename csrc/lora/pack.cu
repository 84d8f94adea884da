// SPDX-License-Identifier: Apache-2.0
// Compute copies of the LoRA factors: a few hundred KiB, so that launches decide; all in one.
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

__global__ void __launch_bounds__(kThreads) pack_kernel(const __grid_constant__ Packs packs) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");  // they wait for the end of this grid
#endif
  const PackArgs& args = packs.args[blockIdx.y];
  const int rows = args.transpose ? args.cols : args.rows;
  const int cols = args.transpose ? args.rows : args.cols;
  const std::int64_t count = args.lines * args.pitch;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += step) {
    const std::int64_t line = i / args.pitch, at = i % args.pitch - args.before;
    float value = 0;
    if (line < rows && at >= 0 && at < cols) {
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

}  // namespace

void launch_pack(const Packs& packs, void* stream) {
  std::int64_t most = 0;
  for (int i = 0; i < packs.count; ++i) {
    most = std::max(most, packs.args[i].lines * packs.args[i].pitch);
  }
  if (most == 0) return;
  const auto blocks =
      static_cast<unsigned>(std::clamp<std::int64_t>(most / (kThreads * 4), 1, 512));
  pack_kernel<<<dim3(blocks, static_cast<unsigned>(packs.count)), kThreads, 0,
                static_cast<cudaStream_t>(stream)>>>(packs);
  CUDA_CHECK("lora_linear", cudaGetLastError());
}

}  // namespace pyfast::lora
