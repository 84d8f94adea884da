// SPDX-License-Identifier: Apache-2.0
#include "lora/gemm_sm80.cuh"

namespace pyfast::lora {

void launch_gemm_sm80_f16_tn(const GemmArgs& args, const GemmPlan& plan, void* stream) {
  launch_gemm_sm80<__half, true>(args, plan, static_cast<cudaStream_t>(stream));
}

}  // namespace pyfast::lora
