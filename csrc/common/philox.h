// SPDX-License-Identifier: Apache-2.0
// Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), and the
// dropout mask drawn from it, whose layout pyfast/ops/_philox.py has in words. For host and device.
#pragma once

#include <cstdint>

#include "common/dtype.h"

#ifdef __CUDACC__
#define PYFAST_HOST_DEVICE __host__ __device__
#else
#define PYFAST_HOST_DEVICE
#endif

namespace pyfast {

inline constexpr std::uint32_t kPhiloxMultiplier0 = 0xD2511F53U, kPhiloxMultiplier1 = 0xCD9E8D57U;
inline constexpr std::uint32_t kPhiloxKeyStep0 = 0x9E3779B9U, kPhiloxKeyStep1 = 0xBB67AE85U;
inline constexpr int kPhiloxRounds = 7;

// A word of the mask has a bit for each of so many columns of a row.
inline constexpr int kMaskColumns = 32;
// A threshold that drops everything: numbers of 16 bits are always below it.
inline constexpr std::uint32_t kMaskLevels = 1U << 16;

struct PhiloxBlock {
  std::uint32_t words[4];
};

struct WideProduct {
  std::uint32_t low, high;
};
PYFAST_INLINE PYFAST_HOST_DEVICE WideProduct multiply_wide(std::uint32_t a, std::uint32_t b) {
#ifdef __CUDA_ARCH__
  WideProduct product;  // one instruction, where nvcc would make two of the plain product
  asm("{.reg .u64 wide; mul.wide.u32 wide, %2, %3; mov.b64 {%0, %1}, wide;}"
      : "=r"(product.low), "=r"(product.high)
      : "r"(a), "r"(b));
  return product;
#else
  const std::uint64_t wide = std::uint64_t{a} * b;
  return {static_cast<std::uint32_t>(wide), static_cast<std::uint32_t>(wide >> 32)};
#endif
}

PYFAST_INLINE PYFAST_HOST_DEVICE PhiloxBlock philox4x32(PhiloxBlock counter, std::uint32_t key0,
                                                        std::uint32_t key1) {
  auto [c0, c1, c2, c3] = counter.words;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const WideProduct first = multiply_wide(kPhiloxMultiplier0, c0);
    const WideProduct second = multiply_wide(kPhiloxMultiplier1, c2);
    c0 = second.high ^ c1 ^ key0;
    c1 = second.low;
    c2 = first.high ^ c3 ^ key1;
    c3 = first.low;
    key0 += kPhiloxKeyStep0;
    key1 += kPhiloxKeyStep1;
  }
  return {{c0, c1, c2, c3}};
}

// The words of an int64 [2] of seed and offset.
struct MaskSeed {
  std::uint32_t key0, key1, offset0, offset1;

  PYFAST_INLINE PYFAST_HOST_DEVICE explicit MaskSeed(const std::int64_t* seed)
      : key0(static_cast<std::uint32_t>(seed[0])),
        key1(static_cast<std::uint32_t>(static_cast<std::uint64_t>(seed[0]) >> 32)),
        offset0(static_cast<std::uint32_t>(seed[1])),
        offset1(static_cast<std::uint32_t>(static_cast<std::uint64_t>(seed[1]) >> 32)) {}
};

// Each element has a number of 16 random bits and is kept where that is not below the threshold. 32
// of them are compared at once, bit by bit from the lowest: a bit of `keep` says whether a number's
// bits so far are not below the threshold's. What depends on the threshold alone is here.
struct MaskLevel {
  std::uint32_t begin;  // `keep` ahead of the first bit
  std::uint32_t bits;   // where the low byte is 0, that of the numbers decides nothing
  std::uint32_t high_zeros[8];

  PYFAST_INLINE PYFAST_HOST_DEVICE explicit MaskLevel(std::uint32_t threshold = 0)
      : begin(threshold < kMaskLevels ? 0xFFFFFFFFU : 0U),
        bits(threshold < kMaskLevels ? threshold : kMaskLevels - 1) {
    for (int i = 0; i < 8; ++i) high_zeros[i] = zeros(8 + i);
  }
  // Ones where this bit of the threshold is 0.
  PYFAST_INLINE PYFAST_HOST_DEVICE std::uint32_t zeros(std::uint32_t bit) const {
    return (bits >> bit & 1U) - 1U;
  }
};

// Compares four more bits, from 4 * call on, of the numbers of a row's columns from kMaskColumns *
// group on.
PYFAST_INLINE PYFAST_HOST_DEVICE void compare_four(std::uint32_t& keep, const MaskSeed& seed,
                                                   std::uint32_t row, std::uint32_t group,
                                                   std::uint32_t call,
                                                   const std::uint32_t (&zeros)[4]) {
  const PhiloxBlock block =
      philox4x32({{row, 4 * group + call, seed.offset0, seed.offset1}}, seed.key0, seed.key1);
  for (int i = 0; i < 4; ++i) {
    keep = (block.words[i] & keep) | ((block.words[i] | keep) & zeros[i]);
  }
}

// One of the kMaskSteps steps that draw a word of the mask, in which bit i is set where column
// kMaskColumns * group + i of the row is kept; `keep` goes from step to step.
inline constexpr std::uint32_t kMaskSteps = 2;
PYFAST_INLINE PYFAST_HOST_DEVICE void keep_step(std::uint32_t& keep, const MaskSeed& seed,
                                                std::uint32_t row, std::uint32_t group,
                                                const MaskLevel& level, std::uint32_t step) {
  if (step == 0) {
    keep = level.begin;
    if ((level.bits & 0xFFU) != 0) {
#ifdef __CUDA_ARCH__
#pragma unroll 1  // the rare case, and the GEMMs have no registers to spare
#endif
      for (std::uint32_t call = 0; call < 2; ++call) {
        compare_four(keep, seed, row, group, call,
                     {level.zeros(4 * call), level.zeros(4 * call + 1), level.zeros(4 * call + 2),
                      level.zeros(4 * call + 3)});
      }
    }
  }
  const std::uint32_t* high = level.high_zeros + 4 * step;
  compare_four(keep, seed, row, group, 2 + step, {high[0], high[1], high[2], high[3]});
}

PYFAST_INLINE PYFAST_HOST_DEVICE std::uint32_t keep_word(const MaskSeed& seed, std::uint32_t row,
                                                         std::uint32_t group,
                                                         const MaskLevel& level) {
  std::uint32_t keep = 0;
  keep_step(keep, seed, row, group, level, 0);
  keep_step(keep, seed, row, group, level, 1);
  return keep;
}

// 1 / (the exact share that is kept), 0 where nothing is.
PYFAST_INLINE float keep_scale(std::uint32_t threshold) {
  if (threshold >= kMaskLevels) return 0.0F;
  return static_cast<float>(static_cast<double>(kMaskLevels) / (kMaskLevels - threshold));
}

}  // namespace pyfast
