// SPDX-License-Identifier: Apache-2.0
// The few-row product for GPUs without TMA.
#include "common/check.h"
#include "common/device.h"
#include "common/shared_memory.cuh"
#include "nf4/few_rows_mma.cuh"
#include "nf4/kernels.h"

namespace pyfast::nf4 {
namespace {

using namespace few;

constexpr const char* kOp = "nf4_few_rows";

int most_shared_bytes(int device) {
  int bytes = 0;
  CUDA_CHECK(kOp, cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes;
}

// As many groups of rows as a band needs; the other warps split k, as far as the stages fit.
template <int kTokens>
BandPlan make_plan(const FewRowsParams& params, int blocks, int shared_bytes) {
  const int rows = (params.n + blocks - 1) / blocks;
  int log2_groups_k = 3;
  while (log2_groups_k > 0 && (kBandWarps >> log2_groups_k) * kBandRows < rows) --log2_groups_k;
  for (;; --log2_groups_k) {
    const int stage = BandLayout<kTokens>::stage(1 << log2_groups_k, params.m);
    const int stages = (shared_bytes - BandLayout<kTokens>::kStages) / stage;
    if (stages >= 2) return {log2_groups_k, stages < 3 ? stages : 3};
    PYFAST_CHECK(log2_groups_k > 0, kOp, ": a block needs ",
                 BandLayout<kTokens>::kStages + 2 * stage, " bytes of shared memory, has ",
                 shared_bytes);
  }
}

template <class T, int kTokens, bool kNested>
void launch(const FewRowsParams& params, const Placement& place) {
  constexpr auto kKernel = few_rows_band_kernel<T, kTokens, kNested>;
  const int most = most_shared_bytes(place.device);
  const int blocks = cuda_device(place.device).sm_count;
  const BandPlan plan = make_plan<kTokens>(params, blocks, most);
  const int bytes = BandLayout<kTokens>::kStages +
                    plan.stages * BandLayout<kTokens>::stage(1 << plan.log2_groups_k, params.m);
  allow_shared_memory<kKernel>(kOp, most);
  kKernel<<<blocks, kBandThreads, bytes, static_cast<cudaStream_t>(place.stream)>>>(params, plan);
  CUDA_CHECK(kOp, cudaGetLastError());
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

void launch_few_rows_mma_sm80(const FewRowsParams& params, const Placement& place) {
  if (params.dtype == DType::bf16) {
    launch_tokens<__nv_bfloat16>(params, place);
  } else {
    launch_tokens<__half>(params, place);
  }
}

}  // namespace pyfast::nf4
