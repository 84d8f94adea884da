// SPDX-License-Identifier: Apache-2.0
#include "dropout/kernels.h"
#include "dropout/rows.h"

namespace pyfast::dropout {

void dropout_scalar(const DropoutParams& params, std::int64_t begin, std::int64_t end) {
  const MaskSeed seed(params.seed);
  const float scale = keep_scale(params.threshold);
  visit_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    for_each_row<T>(params, begin, end, [&](const Run<T>& run, std::int64_t columns) {
      drop_scalar(run, 0, columns, seed, params.threshold, scale);
    });
  });
}

}  // namespace pyfast::dropout
