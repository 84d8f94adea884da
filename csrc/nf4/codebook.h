// SPDX-License-Identifier: Apache-2.0
// The constants of the format, as exact hexadecimal floats. Recomputing the codebook from the
// normal distribution does not give these digits.
#pragma once

#include <cstdint>

namespace pyfast::nf4 {

// sha256 of the 64 little-endian bytes:
// 8501941daa1b8a90ad1bbfeb632e5101b5dddbc4bb52d6e55abcfd777e60c06a.
inline constexpr float kCodes[16] = {
    -0x1p+0F,        -0x1.647362p-1F, -0x1.0cd66p-1F,  -0x1.94654p-2F,
    -0x1.23449ap-2F, -0x1.7a6a7ep-3F, -0x1.74f0e2p-4F, 0x0p+0F,
    0x1.45f5fep-4F,  0x1.4995c6p-3F,  0x1.f809bap-3F,  0x1.5a0674p-2F,
    0x1.c3497p-2F,   0x1.200f56p-1F,  0x1.722766p-1F,  0x1p+0F,
};

// The code of x in [-1, 1] is the number of thresholds below x. They are the fp32 midpoints of the
// codes.
inline constexpr float kThresholds[15] = {
    -0x1.b239bp-1F,  -0x1.38a4ep-1F,  -0x1.d709p-2F,  -0x1.5bd4ecp-2F, -0x1.e079d8p-3F,
    -0x1.1a7178p-3F, -0x1.74f0e2p-5F, 0x1.45f5fep-5F, 0x1.ec90c4p-4F,  0x1.a0cfcp-3F,
    0x1.2b05a8p-2F,  0x1.8ea7f2p-2F,  0x1.00da08p-1F, 0x1.491b5ep-1F,  0x1.b913b4p-1F,
};

inline constexpr float kDynamicMap[256] = {
#include "nf4/dynamic_map.inc"
};

// Two all-zero codes: what an all-zero pair of elements packs to.
constexpr std::uint8_t kZeroByte = 0x77;

// [-1, 1] cut into buckets that hold at most one threshold: x lies in bucket round(15 x + 16), from
// 1 to 31. No threshold is nearer to a bucket's edge than 1e-3, so rounding in that formula cannot
// part a value from its threshold. The code of x is base[bucket] + (x > threshold[bucket]).
struct Buckets {
  float threshold[32];  // above 1 where the bucket has none
  std::int32_t base[32];
};

constexpr Buckets make_buckets() {
  Buckets buckets{};
  int below = 0;
  for (int i = 0; i < 32; ++i) {
    buckets.base[i] = below;
    buckets.threshold[i] = 2.0F;
    const float upper_edge = (static_cast<float>(i) + 0.5F - 16.0F) / 15.0F;
    if (below < 15 && kThresholds[below] < upper_edge) buckets.threshold[i] = kThresholds[below++];
  }
  return buckets;
}

inline constexpr Buckets kBuckets = make_buckets();

}  // namespace pyfast::nf4
