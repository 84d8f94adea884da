// SPDX-License-Identifier: Apache-2.0
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

// Below so many tiles of 128 x 128 the SMs are not filled, and a library that splits K is faster.
constexpr std::int64_t kFewTiles = 64;

}  // namespace

GemmPlan plan_gemm(bool by_out, std::int64_t m, std::int64_t n, std::int64_t k) {
  if (((m + 127) / 128) * ((n + 127) / 128) < kFewTiles) return {};
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

}  // namespace pyfast::lora
