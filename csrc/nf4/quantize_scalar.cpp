// SPDX-License-Identifier: Apache-2.0
#include "nf4/blocks.h"
#include "nf4/kernels.h"

namespace pyfast::nf4 {

void quantize_scalar(const QuantizeParams& params, std::int64_t begin, std::int64_t end) {
  visit_dtype(params.dtype, [&](auto zero) {
    for_each_block<decltype(zero)>(
        params, begin, end, [&](const auto* src, int count, std::uint8_t* packed, float* absmax) {
          quantize_block_scalar(src, count, params.blocksize, packed, absmax);
        });
  });
}

}  // namespace pyfast::nf4
