// SPDX-License-Identifier: Apache-2.0
// The backward of y = (x * s) W^T + bias in one GEMM: with D = dy W,
//
//   dx = D * s      ds = sum over rows of D * x
//
// Letters: M tokens, N out features, K in features; s [K]. Sums are in float32.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "common/dtype.h"
#include "common/variant.h"
#include "lora/gemm.h"

namespace pyfast::adapter {

// Matrices are of bfloat16, on 16 bytes; N, K and the pitches, in elements, are multiples of 8.
struct ScaledGemmArgs {
  const void* dy = nullptr;  // [M, N]
  std::int64_t pitch_dy = 0;
  const void* w = nullptr;  // [N, K]
  std::int64_t pitch_w = 0;
  const void* x = nullptr;  // [M, K]
  std::int64_t pitch_x = 0;
  const float* scale = nullptr;  // [K]
  void* dx = nullptr;            // [M, K], contiguous
  float* parts = nullptr;        // scaled_gemm_workspace() bytes
  void* d_scale = nullptr;       // [K]; null: not wanted
  DType d_scale_dtype = DType::f32;
  std::int64_t m = 0, n = 0, k = 0;
};

// Why torch serves a shape instead; empty where the GEMM does.
std::string scaled_gemm_missing(std::int64_t m, std::int64_t n, std::int64_t k, int device);

// Bytes of partial sums.
std::int64_t scaled_gemm_workspace(std::int64_t m, std::int64_t k);

// Enqueues the GEMM and the sum of its parts; returns the kernel's name.
std::string_view scaled_gemm(const ScaledGemmArgs& args, const Placement& place);

// For dispatch: each row of tiles leaves its part of ds in a row of whole tiles.
inline constexpr int kScaledTileM = 128, kScaledTileN = 256;
void launch_scaled_gemm_sm90(const ScaledGemmArgs& args, const lora::GemmPlan& plan, int sm_count,
                             void* stream);

}  // namespace pyfast::adapter
