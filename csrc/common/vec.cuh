// SPDX-License-Identifier: Apache-2.0
// Device-side element types and rounding.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/dtype.h"

namespace pyfast {

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

// Round to nearest even.
__device__ __forceinline__ void narrow(float value, float* out) { *out = value; }
__device__ __forceinline__ void narrow(float value, __half* out) { *out = __float2half_rn(value); }
__device__ __forceinline__ void narrow(float value, __nv_bfloat16* out) {
  *out = __float2bfloat16_rn(value);
}

// Two neighbours in one instruction.
__device__ __forceinline__ void narrow_pair(float low, float high, float* out) {
  out[0] = low;
  out[1] = high;
}
__device__ __forceinline__ void narrow_pair(float low, float high, __half* out) {
  *reinterpret_cast<__half2*>(out) = __floats2half2_rn(low, high);
}
__device__ __forceinline__ void narrow_pair(float low, float high, __nv_bfloat16* out) {
  *reinterpret_cast<__nv_bfloat162*>(out) = __floats2bfloat162_rn(low, high);
}

// 16 bytes of T: one vector access.
template <class T>
struct alignas(16) Pack16 {
  static constexpr int kCount = 16 / sizeof(T);
  T values[kCount];
};

// Calls visitor(T{}) with the device type T that `dtype` names.
template <class Visitor>
void visit_cuda_dtype(DType dtype, const Visitor& visitor) {
  switch (dtype) {
    case DType::f32:
      return visitor(float{});
    case DType::f16:
      return visitor(__half{});
    case DType::bf16:
      return visitor(__nv_bfloat16{});
  }
}

}  // namespace pyfast
