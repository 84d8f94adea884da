// SPDX-License-Identifier: Apache-2.0
// The output of an RMSNorm again, from what its backward keeps:
//
//   y = round(round(x inverse) weight)      inverse of each row: 1 / sqrt(mean(x^2) + eps)
#pragma once

#include <cstdint>

#include "common/device.h"
#include "common/dtype.h"

namespace pyfast::remake {

struct Norm {
  DType dtype = DType::bf16;  // of x, weight and y; float16 or bfloat16
  std::int64_t rows = 0, cols = 0;
  const void* x = nullptr;         // [rows, cols], contiguous on 16 bytes, cols a multiple of 8
  const float* inverse = nullptr;  // [rows]
  const void* weight = nullptr;    // [cols] on 16 bytes
  void* y = nullptr;               // as x
};

void norm(const Norm& args, const Placement& place);

}  // namespace pyfast::remake
