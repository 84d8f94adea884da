// SPDX-License-Identifier: Apache-2.0
#include "nf4/gemm_sm90.cuh"

namespace pyfast::nf4 {

void launch_gemm_sm90_f16(const GemmParams& params, const Placement& place) {
  if (params.by_out) {
    PackedGemm<cutlass::half_t, __half, true>::launch(params, place);
  } else {
    PackedGemm<cutlass::half_t, __half, false>::launch(params, place);
  }
}

}  // namespace pyfast::nf4
