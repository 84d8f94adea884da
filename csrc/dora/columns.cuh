// SPDX-License-Identifier: Apache-2.0
// c of an out feature, and elements whose type is known at run time only.
#pragma once

#include "common/vec.cuh"
#include "dora/dora.h"

namespace pyfast::dora {

__device__ __forceinline__ float load(const void* from, DType dtype, std::int64_t at) {
  switch (dtype) {
    case DType::f32:
      return static_cast<const float*>(from)[at];
    case DType::f16:
      return widen(static_cast<const __half*>(from)[at]);
    default:
      return widen(static_cast<const __nv_bfloat16*>(from)[at]);
  }
}

__device__ __forceinline__ void store(float value, void* to, DType dtype, std::int64_t at) {
  switch (dtype) {
    case DType::f32:
      return narrow(value, static_cast<float*>(to) + at);
    case DType::f16:
      return narrow(value, static_cast<__half*>(to) + at);
    default:
      return narrow(value, static_cast<__nv_bfloat16*>(to) + at);
  }
}

// The norm that magnitudes are divided by.
__device__ __forceinline__ float divisor(const Columns& c, std::int64_t n) {
  float norm = c.norms[n];
  if (c.dtype == DType::f16) norm = widen(__float2half_rn(norm));
  if (c.dtype == DType::bf16) norm = widen(__float2bfloat16_rn(norm));
  return norm == 0.0F ? 1.0F : norm;
}

__device__ __forceinline__ float exact_factor(const Columns& c, std::int64_t n) {
  return load(c.magnitude, c.dtype, n) / divisor(c, n);
}

// What the matrices are multiplied by.
__device__ __forceinline__ float factor(const Columns& c, std::int64_t n) {
  constexpr float kLeast = 0x1p-64F;
  const float exact = exact_factor(c, n);
  return fabsf(exact) < kLeast ? copysignf(kLeast, exact) : exact;
}

// Eight bfloat16 times eight factors, rounded once.
using Eight = Pack16<__nv_bfloat16>;

template <class Factor>
__device__ __forceinline__ Eight scaled(const Eight& x, const Factor& factor_of) {
  Eight out;
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    narrow_pair(widen(x.values[i]) * factor_of(i), widen(x.values[i + 1]) * factor_of(i + 1),
                out.values + i);
  }
  return out;
}

__device__ __forceinline__ Eight load_eight(const void* from, std::int64_t at) {
  const uint4 bits = __ldcs(static_cast<const uint4*>(from) + at);
  return *reinterpret_cast<const Eight*>(&bits);
}

__device__ __forceinline__ void store_eight(const Eight& values, void* to, std::int64_t at) {
  static_cast<uint4*>(to)[at] = *reinterpret_cast<const uint4*>(&values);
}

}  // namespace pyfast::dora
