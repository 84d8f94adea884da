// SPDX-License-Identifier: Apache-2.0
#include "lora/skinny_launch.cuh"

namespace pyfast::lora {

void launch_skinny_f16(const SkinnyArgs& args, Order order, int sm_count, void* stream) {
  launch_skinny<__half>(args, order, sm_count, stream);
}

}  // namespace pyfast::lora
