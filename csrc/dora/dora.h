// SPDX-License-Identifier: Apache-2.0
// DoRA beside the LoRA linear: with c[n] = magnitude[n] / norms[n]
//
//   norms[n] = ||W[n] + s B[n] A||      y = c (x W^T + z B^T)      dmagnitude[n] = sum of dy y' /
//   norms
//
// Letters: M tokens, N out features, K in features, R rank; A [R, K], B [N, R].
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "common/dtype.h"
#include "common/variant.h"

namespace pyfast::dora {

inline constexpr int kMostRank = 128;

// All on 16 bytes; A and B contiguous and of one type, K a multiple of 8.
struct Norms {
  DType dtype = DType::bf16;  // of W
  DType adapter_dtype = DType::f32;
  std::int64_t n = 0, k = 0, r = 0;
  const void* w = nullptr;
  std::int64_t pitch_w = 0;  // of elements, 16 bytes a unit
  const void* a = nullptr;
  const void* b = nullptr;
  float scale = 1.0F;
  float* norms = nullptr;  // [N]
};
std::string_view norms(const Norms& params, const Placement& place);

// What c is made of. Norms are rounded to the magnitude's type, so that both cancel before
// training; the norm 0 counts as 1. The kernels multiply by 2^-64 with c's sign where |c| is less:
// zero in any sum of a bfloat16, but the product before scaling can be read back.
struct Columns {
  DType dtype = DType::f32;  // of the magnitude
  const void* magnitude = nullptr;
  const float* norms = nullptr;
};

// out = c times the rows (`by_row`: W as [N, K]) or the columns (W as [K, N], y) of a bfloat16
// matrix. Both on 16 bytes, `columns` a multiple of 8. May be in place.
struct Scale {
  bool by_row = true;
  std::int64_t rows = 0, columns = 0;
  const void* x = nullptr;
  std::int64_t pitch = 0;
  void* out = nullptr;  // contiguous
  Columns c;
  // B [N, R] scaled beside it; null where none is wanted.
  DType factor_dtype = DType::f32;
  std::int64_t r = 0;
  const void* b = nullptr;
  void* scaled_b = nullptr;
};
std::string_view scale(const Scale& params, const Placement& place);

// What they multiply by, float32 [N].
void factors(std::int64_t n, const Columns& c, float* out, const Placement& place);

// Parts of the sums of dy y over rows, [slices(device, M, N), N].
std::int64_t slices(int device, std::int64_t m, std::int64_t n);
struct Sums {
  std::int64_t m = 0, n = 0;
  const void* dy = nullptr;  // bfloat16 on 16 bytes, as y [M, N]
  std::int64_t pitch_dy = 0;
  const void* y = nullptr;
  void* scaled_dy = nullptr;  // [M, N] c dy, or null
  Columns c;
  float* parts = nullptr;
};
std::string_view sums(const Sums& params, const Placement& place);

// dmagnitude from the parts, and dB times c in place; either may be null.
struct Finish {
  std::int64_t m = 0, n = 0, r = 0;
  const float* parts = nullptr;
  Columns c;
  void* dmagnitude = nullptr;  // of the magnitude's type
  DType factor_dtype = DType::f32;
  void* db = nullptr;
};
std::string_view finish(const Finish& params, const Placement& place);

std::vector<VariantInfo> variants(std::string_view op);

}  // namespace pyfast::dora
