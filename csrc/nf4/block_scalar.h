// SPDX-License-Identifier: Apache-2.0
// One block at a time in plain C++: the scalar kernels, and the ends that the vector kernels leave.
// Always inlined, as dtype.h explains.
//
// The rules are those of bitsandbytes on CPU. A full block multiplies by 1 / max(absmax, 1e-38),
// the partial last block divides by its absmax, and stores at least 1e-38 there. A NaN makes the
// absmax NaN and every code of the block 15; an infinity makes it infinite, finite elements 0 and
// infinities 15.
#pragma once

#include "common/dtype.h"
#include "nf4/codebook.h"
#include "nf4/nf4.h"

namespace pyfast::nf4 {

constexpr float kLeastAbsmax = 1e-38F;

// As an integer, the bit pattern of |x| orders like |x| itself, with NaN above infinity.
template <class T>
PYFAST_INLINE float block_absmax(const T* src, std::int64_t count) {
  std::uint32_t most = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::uint32_t magnitude = bits_of(to_float(src[i])) & 0x7FFFFFFFU;
    if (magnitude > most) most = magnitude;
  }
  return float_from_bits(most);
}

PYFAST_INLINE std::uint32_t encode(float x) {
  std::uint32_t code = 0;
  for (const float threshold : kThresholds) code += !(x <= threshold);  // NaN gives 15
  return code;
}

template <class T>
PYFAST_INLINE void quantize_block_scalar(const T* src, int count, int blocksize,
                                         std::uint8_t* packed, float* absmax) {
  float most = block_absmax(src, count);
  const bool partial = count < blocksize;
  const float least = most < kLeastAbsmax ? kLeastAbsmax : most;
  if (partial) most = least;
  *absmax = most;
  const float divisor = partial ? least : 1.0F;
  const float factor = partial ? 1.0F : 1.0F / least;
  for (int i = 0; i < count; i += 2) {
    const std::uint32_t high = encode(to_float(src[i]) * factor / divisor);
    const std::uint32_t low = i + 1 < count ? encode(to_float(src[i + 1]) * factor / divisor) : 7U;
    packed[i / 2] = static_cast<std::uint8_t>(high << 4 | low);
  }
}

// The scale of block `block` of the whole tensor.
PYFAST_INLINE float block_scale(const DequantizeParams& params, std::int64_t block) {
  if (params.nested_absmax == nullptr) return static_cast<const float*>(params.absmax)[block];
  const float code = kDynamicMap[static_cast<const std::uint8_t*>(params.absmax)[block]];
  return code * params.nested_absmax[block / kNestedBlocksize] + *params.offset;
}

template <class T>
PYFAST_INLINE void dequantize_block_scalar(const std::uint8_t* packed, float scale, T* out,
                                           std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    const int code = i % 2 == 0 ? packed[i / 2] >> 4 : packed[i / 2] & 15;
    from_float(kCodes[code] * scale, out + i);
  }
}

}  // namespace pyfast::nf4
