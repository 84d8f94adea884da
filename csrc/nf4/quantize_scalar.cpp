// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "nf4/block_scalar.h"
#include "nf4/kernels.h"

namespace pyfast::nf4 {

void quantize_scalar(const QuantizeParams& params, std::int64_t begin, std::int64_t end) {
  visit_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    for (std::int64_t block = begin; block < end; ++block) {
      const std::int64_t at = block * params.blocksize;
      const auto count =
          static_cast<int>(std::min<std::int64_t>(params.blocksize, params.numel - at));
      quantize_block_scalar(static_cast<const T*>(params.src) + at, count, params.blocksize,
                            params.packed + at / 2, params.absmax + block);
    }
  });
}

}  // namespace pyfast::nf4
