// SPDX-License-Identifier: Apache-2.0
// The launchers behind dispatch.cpp; they enqueue on the current device.
#pragma once

#include "dora/dora.h"

namespace pyfast::dora {

void launch_norms(const Norms& params, void* stream);
void launch_scale(const Scale& params, void* stream);
void launch_factors(std::int64_t n, const Columns& c, float* out, void* stream);
void launch_sums(const Sums& params, std::int64_t slices, void* stream);
void launch_finish(const Finish& params, std::int64_t slices, void* stream);

// Columns of a tile of `sums`.
inline constexpr int kTileColumns = 256;

}  // namespace pyfast::dora
