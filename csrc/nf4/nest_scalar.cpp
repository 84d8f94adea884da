// SPDX-License-Identifier: Apache-2.0
// 8-bit codes of the scales, by the rule of bitsandbytes on CPU: [-1, 1] is cut into 65,536 bins,
// and a bin has the code nearest to its own centre. One code in 500 therefore differs by one from
// the nearest, which the CUDA kernel takes, as bitsandbytes' does.
#include <algorithm>
#include <array>
#include <cmath>

#include "nf4/codebook.h"
#include "nf4/kernels.h"

namespace pyfast::nf4 {
namespace {

constexpr int kBins = 65536;

const std::array<std::uint8_t, kBins>& bin_codes() {
  static const std::array<std::uint8_t, kBins> codes = [] {
    std::array<std::uint8_t, kBins> table{};
    std::size_t code = 0;
    for (int bin = 0; bin < kBins; ++bin) {
      const float centre = -1.0F + 2.0F * static_cast<float>(bin) / static_cast<float>(kBins - 1);
      while (code < 255 && 0.5F * (kDynamicMap[code] + kDynamicMap[code + 1]) < centre) ++code;
      table[static_cast<std::size_t>(bin)] = static_cast<std::uint8_t>(code);
    }
    return table;
  }();
  return codes;
}

// NaN gives bin 0. The last step is a fused multiply-add in bitsandbytes' build; in double it is
// exact before the one rounding, so it needs no FMA instruction here.
std::size_t bin_of(float x) {
  if (!(x >= -1.0F)) return 0;
  x = std::min(x, 1.0F);
  const float half = (x + 1.0F) * 0.5F;
  return static_cast<std::size_t>(
      static_cast<float>(static_cast<double>(half) * (kBins - 1) + 0.5));
}

}  // namespace

void nest_scalar(const NestParams& params, std::int64_t begin, std::int64_t end) {
  const std::array<std::uint8_t, kBins>& codes = bin_codes();
  const float offset = *params.offset;
  for (std::int64_t group = begin; group < end; ++group) {
    const std::int64_t first = group * kNestedBlocksize;
    const std::int64_t last = std::min(first + kNestedBlocksize, params.num_blocks);
    float most = 0.0F;
    for (std::int64_t i = first; i < last; ++i) {
      most = std::max(most, std::fabs(params.absmax[i] - offset));  // NaN is passed over
    }
    params.nested_absmax[group] = most;
    if (most == 0.0F) {
      std::fill(params.codes + first, params.codes + last, std::uint8_t{0});
      continue;
    }
    const float factor = 1.0F / most;
    for (std::int64_t i = first; i < last; ++i) {
      params.codes[i] = codes[bin_of((params.absmax[i] - offset) * factor)];
    }
  }
}

}  // namespace pyfast::nf4
