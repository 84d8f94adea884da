// SPDX-License-Identifier: Apache-2.0
// Dropout's mask (common/philox.h) where the GEMMs want it: in the registers of wgmma, as bytes in
// shared memory, and on a tile that TMA has loaded.
#pragma once

#include <cuda_runtime.h>
#include <cutlass/cutlass.h>

#include <cstdint>

#include "common/philox.h"
#include "lora/gemm.h"

namespace pyfast::lora {

CUTLASS_DEVICE std::uint32_t pick_word(const std::uint32_t (&words)[4], int index) {
  const std::uint32_t low = index & 1 ? words[1] : words[0];
  const std::uint32_t high = index & 1 ? words[3] : words[2];
  return index & 2 ? high : low;
}

// Of the Philox blocks of eight columns `group` ... `group` + 3 of a row, the words that belong to
// this lane's columns in an operand or a result of wgmma: lane % 4 of each. Each lane of a quad
// draws one block, and they trade words.
CUTLASS_DEVICE void draw_words(const MaskSeed& seed, int row, int group,
                               std::uint32_t (&words)[4]) {
  const int quad = static_cast<int>(threadIdx.x) % 4;
  const PhiloxBlock drawn =
      philox4x32({{static_cast<std::uint32_t>(row), static_cast<std::uint32_t>(group + quad),
                   seed.offset0, seed.offset1}},
                 seed.key0, seed.key1);
  std::uint32_t traded[4];  // from lane quad ^ i, hence of block group + (quad ^ i)
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < 4; ++i) {
    traded[i] = __shfl_xor_sync(0xFFFFFFFF, pick_word(drawn.words, quad ^ i), i);
  }
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < 4; ++i) words[i] = pick_word(traded, quad ^ i);
}

// Sets the halves of a word that are kept to ones.
CUTLASS_DEVICE std::uint32_t kept_halves(std::uint32_t word, std::uint32_t threshold) {
  return ((word & 0xFFFFU) >= threshold ? 0x0000FFFFU : 0U) |
         ((word >> 16) >= threshold ? 0xFFFF0000U : 0U);
}

// The mask of a tile of 128 x 256 in shared memory: a row has 32 bytes, a byte eight columns, and a
// set bit is kept.
constexpr int kMaskRowBytes = 32, kMaskTileBytes = 128 * kMaskRowBytes;

// 256 threads draw it, each a byte at a time; the tile is complete after kMaskDraws draws.
constexpr int kMaskDraws = kMaskTileBytes / 256;
CUTLASS_DEVICE void draw_byte(std::uint8_t* bytes, const MaskSeed& seed, std::uint32_t threshold,
                              int row, int group, int draw, int thread) {
  const int at = draw * 256 + thread;
  bytes[at] = static_cast<std::uint8_t>(
      keep_bits(seed, static_cast<std::uint32_t>(row + at / kMaskRowBytes),
                static_cast<std::uint32_t>(group + at % kMaskRowBytes), threshold));
}

// Clears what is dropped in a box of 128 rows x 64 columns of two bytes, swizzled by TMA over 128
// bytes; `bytes` is the mask of its first column. A thread has a row.
CUTLASS_DEVICE void clear_dropped(void* box, const std::uint8_t* bytes, int row) {
  const auto eight = *reinterpret_cast<const uint2*>(bytes + row * kMaskRowBytes);
  auto* line = static_cast<uint4*>(box) + row * 8;
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < 8; ++i) {
    const std::uint32_t bits = (i < 4 ? eight.x : eight.y) >> 8 * (i % 4);
    const auto halves = [&](int pair) {
      return (bits >> 2 * pair & 1 ? 0x0000FFFFU : 0U) | (bits >> 2 * pair & 2 ? 0xFFFF0000U : 0U);
    };
    uint4 values = line[i ^ row % 8];
    values.x &= halves(0), values.y &= halves(1), values.z &= halves(2), values.w &= halves(3);
    line[i ^ row % 8] = values;
  }
}

// sums += mask * scale * low for 64 columns of a tile in the registers of a warpgroup: kFirst is
// that of the first of its columns in `sums`. The mask's bytes begin with the warpgroup's rows and
// these columns.
template <int kFirst, class Sums, class Low>
CUTLASS_DEVICE void add_kept(Sums& sums, const Low& low, const std::uint8_t* bytes, float scale,
                             int thread) {
  const int lane = thread % 32, row = thread / 32 * 16 + lane / 4;
  CUTLASS_PRAGMA_UNROLL
  for (int half = 0; half < 2; ++half) {
    // Not moved ahead of the product by the compiler, which would run out of registers.
    std::uint32_t low_four, high_four;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                 : "=r"(low_four), "=r"(high_four)
                 : "r"(static_cast<std::uint32_t>(
                     __cvta_generic_to_shared(bytes + (row + 8 * half) * kMaskRowBytes)))
                 : "memory");
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 8; ++i) {
      const std::uint32_t bits = (i < 4 ? low_four : high_four) >> (8 * (i % 4) + lane % 4 * 2);
      const int at = 4 * i + 2 * half;
      if (bits & 1) sums(kFirst + at) = fmaf(low(at), scale, sums(kFirst + at));
      if (bits & 2) sums(kFirst + at + 1) = fmaf(low(at + 1), scale, sums(kFirst + at + 1));
    }
  }
}

}  // namespace pyfast::lora
