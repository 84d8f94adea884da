// SPDX-License-Identifier: Apache-2.0
// Element types, and the only bridge from a run-time dtype to a template.
//
// This header is compiled into files with different instruction sets, so everything in it that
// makes code is always inlined: a shared out-of-line copy could hold instructions the machine
// lacks.
#pragma once

#include <cstdint>
#include <cstring>

#define PYFAST_INLINE [[gnu::always_inline]] inline

namespace pyfast {

// The codes are part of the Python interface.
enum class DType : int { f32 = 0, f16 = 1, bf16 = 2 };

PYFAST_INLINE float float_from_bits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

PYFAST_INLINE std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

struct BFloat16 {
  std::uint16_t bits;
};

struct Float16 {
  std::uint16_t bits;
};

PYFAST_INLINE float to_float(float value) { return value; }

PYFAST_INLINE float to_float(BFloat16 value) {
  return float_from_bits(static_cast<std::uint32_t>(value.bits) << 16);
}

PYFAST_INLINE float to_float(Float16 value) {
  const std::uint32_t sign = (value.bits & 0x8000U) << 16;
  const std::uint32_t magnitude = value.bits & 0x7FFFU;
  if (magnitude >= 0x7C00U) {  // infinity or NaN: keep the payload, set the top exponent bits
    return float_from_bits(sign | 0x7F800000U | (magnitude & 0x3FFU) << 13);
  }
  // Read as a float, the shifted bits are 2^112 too small; subnormals come out right as well.
  const float scaled = float_from_bits(magnitude << 13) * 0x1p112F;
  return float_from_bits(sign | bits_of(scaled));
}

PYFAST_INLINE void from_float(float value, float* out) { *out = value; }

// Round to nearest even; NaN stays NaN (quiet).
PYFAST_INLINE void from_float(float value, BFloat16* out) {
  const std::uint32_t bits = bits_of(value);
  const bool is_nan = (bits & 0x7FFFFFFFU) > 0x7F800000U;
  const std::uint32_t rounded = (bits + 0x7FFFU + (bits >> 16 & 1U)) >> 16;
  out->bits = static_cast<std::uint16_t>(is_nan ? (bits >> 16 | 0x40U) : rounded);
}

// Round to nearest even; too large becomes infinity; NaN stays NaN (quiet).
PYFAST_INLINE void from_float(float value, Float16* out) {
  const std::uint32_t bits = bits_of(value);
  const std::uint32_t sign = bits >> 16 & 0x8000U;
  const std::uint32_t magnitude = bits & 0x7FFFFFFFU;
  std::uint32_t half;
  if (magnitude > 0x7F800000U) {
    half = 0x7E00U | (magnitude >> 13 & 0x3FFU);
  } else if (magnitude >= 0x477FF000U) {  // 65520 and more round to infinity
    half = 0x7C00U;
  } else if (magnitude <
             0x38800000U) {  // below 2^-14: adding 0.5 rounds at the subnormal's last bit
    half = bits_of(float_from_bits(magnitude) + 0.5F) - 0x3F000000U;
  } else {
    half = (magnitude - 0x38000000U + 0xFFFU + (magnitude >> 13 & 1U)) >> 13;
  }
  out->bits = static_cast<std::uint16_t>(sign | half);
}

// Calls visitor(T{}) with the storage type T that `dtype` names, on the CPU side.
template <class Visitor>
PYFAST_INLINE void visit_dtype(DType dtype, const Visitor& visitor) {
  switch (dtype) {
    case DType::f32:
      return visitor(float{});
    case DType::f16:
      return visitor(Float16{});
    case DType::bf16:
      return visitor(BFloat16{});
  }
}

}  // namespace pyfast
