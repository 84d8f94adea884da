// SPDX-License-Identifier: Apache-2.0
// 17 to 256 rows of x on Hopper.
#include "common/shared_memory.cuh"
#include "nf4/few_rows_sm90.h"
#include "nf4/few_rows_wgmma.cuh"
#include "nf4/kernels.h"

namespace pyfast::nf4 {
namespace {

using namespace few;

template <class T, bool kNested, int kTokens, bool kExact, int kGroupsRows, int kGroupsK>
void launch(const FewRowsParams& params, const Placement& place) {
  using Layout = WgmmaLayout<kTokens, kExact, kGroupsRows, kGroupsK>;
  constexpr auto kKernel =
      few_rows_wgmma_kernel<T, kTokens, kExact, kNested, kGroupsRows, kGroupsK>;
  const int sm_count = cuda_device(place.device).sm_count;
  WgmmaPlan plan{};
  plan.passes = ceil_div(params.n, sm_count * Layout::kMostRows);
  plan.rows = ceil_div(params.n, sm_count * plan.passes);
  allow_shared_memory<kKernel>(kFewRowsOp, Layout::kBytes);
  launch_grid<kKernel>(ceil_div(params.n, plan.rows * plan.passes), Layout::kThreads,
                       Layout::kBytes, params.early, place.stream, map_of_w(params, plan.rows),
                       map_of_x(params, kTokens, 1), params, plan);
}

// Four warpgroups: two of rows, which split k, or four where a tile has so many rows.
template <class T, bool kNested, int kTokens>
void launch_four(const FewRowsParams& params, const Placement& place) {
  if (params.n <= cuda_device(place.device).sm_count * 128) {
    launch<T, kNested, kTokens, false, 2, 2>(params, place);
  } else {
    launch<T, kNested, kTokens, false, 4, 1>(params, place);
  }
}

template <class T, bool kNested>
void launch_tokens(const FewRowsParams& params, const Placement& place) {
  if (params.m <= 32) {
    launch_four<T, kNested, 32>(params, place);
  } else if (params.m <= 64) {
    launch_four<T, kNested, 64>(params, place);
  } else if (params.m <= 128) {
    launch<T, kNested, 128, false, 2, 1>(params, place);
  } else {
    launch<T, kNested, 256, true, 2, 1>(params, place);
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
