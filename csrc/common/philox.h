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

// One block draws 16 bits for each of so many columns.
inline constexpr int kMaskColumns = 8;
// A threshold that drops everything: 16 bits are always below it.
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

// Bit i is set where column kMaskColumns * group + i of the row is kept.
PYFAST_INLINE PYFAST_HOST_DEVICE std::uint32_t keep_bits(const MaskSeed& seed, std::uint32_t row,
                                                         std::uint32_t group,
                                                         std::uint32_t threshold) {
  const PhiloxBlock block =
      philox4x32({{row, group, seed.offset0, seed.offset1}}, seed.key0, seed.key1);
  std::uint32_t bits = 0;
  for (int i = 0; i < 4; ++i) {
    bits |= ((block.words[i] & 0xFFFFU) >= threshold ? 1U : 0U) << 2 * i;
    bits |= ((block.words[i] >> 16) >= threshold ? 2U : 0U) << 2 * i;
  }
  return bits;
}

// 1 / (the exact share that is kept), 0 where nothing is.
PYFAST_INLINE float keep_scale(std::uint32_t threshold) {
  if (threshold >= kMaskLevels) return 0.0F;
  return static_cast<float>(static_cast<double>(kMaskLevels) / (kMaskLevels - threshold));
}

}  // namespace pyfast
