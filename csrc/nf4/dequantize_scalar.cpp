// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "nf4/block_scalar.h"
#include "nf4/kernels.h"

namespace pyfast::nf4 {

void dequantize_scalar(const DequantizeParams& params, std::int64_t begin, std::int64_t end) {
  visit_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    for (std::int64_t block = begin; block < end; ++block) {
      const std::int64_t at = block * params.blocksize;
      const std::int64_t count = std::min<std::int64_t>(params.blocksize, params.numel - at);
      const std::int64_t source = params.first_block + block;
      dequantize_block_scalar(params.packed + source * params.blocksize / 2,
                              block_scale(params, source), static_cast<T*>(params.out) + at, count);
    }
  });
}

}  // namespace pyfast::nf4
