// SPDX-License-Identifier: Apache-2.0
#include "lora/skinny_launch.cuh"

namespace pyfast::lora {

void launch_skinny_bf16(const SkinnyProduct& first, const SkinnyProduct* second, int sm_count,
                        void* stream) {
  launch_skinny<__nv_bfloat16>(first, second, sm_count, stream);
}

// The same for both types, as they are of one size.
std::int64_t skinny_workspace(const SkinnyArgs& args, int sm_count) {
  std::int64_t bytes = 0;
  skinny::visit_shape(args, [&](auto shape) {
    using S = decltype(shape);
    bytes = skinny::workspace<S>(skinny::plan<S>(args, sm_count));
  });
  return bytes;
}

}  // namespace pyfast::lora
