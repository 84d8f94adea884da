// SPDX-License-Identifier: Apache-2.0
// The contract of the GEMMs of the LoRA linear.
#pragma once

#include <cstdint>
#include <string_view>

#include "common/dtype.h"

namespace pyfast::lora {

// y[M, N] = x[M, K] W^T + z[M, R] B^T + bias[N], all of one 2-byte type, sums in float32. W and B
// are stored by out feature ([N, K], [N, R]) or by in feature ([K, N], [R, N]), both the same way.
// Pitches in elements, multiples of 8; pointers on 16 bytes. R = 0 leaves z and B out.
struct GemmArgs {
  DType dtype = DType::bf16;
  bool by_out = true;
  const void* x = nullptr;
  const void* w = nullptr;
  const void* z = nullptr;
  const void* b = nullptr;
  const void* bias = nullptr;
  void* y = nullptr;
  std::int64_t pitch_x = 0, pitch_w = 0, pitch_z = 0, pitch_b = 0, pitch_y = 0;
  int m = 0, n = 0, k = 0, r = 0;
  // With a seed: z B^T is dropped by common/philox.h's mask, what is kept is scaled.
  const std::int64_t* seed = nullptr;
  std::uint32_t threshold = 0;
  float keep_scale = 1.0F;
};

// Which kernel, and in which order it walks over the tiles of y.
struct GemmPlan {
  int kernel = -1;  // index into kGemmNames; -1: the library's GEMM is the better one
  int swizzle = 1;
  bool along_n = false;
};

// Tile, schedule, cluster; "wide": the epilogue stores 64 columns at a time, not 32.
inline constexpr std::string_view kGemmNames[] = {
    "gemm_sm90_128x256_cooperative_2x1_wide",
    "gemm_sm90_128x256_cooperative_2x1",
    "gemm_sm90_128x128_pingpong_1x2",
    "gemm_sm90_128x256_cooperative_2x1_masked",
};
inline constexpr int kGemmMasked = 3;  // the one that takes a mask, and only with one

// The measured plan of the nearest shape in gemm_plans.inc.
GemmPlan plan_gemm(bool by_out, std::int64_t m, std::int64_t n, std::int64_t k);

}  // namespace pyfast::lora
