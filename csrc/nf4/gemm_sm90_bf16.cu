// SPDX-License-Identifier: Apache-2.0
// Products of 112 columns; CUTLASS would take seven of 16.
#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED
#include "nf4/gemm_sm90.cuh"

namespace pyfast::nf4 {

void launch_gemm_sm90_bf16(const GemmParams& params, int columns, const Placement& place) {
  launch_packed<cutlass::bfloat16_t, __nv_bfloat16>(params, columns, place);
}

}  // namespace pyfast::nf4
