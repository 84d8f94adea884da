// SPDX-License-Identifier: Apache-2.0
#include "lora/gemm_sm90.cuh"

namespace pyfast::lora {

void launch_gemm_sm90_bf16_nn(const GemmArgs& args, const GemmPlan& plan, int sm_count, bool early,
                              void* stream) {
  launch_gemm_sm90<cutlass::bfloat16_t, false>(args, plan, sm_count, early,
                                               static_cast<cudaStream_t>(stream));
}

}  // namespace pyfast::lora
