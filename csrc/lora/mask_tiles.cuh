// SPDX-License-Identifier: Apache-2.0
// Dropout's mask (common/philox.h) where the GEMMs want it: in the registers of wgmma, in shared
// memory, and on a tile that TMA has loaded.
#pragma once

#include <cuda_runtime.h>
#include <cutlass/cutlass.h>

#include <cstdint>

#include "common/philox.h"
#include "lora/gemm.h"

namespace pyfast::lora {

// A word of the mask that is drawn step by step between products: beside wgmma the integer units
// are slow, and what takes longer than a product leaves the tensor cores idle.
struct MaskWord {
  std::uint32_t row = 0, group = 0, keep = 0, steps = kMaskSteps;

  MaskWord() = default;  // nothing is left to draw
  CUTLASS_DEVICE MaskWord(int row, int group)
      : row(static_cast<std::uint32_t>(row)), group(static_cast<std::uint32_t>(group)), steps(0) {}
  CUTLASS_DEVICE bool drawn() const { return steps == kMaskSteps; }
  CUTLASS_DEVICE void step(const MaskSeed& seed, const MaskLevel& level) {
    keep_step(keep, seed, row, group, level, steps++);
  }
};

// Of the four words that a quad of lanes shares in an operand or a result of wgmma, of rows row and
// row + 8 and of columns group and group + 1, each lane draws one, and they trade: words[i] is of
// row + i % 2 * 8 and of columns group + i / 2. Of every eight columns a lane has two, the first
// 2 (lane % 4).
CUTLASS_DEVICE MaskWord word_of_quad(int row, int group) {
  const int quad = static_cast<int>(threadIdx.x) % 4;
  return {row + quad % 2 * 8, group + quad / 2};
}
CUTLASS_DEVICE void trade_words(std::uint32_t drawn, std::uint32_t (&words)[4]) {
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < 4; ++i) words[i] = __shfl_sync(0xFFFFFFFF, drawn, i, 4);
}

// Ones in the low half where the top bit of byte `at` of `even` is set, in the high half where that
// of `odd` is.
CUTLASS_DEVICE std::uint32_t kept_halves(std::uint32_t even, std::uint32_t odd, int at) {
  std::uint32_t halves;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(halves) : "r"(even), "r"(odd), "r"(0xCC88 + at * 0x1111));
  return halves;
}

// The mask of a tile of 128 x 256 in shared memory.
constexpr int kMaskRowWords = 256 / kMaskColumns, kMaskTileWords = 128 * kMaskRowWords;
constexpr int kMaskTileBytes = kMaskTileWords * 4;

// 256 threads draw it; the tile is complete after kMaskDraws draws, kMaskSteps for a word.
constexpr int kMaskDraws = static_cast<int>(kMaskSteps) * kMaskTileWords / 256;
CUTLASS_DEVICE void draw_step(std::uint32_t* words, std::uint32_t& keep, const MaskSeed& seed,
                              const MaskLevel& level, int row, int group, int draw, int thread) {
  constexpr int kSteps = static_cast<int>(kMaskSteps);
  const int at = draw / kSteps * 256 + thread;
  keep_step(keep, seed, static_cast<std::uint32_t>(row + at / kMaskRowWords),
            static_cast<std::uint32_t>(group + at % kMaskRowWords), level,
            static_cast<std::uint32_t>(draw % kSteps));
  if (draw % kSteps == kSteps - 1) words[at] = keep;
}

// Clears what is dropped in a box of 128 rows x 64 columns of two bytes, swizzled by TMA over 128
// bytes; `words` begins with the mask of its first column. A thread has a row.
CUTLASS_DEVICE void clear_dropped(void* box, const std::uint32_t* words, int row) {
  const auto both = *reinterpret_cast<const uint2*>(words + row * kMaskRowWords);
  auto* line = static_cast<uint4*>(box) + row * 8;
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < 8; ++i) {
    const std::uint32_t word = i < 4 ? both.x : both.y;
    uint4 values = line[i ^ row % 8];
    values.x &= kept_halves(word << 7, word << 6, i % 4);
    values.y &= kept_halves(word << 5, word << 4, i % 4);
    values.z &= kept_halves(word << 3, word << 2, i % 4);
    values.w &= kept_halves(word << 1, word, i % 4);
    line[i ^ row % 8] = values;
  }
}

// sum += value * scale where `bit` is not 0. nvcc would fetch the scale anew for each sum.
CUTLASS_DEVICE void add_if(std::uint32_t bit, float& sum, float value, float scale) {
  asm("{.reg .pred kept; setp.ne.u32 kept, %1, 0; @kept fma.rn.f32 %0, %2, %3, %0;}"
      : "+f"(sum)
      : "r"(bit), "f"(value), "f"(scale));
}

// sums += mask * scale * low for 64 columns of a tile in the registers of a warpgroup: kFirst is
// that of the first of its columns in `sums`. The mask's words begin with the warpgroup's rows and
// these columns.
template <int kFirst, class Sums, class Low>
CUTLASS_DEVICE void add_kept(Sums& sums, const Low& low, const std::uint32_t* words, float scale,
                             int thread) {
  const int lane = thread % 32, row = thread / 32 * 16 + lane / 4;
  CUTLASS_PRAGMA_UNROLL
  for (int half = 0; half < 2; ++half) {
    // Not moved ahead of the product by the compiler, which would run out of registers.
    std::uint32_t both[2];
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                 : "=r"(both[0]), "=r"(both[1])
                 : "r"(static_cast<std::uint32_t>(
                     __cvta_generic_to_shared(words + (row + 8 * half) * kMaskRowWords)))
                 : "memory");
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 16; ++i) {
      const std::uint32_t bits = both[i / 8] >> lane % 4 * 2;
      const int at = i / 2 * 4 + 2 * half + i % 2;
      add_if(bits & (1U << (i / 2 % 4 * 8 + i % 2)), sums(kFirst + at), low(at), scale);
    }
  }
}

}  // namespace pyfast::lora
