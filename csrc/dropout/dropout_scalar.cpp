// SPDX-License-Identifier: Apache-2.0
#include "dropout/kernels.h"
#include "dropout/rows.h"

namespace pyfast::dropout {

void dropout_scalar(const DropoutParams& params, std::int64_t begin, std::int64_t end) {
  const MaskSeed seed(params.seed);
  const MaskLevel level(params.threshold);
  const float scale = keep_scale(params.threshold);
  visit_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    for_each_row<T>(params, begin, end, [&](const Run<T>& run, std::int64_t columns) {
      std::uint32_t group = run.group;
      for (std::int64_t at = 0; at < columns; at += kMaskColumns, ++group) {
        const std::int64_t left = columns - at;
        drop_scalar(run, at, left < kMaskColumns ? left : kMaskColumns,
                    keep_word(seed, run.row, group, level), scale);
      }
    });
  });
}

}  // namespace pyfast::dropout
