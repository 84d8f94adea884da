// SPDX-License-Identifier: Apache-2.0
#include "adapter/launch.cuh"

namespace pyfast::adapter {

const Launchers& launchers_f16() { return kLaunchers<__half>; }

}  // namespace pyfast::adapter
