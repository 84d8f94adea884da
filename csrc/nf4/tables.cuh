// SPDX-License-Identifier: Apache-2.0
// The two tables of the format on a GPU: the values of the 16 codes, and of the codes of scales.
#pragma once

#include "nf4/codebook.h"

namespace pyfast::nf4 {

__constant__ float c_codes[16] = {
    kCodes[0], kCodes[1], kCodes[2],  kCodes[3],  kCodes[4],  kCodes[5],  kCodes[6],  kCodes[7],
    kCodes[8], kCodes[9], kCodes[10], kCodes[11], kCodes[12], kCodes[13], kCodes[14], kCodes[15],
};

__device__ const float d_dynamic_map[256] = {
#include "nf4/dynamic_map.inc"
};

}  // namespace pyfast::nf4
