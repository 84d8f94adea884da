// SPDX-License-Identifier: Apache-2.0
// NF4: 4-bit codes with one fp32 scale per block, in the format of bitsandbytes.
//
// A tensor is read flat, in row-major order. Block b is the elements [b * blocksize, (b + 1) *
// blocksize); the last one may be short. An element is code[c] * absmax[b], with c the nearest of
// the 16 codes to element / absmax[b]. Byte j of `packed` holds element 2j in its high nibble and
// 2j + 1 in its low one.
//
// Nested scales ("double quantisation") are themselves stored in 8 bits, in groups of 256 blocks:
// absmax[b] = map[codes[b]] * nested_absmax[b / 256] + offset, the product rounded before the sum.
//
// B = ceil(numel / blocksize) blocks, G = ceil(B / 256) groups.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "common/dtype.h"
#include "common/variant.h"

namespace pyfast::nf4 {

constexpr int kNestedBlocksize = 256;

struct QuantizeParams {
  const void* src;       // dtype [numel]
  DType dtype;           //
  std::int64_t numel;    //
  int blocksize;         // power of two in 32..4096
  std::uint8_t* packed;  // [ceil(numel / 2)]; with odd numel the last low nibble is code 7
  float* absmax;         // [B]
};

struct NestParams {
  const float* absmax;      // [B]
  std::int64_t num_blocks;  // B
  const float* offset;      // [1], the mean of absmax
  std::uint8_t* codes;      // [B]
  float* nested_absmax;     // [G]
};

// Writes the elements [first_block * blocksize, + numel) of a tensor whose bytes and scales begin
// at `packed` and `absmax`.
struct DequantizeParams {
  const std::uint8_t* packed;  // whole tensor
  const void* absmax;          // flat: float [B]; nested: uint8 [B]
  const float* nested_absmax;  // [G], null when flat
  const float* offset;         // [1], null when flat
  void* out;                   // dtype [numel]
  DType dtype;
  std::int64_t first_block;
  std::int64_t numel;
  int blocksize;
};

// y[m, n] = x[m, k] W^T + bias, with W [n, k] read from its packed bytes.
struct FewRowsParams {
  const void* x;               // dtype, rows of pitch_x elements
  const std::uint8_t* packed;  //
  const void* absmax;          // flat: float [B]; nested: uint8 [B]
  const float* nested_absmax;  // [G], null when flat
  const float* offset;         // [1], null when flat
  const void* bias;            // dtype [n] or null
  void* y;                     // dtype, rows of pitch_y elements
  std::int64_t pitch_x;
  std::int64_t pitch_y;
  int m, n, k;
  DType dtype;
  int blocksize;
  // The launch may begin before the grid ahead of it has ended, which then must not write W.
  bool early;
};

// y[m, n] = x[m, k] W^T + z[m, r] B^T + bias, with W stored [n, k] (by_out) or [k, n] in NF4, B the
// same way in dtype. r = 0 leaves z and B out. Pitches in elements, multiples of 8.
struct GemmParams {
  const void* x;
  const std::uint8_t* packed;
  const void* absmax;          // flat: float [B]; nested: uint8 [B]
  const float* nested_absmax;  // [G], null when flat
  const float* offset;         // [1], null when flat
  const void* z;
  const void* b;
  const void* bias;  // [n] or null
  void* y;
  std::int64_t pitch_x, pitch_z, pitch_b, pitch_y;
  int m, n, k, r;
  bool by_out;
  DType dtype;
  int blocksize;
};

// Each checks what would corrupt memory, runs the first kernel of its table that fits `place` (or
// the one called `variant`) and returns the kernel's name.
std::string_view quantize(const QuantizeParams& params, const Placement& place,
                          std::string_view variant);
std::string_view nest(const NestParams& params, const Placement& place, std::string_view variant);
std::string_view dequantize(const DequantizeParams& params, const Placement& place,
                            std::string_view variant);
// Products that no kernel serves are refused with the reason of each.
std::string_view few_rows(const FewRowsParams& params, const Placement& place,
                          std::string_view variant);
std::string_view gemm(const GemmParams& params, const Placement& place, std::string_view variant);

// The rows of the table of "nf4_quantize", "nf4_nest", "nf4_dequantize", "nf4_few_rows" or
// "nf4_gemm".
std::vector<VariantInfo> variants(std::string_view op);

}  // namespace pyfast::nf4
