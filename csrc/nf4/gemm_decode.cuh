// SPDX-License-Identifier: Apache-2.0
// NF4 weights of whole blocks to the weights of nf4_dequantize, bit for bit, into shared memory as
// `wgmma` reads it.
//
// While products run, whatever the integer units do takes twice as long, so instructions count. A
// block has 16 different weights: they are made once, and kept as bytes in eight registers, low
// ones and high ones apart. The codes of a word are then selectors of PRMT as they are: eight of
// them look up four weights, five more instructions serve all eight codes of a word.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/vec.cuh"
#include "nf4/nf4.h"
#include "nf4/tables.cuh"

namespace pyfast::nf4 {

constexpr int kPartRows = 32, kPartColumns = 64, kPartBytes = kPartRows * kPartColumns * 2;

// W [rows, columns]; blocks of 64, columns a multiple of them.
struct PackedWeight {
  const std::uint8_t* packed = nullptr;
  const void* absmax = nullptr;  // flat: float; nested: uint8
  const float* nested_absmax = nullptr;
  const float* offset = nullptr;
  int rows = 0, columns = 0;
};

// A warp's share: 32 rows of 64 columns, of which each lane has a row.
struct PackedPart {
  bool exists;  // the lane's row
  uint4 words[2];
  std::uint32_t scale;  // flat, or its code
  float group;

  __device__ __forceinline__ void load(const PackedWeight& w, int row, int column) {
    exists = row < w.rows && column < w.columns;
    if (!exists) return;
    const std::int64_t at = static_cast<std::int64_t>(row) * w.columns + column;
    const auto* from = reinterpret_cast<const uint4*>(w.packed + at / 2);
    words[0] = __ldg(from);
    words[1] = __ldg(from + 1);
    if (w.nested_absmax == nullptr) {
      scale = __ldg(static_cast<const std::uint32_t*>(w.absmax) + at / 64);
    } else {
      scale = __ldg(static_cast<const std::uint8_t*>(w.absmax) + at / 64);
      group = __ldg(w.nested_absmax + at / (64 * kNestedBlocksize));
    }
  }

  // To the lane's 128 bytes at `to`, of rows that TMA would swizzle by their address. Rows that do
  // not exist are zeros: where they are summed over, x is zero too, but what lies there might be
  // NaN.
  template <class T>
  __device__ __forceinline__ void decode(const PackedWeight& w, const float* map, float offset,
                                         std::uint32_t to) const {
    const std::uint32_t turn = to >> 7 & 7;
    const auto store = [&](int unit, const uint4& value) __attribute__((always_inline)) {
      const std::uint32_t at = to + (unit ^ turn) * 16;
      asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(value.x), "r"(value.y),
                   "r"(value.z), "r"(value.w)
                   : "memory");
    };
    if (!exists) {
#pragma unroll
      for (int unit = 0; unit < 8; ++unit) store(unit, make_uint4(0, 0, 0, 0));
      return;
    }
    float by = __uint_as_float(scale);
    if (w.nested_absmax != nullptr) by = __fadd_rn(__fmul_rn(map[scale], group), offset);
    std::uint32_t low[4], high[4];  // bytes of weights 4 i to 4 i + 3
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      alignas(8) T weights[4];
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        narrow_pair(__fmul_rn(c_codes[4 * i + j], by), __fmul_rn(c_codes[4 * i + j + 1], by),
                    weights + j);
      }
      const uint2 pairs = *reinterpret_cast<const uint2*>(weights);
      low[i] = __byte_perm(pairs.x, pairs.y, 0x6420);
      high[i] = __byte_perm(pairs.x, pairs.y, 0x7531);
    }
#pragma unroll
    for (int unit = 0; unit < 8; ++unit) {
      const uint4& four = words[unit / 4];
      const int at = unit % 4;
      const std::uint32_t word = at == 0 ? four.x : at == 1 ? four.y : at == 2 ? four.z : four.w;
      // Three bits of a code choose from eight bytes, the fourth between two such choices.
      const std::uint32_t within = word & 0x77777777U;
      const std::uint32_t between = ((word >> 1) & 0x44444444U) | 0x32103210U;
      std::uint32_t pairs[4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const std::uint32_t code = within >> 16 * half, which = between >> 16 * half;
        const auto look_up = [&](const std::uint32_t (&bytes)[4]) __attribute__((always_inline)) {
          return prmt(prmt(bytes[0], bytes[1], code), prmt(bytes[2], bytes[3], code), which);
        };
        const std::uint32_t lows = look_up(low), highs = look_up(high);
        // The code of an even column is the high half of its byte.
        pairs[2 * half] = __byte_perm(lows, highs, 0x4051);
        pairs[2 * half + 1] = __byte_perm(lows, highs, 0x6273);
      }
      store(unit, make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
    }
  }

 private:
  // __byte_perm would clear the selector's upper half first.
  static __device__ __forceinline__ std::uint32_t prmt(std::uint32_t a, std::uint32_t b,
                                                       std::uint32_t select) {
    std::uint32_t result;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(select));
    return result;
  }
};

}  // namespace pyfast::nf4
