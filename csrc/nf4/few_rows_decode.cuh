// SPDX-License-Identifier: Apache-2.0
// Packed weights to the left operand of `wgmma`, for few_rows_wgmma.cuh.
#pragma once

#include "nf4/few_rows_async.cuh"

namespace pyfast::nf4::few {

// The left operand of a block of 64 columns: four steps of 16, of each rows g and g + 8 of columns
// 2 t on, then of columns 2 t + 8 on.
using Operand = std::uint32_t[16];

// A lane's packed words of a block: of rows g and g + 8, 32 bytes each. `at` is the offset of row g
// in shared memory; its units of 16 bytes are swizzled.
struct Words {
  uint4 units[4];
  __device__ __forceinline__ void load(const char* storage, unsigned at, int block) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const unsigned from = at ^ static_cast<unsigned>((block * 2 + i / 2) * 16);
      units[i] = *reinterpret_cast<const uint4*>(storage + from + i % 2 * 8 * kChunkRow);
    }
  }
  // That of register i of the operand.
  __device__ __forceinline__ std::uint32_t word(int i) const {
    const uint4& unit = units[i / 8 * 2 + i % 2];
    const int at = i / 2 % 4;
    return at == 0 ? unit.x : at == 1 ? unit.y : at == 2 ? unit.z : unit.w;
  }
};

// As x lies in its natural order, lane t of a quad needs byte t of every word: `select` is the PRMT
// that makes it and four times the lane the offset of a look-up.
__device__ __forceinline__ void look_up(Operand& a, const Words& words, const char* table,
                                        std::uint32_t lane4, std::uint32_t select) {
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const std::uint32_t at = __byte_perm(words.word(i), lane4, select);
    a[i] = *reinterpret_cast<const std::uint32_t*>(table + at);
  }
}

// Codes in fixed point: 32768 + 32512 times the code, in 16 bits. A float 128 + n / 65536 has n as
// its low half, so that one FFMA makes a weight of it. The scale keeps 15 bits, so that 128.5 times
// the scale is exact and code 0 is 0.
constexpr float kFixedOne = 32512.0F;

__device__ __forceinline__ void fill_fixed_table(char* table) {
  const auto fixed = [](float code) {
    return static_cast<std::uint32_t>(__float2int_rn(code * kFixedOne) + 32768);
  };
  for (unsigned row = threadIdx.x; row < 256; row += blockDim.x) {
    const std::uint32_t pair = fixed(c_codes[row >> 4]) | fixed(c_codes[row & 15]) << 16;
    fill_table_row(table, row, pair);
  }
}

// Cut off to 15 bits, of a value that is half of the last one larger.
__device__ __forceinline__ float fixed_scale(float scale) {
  const float value = __fmul_rn(scale, 65536.0F / kFixedOne * (1.0F + 1.0F / 32768));
  return __uint_as_float(__float_as_uint(value) & 0xfffffe00U);
}

__device__ __forceinline__ float4 fixed_scales(const float4& scales) {
  return make_float4(fixed_scale(scales.x), fixed_scale(scales.y), fixed_scale(scales.z),
                     fixed_scale(scales.w));
}

// Weights of codes in fixed point, rounded once.
template <class T>
__device__ __forceinline__ void apply_scales(Operand& a, float upper, float lower) {
  const float scales[2] = {upper, lower}, offsets[2] = {-128.5F * upper, -128.5F * lower};
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const float first = __uint_as_float(__byte_perm(a[i], 0x4300, 0x5410));
    const float second = __uint_as_float(__byte_perm(a[i], 0x4300, 0x5432));
    a[i] = pair_of<T>(__fmaf_rn(first, scales[i % 2], offsets[i % 2]),
                      __fmaf_rn(second, scales[i % 2], offsets[i % 2]));
  }
}

}  // namespace pyfast::nf4::few
