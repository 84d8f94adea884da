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

std::atomic<bool> allowed_now = true;

}  // namespace

GemmPlan plan_gemm(bool by_out, std::int64_t m, std::int64_t n, std::int64_t k) {
  if (k > kShortK && ((m + 127) / 128) * ((n + 127) / 128) < kFewTiles) return {};
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
  return best;
}

void allow_making(bool allowed) { allowed_now = allowed; }
bool making_allowed() { return allowed_now; }

std::int64_t making_workspace(std::int64_t m, std::int64_t r) {
  const std::int64_t rows = (m + 255) / 256 * 256;  // whole clusters
  return rows * kMakingSlices * making_width(r) * static_cast<std::int64_t>(sizeof(float));
}

MakingPlan plan_making(std::int64_t m, std::int64_t n, std::int64_t k, std::int64_t r,
                       int sm_count) {
  constexpr std::int64_t kTileN = 256, kLeastK = 2048, kMostBytes = 128 << 20;
  const auto ceil_div = [](std::int64_t a, std::int64_t b) { return (a + b - 1) / b; };
  const std::int64_t rows = ceil_div(m, 256), clusters = sm_count / 2;
  if (r > 128 || k < kLeastK || making_workspace(m, r) > kMostBytes) return {};
  // The grid must hold whole rows of tiles, and should not need more waves for it. Of a wide y the
  // first part makes z and a second GEMM the rest.
  const auto fits = [&](std::int64_t tiles) {
    if (tiles < kMakingSlices / 2 || tiles > clusters) return false;
    return ceil_div(rows, clusters / tiles) <= ceil_div(rows * tiles, clusters);
  };
  std::int64_t tiles = ceil_div(n, kTileN);
  if (!fits(tiles)) tiles = std::min<std::int64_t>(tiles, kMakingSlices);
  if (!fits(tiles)) return {};
  MakingPlan plan;
  plan.columns = std::min(n, tiles * kTileN);
  plan.gemm.kernel = r <= 16 ? kGemmMaking16 : kGemmMaking128;
  plan.gemm.along_n = true;
  plan.gemm.blocks = static_cast<int>(2 * tiles * std::min(rows, clusters / tiles));
  return plan;
}

}  // namespace pyfast::lora
