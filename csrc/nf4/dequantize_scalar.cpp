// SPDX-License-Identifier: Apache-2.0
#include "nf4/blocks.h"
#include "nf4/kernels.h"

namespace pyfast::nf4 {

void dequantize_scalar(const DequantizeParams& params, std::int64_t begin, std::int64_t end) {
  visit_dtype(params.dtype, [&](auto zero) {
    for_each_block<decltype(zero)>(
        params, begin, end,
        [](const std::uint8_t* packed, float scale, auto* out, std::int64_t count) {
          dequantize_block_scalar(packed, scale, out, count);
        });
  });
}

}  // namespace pyfast::nf4
