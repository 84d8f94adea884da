// SPDX-License-Identifier: Apache-2.0
#include "adapter/launch.cuh"

namespace pyfast::adapter {
namespace {

template <class S>
Cut rows_cut(std::int64_t m, std::int64_t k, int sm_count) {
  const std::int64_t blocks = ceil_div(m, S::kRows), chunks = ceil_div(k, S::kCols);
  Cut best;
  best.bands = static_cast<int>(blocks);
  float least = 0;
  for (std::int64_t slabs = 1; slabs <= std::min<std::int64_t>(chunks, 64); ++slabs) {
    const std::int64_t length = ceil_div(chunks, slabs);
    const auto waves = static_cast<float>(ceil_div(blocks * slabs, sm_count));
    // One more launch, and sums that go through the L2 as 70 blocks read chunks.
    constexpr float kSum = static_cast<float>(S::kPart) * 8.0F / S::kStage / 70.0F;
    const float meeting = slabs == 1 ? 0.0F : 4.0F + kSum * static_cast<float>(slabs * blocks);
    const float cost = waves * (static_cast<float>(length) + 4.0F) + meeting;
    if (least == 0 || cost < least) {
      least = cost;
      best.chunks = static_cast<int>(length);
      best.slabs = static_cast<int>(ceil_div(chunks, length));
    }
  }
  return best;
}

}  // namespace

const Launchers& launchers_bf16() { return kLaunchers<__nv_bfloat16>; }

Cuts cuts(std::int64_t m, std::int64_t k, std::int64_t r, int sm_count) {
  return visit_rank(r, [&](auto rank) -> Cuts {
    constexpr int kRank = decltype(rank)::value;
    return {rows_cut<RowsShape<kRank>>(m, k, sm_count),
            walk_cut<UpShape<kRank>>(m, k, sm_count, 0.0F),
            walk_cut<GradsShape<kRank>>(m, k, sm_count, 0.5F), RowsShape<kRank>::kPart};
  });
}
int most_shared_bytes(std::int64_t r) {
  return visit_rank(r, [](auto rank) {
    constexpr int kRank = decltype(rank)::value;
    return std::max({RowsShape<kRank>::kShared + RowsShape<kRank>::kStatic, UpShape<kRank>::kShared,
                     GradsShape<kRank>::kShared});
  });
}

}  // namespace pyfast::adapter
