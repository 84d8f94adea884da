// SPDX-License-Identifier: Apache-2.0
#include "lora/skinny_launch.cuh"

namespace pyfast::lora {

void launch_skinny_f16(const SkinnyProduct& first, const SkinnyProduct* second, int sm_count,
                       void* stream) {
  launch_skinny<__half>(first, second, sm_count, stream);
}

}  // namespace pyfast::lora
