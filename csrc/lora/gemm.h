// SPDX-License-Identifier: Apache-2.0
// The contract of the GEMMs of the LoRA linear.
#pragma once

#include <cstdint>
#include <string_view>

#include "common/dtype.h"

namespace pyfast::lora {

// Dropout of a low-rank product, with the mask of common/philox.h; no seed: none.
struct Mask {
  const std::int64_t* seed = nullptr;
  std::uint32_t threshold = 0;
  float scale = 1.0F;  // of what is kept
};

// With Q, stored like W and B, a GEMM makes Z = scale x Q^T itself, of which its z is all or a
// part. Where there are more pairs of x and W, Q goes on for each at the next multiple of
// kPairStep.
struct Making {
  const void* q = nullptr;
  std::int64_t pitch_q = 0;
  int r = 0;          // columns of Z
  void* z = nullptr;  // Z, with the pitch of z
  float scale = 1.0F;
  float* partials = nullptr;     // making_workspace() bytes
  unsigned* counters = nullptr;  // two for 128 rows, zero before and after
};

// A GEMM that makes z for up to 16 ranks can also make, as sums of side_part_bytes(), x^T z with
// another z and t^T z with the z that it makes. In dx = dy W + dz A: dB = dy^T z, dA^T = x^T dz.
struct SideParts {
  const void* z = nullptr;  // [M, R]
  std::int64_t pitch_z = 0;
  float* db = nullptr;      // null: not wanted
  const void* x = nullptr;  // [M, N]
  std::int64_t pitch_x = 0;
  float* da = nullptr;  // null: not wanted
};
inline constexpr int kSideRank = 16;

// Further operands of y: x W^T, with W stored as the first.
struct Pair {
  const void* x = nullptr;
  const void* w = nullptr;
  std::int64_t pitch_x = 0, pitch_w = 0;
  int k = 0;  // 0: there is none
};
inline constexpr int kMorePairs = 2, kPairStep = 64;

// y[M, N] = c (x[M, K] W^T + z[M, R] B^T) + bias[N] with a factor c for each column, all else of
// one 2-byte type, sums in float32. W and B are stored by out feature ([N, K], [N, R]) or by in
// feature ([K, N], [R, N]), both the same way. Pitches in elements, multiples of 8; pointers on 16
// bytes. R = 0 leaves z and B out.
struct GemmArgs {
  DType dtype = DType::bf16;
  bool by_out = true;
  const void* x = nullptr;
  const void* w = nullptr;
  void* z = nullptr;
  const void* b = nullptr;
  const void* bias = nullptr;
  const float* columns = nullptr;  // c [N]; null: 1; needs a plan with a kernel for it
  void* y = nullptr;
  std::int64_t pitch_x = 0, pitch_w = 0, pitch_z = 0, pitch_b = 0, pitch_y = 0;
  int m = 0, n = 0, k = 0, r = 0;
  Pair more[kMorePairs];
  Mask mask;       // of z B^T, or of x where z is made of it; needs a plan with a kernel for it
  Making making;   // the same
  SideParts side;  // needs kGemmMaking16
};

// Which kernel, and in which order it walks over the tiles of y: `swizzle` (a power of two) columns
// of tiles at a time where it goes along M, rows where it goes along N.
struct GemmPlan {
  int kernel = -1;  // index into kGemmNames; -1: the library's GEMM is the better one
  int swizzle = 1;
  bool along_n = false;
  int blocks = 0;  // of the grid; 0: as few as the waves need
};

// Tile, schedule, cluster; what some of them are for: a mask, making z of up to 16 or 128 ranks,
// both for 16 ranks, and factors of columns. Those for sm_80 take factors only.
inline constexpr std::string_view kGemmNames[] = {
    "gemm_sm90_128x256_cooperative_2x1",
    "gemm_sm90_128x128_pingpong_1x2",
    "gemm_sm90_128x256_cooperative_2x1_masked",
    "gemm_sm90_128x256_cooperative_2x1_making_16",
    "gemm_sm90_128x256_cooperative_2x1_making_128",
    "gemm_sm90_128x256_cooperative_2x1_making_16_masked",
    "gemm_sm90_128x256_cooperative_2x1_scaled",
    "gemm_sm90_128x256_cooperative_2x1_making_16_scaled",
    "gemm_sm80_128x256",
    "gemm_sm80_128x128",
};
inline constexpr int kGemmMasked = 2, kGemmMaking16 = 3, kGemmMaking128 = 4, kGemmMakingDrop = 5;
inline constexpr int kGemmScaled = 6, kGemmMaking16Scaled = 7;
inline constexpr int kGemmSm80Wide = 8, kGemmSm80Narrow = 9;

// The measured plan of the nearest shape in gemm_plans.inc.
GemmPlan plan_gemm(bool by_out, std::int64_t m, std::int64_t n, std::int64_t k);

// The same for the kernels for sm_80, by a rule.
GemmPlan plan_gemm_sm80(std::int64_t m, std::int64_t n, std::int64_t k, int sm_count);

// A plan for the first `columns` of y with a kernel that makes z; 0: better made by a pass of its
// own.
struct MakingPlan {
  GemmPlan gemm;
  std::int64_t columns = 0;
};
MakingPlan plan_making(std::int64_t m, std::int64_t n, std::int64_t k, std::int64_t r, bool drops,
                       int sm_count);
// Such a kernel starts when all of its SMs are free at once. Where kernels of others hold SMs until
// a peer answers (NCCL), that costs their overlap, and two of them can wait in a circle: forbid it.
void allow_making(bool allowed);
bool making_allowed();
// For tests: the kernels for sm_80 serve where `sm` is 80, on any device; 0 ends that.
void force_gemm_sm(int sm);
std::int64_t making_workspace(std::int64_t m, std::int64_t r);
constexpr int making_width(std::int64_t r) { return static_cast<int>((r + 15) / 16 * 16); }
// Blocks of a row of tiles that make its z.
inline constexpr int kMakers = 8;

// Sums that the blocks of such a grid make side by side, one for each row of tiles that it holds.
inline int side_part_rows(const GemmPlan& plan) { return plan.blocks / kMakers; }
// Their width is that of dB or dA rounded up to whole tiles.
inline constexpr int kSideTileDb = 64, kSideTileDa = 256;
constexpr std::int64_t side_part_bytes(int rows, std::int64_t width, int tile) {
  return rows * ((width + tile - 1) / tile * tile) * kSideRank * 4;
}

}  // namespace pyfast::lora
