// SPDX-License-Identifier: Apache-2.0
// 17 to 256 rows of x on Hopper.
#include <algorithm>

#include "common/shared_memory.cuh"
#include "nf4/few_rows_sm90.h"
#include "nf4/few_rows_wgmma.cuh"
#include "nf4/kernels.h"

namespace pyfast::nf4 {
namespace {

using namespace few;

// Clusters split k where a tile of each is enough, or two and k is long (measured).
WgmmaPlan make_plan(int n, int k, int sm_count) {
  const int shared_rows = sm_count / 2 * kGroupRows;
  if (n <= shared_rows || (n <= 2 * shared_rows && k >= 4096)) return {kGroupRows, true};
  const int passes = ceil_div(n, sm_count * kTileRows);
  return {ceil_div(ceil_div(n, sm_count * passes), 4) * 4, false};  // as rows are stored
}

template <class T, bool kNested, int kTokens>
void launch(const FewRowsParams& params, const Placement& place) {
  using Layout = WgmmaLayout<kTokens>;
  constexpr auto kKernel = few_rows_wgmma_kernel<T, kTokens, kNested>;
  const int sm_count = cuda_device(place.device).sm_count;
  const WgmmaPlan plan = make_plan(params.n, params.k, sm_count);
  const int tiles = ceil_div(params.n, plan.rows);
  const Grid grid{
      .blocks = plan.shared ? std::min(tiles, sm_count / 2) * 2 : std::min(tiles, sm_count),
      .threads = Layout::kThreads,
      .shared_bytes = Layout::kBytes,
      .cluster = plan.shared ? 2 : 1};
  allow_shared_memory<kKernel>(kFewRowsOp, Layout::kBytes);
  launch_grid<kKernel>(grid, params.early, place.stream, map_of_w(params, plan.rows),
                       map_of_x(params, params.m, 1), params, plan);
}

template <class T, bool kNested>
void launch_tokens(const FewRowsParams& params, const Placement& place) {
  if (params.m <= 32) {
    launch<T, kNested, 32>(params, place);
  } else if (params.m <= 64) {
    launch<T, kNested, 64>(params, place);
  } else if (params.m <= 128) {
    launch<T, kNested, 128>(params, place);
  } else if (params.m <= 192) {
    launch<T, kNested, 192>(params, place);
  } else {
    launch<T, kNested, 256>(params, place);
  }
}

template <class T>
void launch_scales(const FewRowsParams& params, const Placement& place) {
  if (params.offset != nullptr) {
    launch_tokens<T, true>(params, place);
  } else {
    launch_tokens<T, false>(params, place);
  }
}

}  // namespace

void launch_few_rows_wgmma_sm90(const FewRowsParams& params, const Placement& place) {
  if (params.dtype == DType::bf16) {
    launch_scales<__nv_bfloat16>(params, place);
  } else {
    launch_scales<__half>(params, place);
  }
}

}  // namespace pyfast::nf4
