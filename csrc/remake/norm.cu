// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime.h>

#include "common/check.h"
#include "common/launch.h"
#include "common/vec.cuh"
#include "remake/norm.h"

namespace pyfast::remake {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads) norm_kernel(const Norm args) {
  using Pack = Pack16<T>;
  const int per_row = static_cast<int>(args.cols / Pack::kCount);
  const int row = static_cast<int>(blockIdx.x),
            at = static_cast<int>(blockIdx.y) * kThreads + threadIdx.x;
  if (at >= per_row) return;
  const std::int64_t here = static_cast<std::int64_t>(row) * per_row + at;
  const Pack x = static_cast<const Pack*>(args.x)[here];
  const Pack weight = static_cast<const Pack*>(args.weight)[at];
  const float inverse = args.inverse[row];
  Pack y;
#pragma unroll
  for (int i = 0; i < Pack::kCount; i += 2) {
    T unit[2];
    narrow_pair(widen(x.values[i]) * inverse, widen(x.values[i + 1]) * inverse, unit);
    narrow_pair(widen(unit[0]) * widen(weight.values[i]),
                widen(unit[1]) * widen(weight.values[i + 1]), y.values + i);
  }
  static_cast<Pack*>(args.y)[here] = y;
}

}  // namespace

void norm(const Norm& args, const Placement& place) {
  constexpr const char* kOp = "remake_norm";
  PYFAST_CHECK(args.dtype == DType::f16 || args.dtype == DType::bf16, kOp,
               ": dtype must be 1 (float16) or 2 (bfloat16), got ", static_cast<int>(args.dtype));
  PYFAST_CHECK(args.rows > 0 && args.rows < (std::int64_t{1} << 31) && args.cols > 0 &&
                   args.cols % 8 == 0 && args.cols < (std::int64_t{1} << 26),
               kOp, ": no kernel for ", args.rows, " x ", args.cols);
  check_pointer(kOp, "x", args.x);
  check_pointer(kOp, "inverse", args.inverse);
  check_pointer(kOp, "weight", args.weight);
  check_pointer(kOp, "y", args.y);
  const DeviceGuard guard(place.device);
  const dim3 grid(static_cast<unsigned>(args.rows),
                  static_cast<unsigned>(ceil_div(args.cols / 8, kThreads)));
  auto* kernel = args.dtype == DType::bf16 ? &norm_kernel<__nv_bfloat16> : &norm_kernel<__half>;
  kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(place.stream)>>>(args);
  CUDA_CHECK(kOp, cudaGetLastError());
}

}  // namespace pyfast::remake
