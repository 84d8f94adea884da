// SPDX-License-Identifier: Apache-2.0
// The mask of several groups of one row at once, for the vector kernels. Always inlined, as dtype.h
// explains.
//
// `V` wraps an instruction set: Int, a register of 64-bit lanes, and the operations below. A
// counter word lives in the low half of a lane, a lane per group; what is in the high half never
// matters, as a multiplication reads low halves only.
#pragma once

#include "common/philox.h"

namespace pyfast::dropout {

template <class V>
class MaskSource {
 public:
  using Int = typename V::Int;

  PYFAST_INLINE MaskSource(const MaskSeed& seed, std::uint32_t threshold)
      : level_(threshold),
        offset0_(V::broadcast(seed.offset0)),
        offset1_(V::broadcast(seed.offset1)) {
    for (std::uint32_t round = 0; round < kPhiloxRounds; ++round) {
      key0_[round] = V::broadcast(seed.key0 + round * kPhiloxKeyStep0);
      key1_[round] = V::broadcast(seed.key1 + round * kPhiloxKeyStep1);
    }
  }

  // As keep_word(), for V::kGroups groups from `group` on.
  PYFAST_INLINE void draw(std::uint32_t row, std::uint32_t group,
                          std::uint32_t (&words)[V::kGroups]) const {
    Int keep = V::broadcast(level_.begin);
    for (std::uint32_t call = (level_.bits & 0xFFU) != 0 ? 0 : 2; call < 4; ++call) {
      compare_four(&keep, row, group, call);
    }
    V::store_low_halves(keep, words);
  }

 private:
  PYFAST_INLINE void compare_four(Int* keep, std::uint32_t row, std::uint32_t group,
                                  std::uint32_t call) const {
    const Int multiplier0 = V::broadcast(kPhiloxMultiplier0);
    const Int multiplier1 = V::broadcast(kPhiloxMultiplier1);
    Int c0 = V::broadcast(row), c1 = V::counters_from(4 * group + call);
    Int c2 = offset0_, c3 = offset1_;
    for (int round = 0; round < kPhiloxRounds; ++round) {
      const Int product0 = V::multiply(c0, multiplier0);
      const Int product1 = V::multiply(c2, multiplier1);
      c0 = V::exclusive_or(V::high_half(product1), c1, key0_[round]);
      c1 = product1;
      c2 = V::exclusive_or(V::high_half(product0), c3, key1_[round]);
      c3 = product0;
    }
    *keep = V::majority(c0, *keep, V::broadcast(level_.zeros(4 * call)));
    *keep = V::majority(c1, *keep, V::broadcast(level_.zeros(4 * call + 1)));
    *keep = V::majority(c2, *keep, V::broadcast(level_.zeros(4 * call + 2)));
    *keep = V::majority(c3, *keep, V::broadcast(level_.zeros(4 * call + 3)));
  }

  MaskLevel level_;
  Int offset0_, offset1_;
  Int key0_[kPhiloxRounds], key1_[kPhiloxRounds];
};

}  // namespace pyfast::dropout
