// SPDX-License-Identifier: Apache-2.0
// The backward of y = x * scale along the last axis: dx = dy * scale, dscale = sum over rows of dy
// x. The forward is dx of dy = x.
#pragma once

#include <cstdint>
#include <string_view>

#include "common/dtype.h"
#include "common/variant.h"

namespace pyfast::adapter {

// Pointers of dy and x on 16 bytes; columns and pitches, in elements, multiples of 8.
struct ScaleArgs {
  DType dtype = DType::bf16, scale_dtype = DType::bf16;
  const void* dy = nullptr;
  std::int64_t pitch_dy = 0;
  const void* x = nullptr;
  std::int64_t pitch_x = 0;
  const void* scale = nullptr;  // [cols]
  void* dx = nullptr;           // [rows, cols]; this and the next may be null: not wanted
  void* d_scale = nullptr;      // [cols]
  float* parts = nullptr;       // scale_workspace() bytes
  std::int64_t rows = 0, cols = 0;
};

// Bytes of partial sums.
std::int64_t scale_workspace(std::int64_t rows, std::int64_t cols, int device);

// Enqueues what is wanted; returns the kernel's name.
std::string_view scale_backward(const ScaleArgs& args, const Placement& place);

// For dispatch.cpp.
void launch_scale(const ScaleArgs& args, int sm_count, void* stream);

// Adds up what bands of rows have left, in order.
struct ScaleSum {
  const float* parts = nullptr;  // [bands, cols]
  int bands = 0;
  std::int64_t pitch = 0, cols = 0;
  DType dtype = DType::f32;
  void* out = nullptr;  // [cols]
};
void launch_scale_sum(const ScaleSum& sum, void* stream);

}  // namespace pyfast::adapter
