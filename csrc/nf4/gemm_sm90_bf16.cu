// SPDX-License-Identifier: Apache-2.0
#include "nf4/gemm_sm90.cuh"

namespace pyfast::nf4 {

void launch_gemm_sm90_bf16(const GemmParams& params, const Placement& place) {
  if (params.by_out) {
    PackedGemm<cutlass::bfloat16_t, __nv_bfloat16, true>::launch(params, place);
  } else {
    PackedGemm<cutlass::bfloat16_t, __nv_bfloat16, false>::launch(params, place);
  }
}

}  // namespace pyfast::nf4
