// SPDX-License-Identifier: Apache-2.0
// Up to 16 rows of x on Hopper.
#include "common/shared_memory.cuh"
#include "nf4/few_rows_sm90.h"
#include "nf4/few_rows_tma.cuh"
#include "nf4/kernels.h"

namespace pyfast::nf4 {
namespace {

using namespace few;

template <class T, int kTokens, bool kNested>
void launch(const FewRowsParams& params, const Placement& place) {
  using Layout = FedLayout<kTokens>;
  constexpr auto kKernel = few_rows_fed_kernel<T, kTokens, kNested>;
  const int sm_count = cuda_device(place.device).sm_count;
  const FedPlan plan = Layout::make_plan(params.n, sm_count);
  allow_shared_memory<kKernel>(kFewRowsOp, kMostSharedBytes);
  const Grid grid{.blocks = ceil_div(params.n, plan.rows * plan.passes),
                  .threads = kFedThreads,
                  .shared_bytes = Layout::bytes(plan.rows, plan.slots)};
  launch_grid<kKernel>(grid, params.early, place.stream, map_of_w(params, plan.rows),
                       map_of_x(params, kTokens, 4), params, plan);
}

template <class T, int kTokens>
void launch_scales(const FewRowsParams& params, const Placement& place) {
  if (params.offset != nullptr) {
    launch<T, kTokens, true>(params, place);
  } else {
    launch<T, kTokens, false>(params, place);
  }
}

template <class T>
void launch_tokens(const FewRowsParams& params, const Placement& place) {
  if (params.m <= 8) {
    launch_scales<T, 8>(params, place);
  } else {
    launch_scales<T, 16>(params, place);
  }
}

}  // namespace

void launch_few_rows_mma_sm90(const FewRowsParams& params, const Placement& place) {
  if (params.dtype == DType::bf16) {
    launch_tokens<__nv_bfloat16>(params, place);
  } else {
    launch_tokens<__half>(params, place);
  }
}

}  // namespace pyfast::nf4
