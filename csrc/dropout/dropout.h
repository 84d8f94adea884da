// SPDX-License-Identifier: Apache-2.0
// Dropout with a mask that is drawn from counters and never stored: out = keep ? x * scale : 0,
// with keep(row, column) as keep_word() in common/philox.h and scale = keep_scale(threshold). A
// dropped element is 0 whatever x is. The product is formed in float and rounded once.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "common/dtype.h"
#include "common/variant.h"

namespace pyfast::dropout {

struct DropoutParams {
  const void* x;  // dtype [rows, columns], contiguous
  void* out;      // the same
  DType dtype;
  std::int64_t rows;         // at most 2^32
  std::int64_t columns;      // at most 2^35: a counter is 32 bits
  std::uint32_t threshold;   // 0 keeps everything, 65536 nothing
  const std::int64_t* seed;  // [2], seed and offset; on x's device, read when the kernel runs
};

// Checks what would corrupt memory, runs the first kernel of its table that fits `place` (or the
// one called `variant`) and returns the kernel's name.
std::string_view dropout(const DropoutParams& params, const Placement& place,
                         std::string_view variant);

// The rows of the table of "dropout".
std::vector<VariantInfo> variants(std::string_view op);

}  // namespace pyfast::dropout
