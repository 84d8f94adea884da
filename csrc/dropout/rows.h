// SPDX-License-Identifier: Apache-2.0
// What the CPU kernels share: the walk over groups, and one group in plain C++. Always
// inlined, as dtype.h explains.
#pragma once

#include "common/philox.h"
#include "dropout/dropout.h"

namespace pyfast::dropout {

// Where a run of groups of one row begins.
template <class T>
struct Run {
  const T* x;
  T* out;
  std::uint32_t row, group;
};

// Calls run(Run<T>, columns) for each row's part of the groups [begin, end).
template <class T, class Function>
PYFAST_INLINE void for_each_row(const DropoutParams& params, std::int64_t begin, std::int64_t end,
                                const Function& run) {
  const std::int64_t groups = (params.columns + kMaskColumns - 1) / kMaskColumns;
  while (begin < end) {
    const std::int64_t row = begin / groups, group = begin % groups;
    const std::int64_t left = groups - group, wanted = end - begin;
    const std::int64_t count = left < wanted ? left : wanted;
    const std::int64_t first = group * kMaskColumns;
    const std::int64_t last = count == left ? params.columns : first + count * kMaskColumns;
    const std::int64_t at = row * params.columns + first;
    run(Run<T>{static_cast<const T*>(params.x) + at, static_cast<T*>(params.out) + at,
               static_cast<std::uint32_t>(row), static_cast<std::uint32_t>(group)},
        last - first);
    begin += count;
  }
}

// The columns [at, at + count) of a run, which a word of the mask is for.
template <class T>
PYFAST_INLINE void drop_scalar(const Run<T>& run, std::int64_t at, std::int64_t count,
                               std::uint32_t keep, float scale) {
  for (std::int64_t i = 0; i < count; ++i) {
    from_float(to_float(run.x[at + i]) * scale, run.out + at + i);
    if ((keep >> i & 1U) == 0) run.out[at + i] = T{};
  }
}

}  // namespace pyfast::dropout
