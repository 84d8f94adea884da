// SPDX-License-Identifier: Apache-2.0
#include "adapter/launch_sm90.cuh"

namespace pyfast::adapter {
namespace {

template <int kRank, int kRows>
void try_rows(Cut& best, float& least, std::int64_t m, std::int64_t k, int sm_count) {
  using S = WideRowsShape<kRank, kRows>;
  const std::int64_t blocks = ceil_div(m, S::kRows), chunks = ceil_div(k, S::kCols);
  for (int slabs = 1; slabs <= kMostSlabs; slabs *= 2) {
    const std::int64_t length = ceil_div(chunks, slabs);
    // Clusters of more than two leave some of a group of SMs idle.
    const int slots = slabs <= 2 ? sm_count : sm_count - sm_count / 8;
    const auto waves = static_cast<float>(ceil_div(blocks * slabs, slots));
    // In units of 32 KiB: to start a block, to finish its rows, and to meet.
    const float chunk = static_cast<float>(S::kStage) / 32768.0F;
    const float finish = 4.0F +
                         static_cast<float>(kRows * kRank) / 4096.0F / static_cast<float>(slabs) +
                         (slabs > 1 ? 3.0F : 0.0F);
    const float cost = waves * (chunk * static_cast<float>(length) + finish);
    if (least == 0 || cost < least) {
      least = cost;
      best = {static_cast<int>(length), static_cast<int>(blocks), slabs, kRows};
    }
  }
}

template <int kRank>
Cut wide_rows_cut(std::int64_t m, std::int64_t k, int sm_count) {
  Cut best;
  float least = 0;
  try_rows<kRank, 128>(best, least, m, k, sm_count);
  try_rows<kRank, 64>(best, least, m, k, sm_count);
  return best;
}

}  // namespace

const Products& products_sm90_bf16() { return kWideProducts<__nv_bfloat16>; }

Cuts cuts_sm90(std::int64_t m, std::int64_t k, std::int64_t r, int sm_count) {
  return visit_wide_rank(r, [&](auto rank) -> Cuts {
    constexpr int kRank = decltype(rank)::value;
    constexpr Makes kMakes = kRank <= 128 ? Makes::both : Makes::down;  // Makes::up has its cut
    return {wide_rows_cut<kRank>(m, k, sm_count),
            walk_cut<WideUpShape<kRank>>(m, k, sm_count, 0.0F),
            walk_cut<WideGradsShape<kRank, kMakes>>(m, k, sm_count, 0.5F)};
  });
}

}  // namespace pyfast::adapter
