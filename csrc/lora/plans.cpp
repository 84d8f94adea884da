// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>

#include "lora/gemm.h"

namespace pyfast::lora {
namespace {

struct Row {
  bool by_out;
  int m, k, n;
  GemmPlan plan;
};

constexpr Row kRows[] = {
#include "lora/gemm_plans.inc"
};

// Below so many tiles of 128 x 128 the SMs are not filled, and a library that splits a long K is
// faster; with a short one the launches decide, and ours are fewer.
constexpr std::int64_t kFewTiles = 64, kShortK = 512;
bool is_small(std::int64_t m, std::int64_t n, std::int64_t k) {
  return k > kShortK && ((m + 127) / 128) * ((n + 127) / 128) < kFewTiles;
}

// Up to so many tiles of 128 x 128 run at once, and wide ones would leave half of the SMs idle.
constexpr std::int64_t kOneWave = 128;
constexpr int kWide = 0, kNarrow = 1;  // of kGemmNames
bool is_one_wave(std::int64_t m, std::int64_t n) {
  return ((m + 127) / 128) * ((n + 127) / 128) <= kOneWave;
}

std::atomic<bool> allowed_now = true;

}  // namespace

GemmPlan plan_gemm(bool by_out, std::int64_t m, std::int64_t n, std::int64_t k) {
  if (is_small(m, n, k)) return {};
  const auto log = [](std::int64_t size) { return std::log2(static_cast<float>(size)); };
  const float log_m = log(m), log_n = log(n), log_k = log(k);
  GemmPlan best;
  float least = 0;
  for (const Row& row : kRows) {
    if (row.by_out != by_out) continue;
    const float distance = std::fabs(log_m - log(row.m)) + std::fabs(log_n - log(row.n)) +
                           0.5F * std::fabs(log_k - log(row.k));
    if (best.kernel < 0 || distance < least) {
      least = distance;
      best = row.plan;
    }
  }
  if (best.kernel == kWide && is_one_wave(m, n)) best.kernel = kNarrow;
  return best;
}

GemmPlan plan_gemm_sm80(std::int64_t m, std::int64_t n, std::int64_t k, int sm_count) {
  if (is_small(m, n, k)) return {};
  // A wave of the narrow tiles, two blocks to an SM, takes 3 to 5 % longer than one of the wide.
  const auto waves = [&](std::int64_t width, std::int64_t blocks) {
    const std::int64_t tiles = ((m + 127) / 128) * ((n + width - 1) / width);
    return static_cast<float>((tiles + blocks - 1) / blocks);
  };
  const bool wide = waves(256, sm_count) <= 1.05F * waves(128, 2 * sm_count);
  GemmPlan plan;
  plan.kernel = wide ? kGemmSm80Wide : kGemmSm80Narrow;
  plan.swizzle = 8;
  return plan;
}

void allow_making(bool allowed) { allowed_now = allowed; }
bool making_allowed() { return allowed_now; }

std::int64_t making_workspace(std::int64_t m, std::int64_t r) {
  const std::int64_t rows = (m + 255) / 256 * 256;  // whole clusters
  return rows * kMakers * making_width(r) * static_cast<std::int64_t>(sizeof(float));
}

MakingPlan plan_making(std::int64_t m, std::int64_t n, std::int64_t k, std::int64_t r, bool drops,
                       int sm_count) {
  constexpr std::int64_t kTileN = 256, kLeastK = 2048, kMostBytes = 128 << 20;
  constexpr std::int64_t kManyRanks = 64, kManyRanksK = 8192;
  const auto ceil_div = [](std::int64_t a, std::int64_t b) { return (a + b - 1) / b; };
  const std::int64_t rows = ceil_div(m, 256), tiles = ceil_div(n, kTileN), clusters = sm_count / 2;
  const std::int64_t making = clusters / kMakers * kMakers;  // clusters of its grid
  if (r > 128 || k < kLeastK || tiles < kMakers || making == 0 || is_one_wave(m, n)) return {};
  if (making_workspace(m, r) > kMostBytes) return {};
  // 128 ranks: 1.17 of the library's time without them at K = 4096, with z by the library 1.10; at
  // K = 14336 1.05 and 1.08.
  if (r > kManyRanks && k < kManyRanksK) return {};
  // It takes columns eight at a time. What is left over is rounded up or a second GEMM's, and must
  // not cost a wave.
  const std::int64_t whole = tiles / kMakers * kMakers, padded = ceil_div(tiles, kMakers) * kMakers;
  const std::int64_t waves = ceil_div(rows * tiles, clusters);
  const std::int64_t at_once = ceil_div(rows * padded, making);
  const std::int64_t in_two =
      ceil_div(rows * whole, making) + ceil_div(rows * (tiles - whole), clusters);
  if (std::min(at_once, in_two) > waves) return {};
  if (drops && (r > kSideRank || at_once > waves)) return {};
  MakingPlan plan;
  plan.columns = drops || at_once <= in_two ? n : whole * kTileN;
  plan.gemm.kernel = drops ? kGemmMakingDrop : r <= kSideRank ? kGemmMaking16 : kGemmMaking128;
  plan.gemm.swizzle = kMakers;
  plan.gemm.blocks = static_cast<int>(2 * making);
  return plan;
}

}  // namespace pyfast::lora
