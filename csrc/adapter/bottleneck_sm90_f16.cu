// SPDX-License-Identifier: Apache-2.0
#include "adapter/launch_sm90.cuh"

namespace pyfast::adapter {

const Products& products_sm90_f16() { return kWideProducts<__half>; }

}  // namespace pyfast::adapter
