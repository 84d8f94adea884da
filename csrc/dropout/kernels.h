// SPDX-License-Identifier: Apache-2.0
// The kernels that dispatch.cpp chooses from. CPU kernels do a range of groups on the calling
// thread; the CUDA launcher enqueues the whole tensor on the current device.
//
// A group is the kMaskColumns columns of a row that a word of the mask serves; a row's last one may
// be short. Groups are counted row by row.
#pragma once

#include "dropout/dropout.h"

namespace pyfast::dropout {

void dropout_scalar(const DropoutParams& params, std::int64_t begin, std::int64_t end);
void dropout_avx2(const DropoutParams& params, std::int64_t begin, std::int64_t end);
void dropout_avx512(const DropoutParams& params, std::int64_t begin, std::int64_t end);

void launch_dropout(const DropoutParams& params, const Placement& place);

}  // namespace pyfast::dropout
