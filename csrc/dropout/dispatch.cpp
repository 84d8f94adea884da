// SPDX-License-Identifier: Apache-2.0
// The one place that chooses a dropout kernel.
#include "common/launch.h"
#include "common/philox.h"
#include "dropout/kernels.h"

namespace pyfast::dropout {

static Split split(const DropoutParams& params) {
  return {params.rows * ceil_div(params.columns, kMaskColumns), 16384 / kMaskColumns};
}

namespace {

constexpr Variant<DropoutParams> kDropout[] = {
#ifdef PYFAST_CUDA
    {"dropout_cuda", Isa::scalar, 80, on_cuda<launch_dropout, DropoutParams>},
#endif
#ifdef PYFAST_X86
    {"dropout_avx512", Isa::avx512, 0, on_cpu<dropout_avx512, DropoutParams>},
    {"dropout_avx2", Isa::avx2, 0, on_cpu<dropout_avx2, DropoutParams>},
#endif
    {"dropout_scalar", Isa::scalar, 0, on_cpu<dropout_scalar, DropoutParams>},
};

}  // namespace

std::string_view dropout(const DropoutParams& params, const Placement& place,
                         std::string_view variant) {
  constexpr std::string_view kOp = "dropout";
  constexpr std::int64_t kMostRows = std::int64_t{1} << 32, kMostColumns = std::int64_t{1} << 35;
  check_dtype(kOp, params.dtype);
  PYFAST_CHECK(params.rows >= 0 && params.rows <= kMostRows, kOp,
               ": rows must be from 0 to 2^32, got ", params.rows);
  PYFAST_CHECK(params.columns >= 0 && params.columns <= kMostColumns, kOp,
               ": columns must be from 0 to 2^35, got ", params.columns);
  PYFAST_CHECK(params.threshold <= kMaskLevels, kOp, ": threshold must be from 0 to 65536, got ",
               params.threshold);
  if (params.rows > 0 && params.columns > 0) {
    check_pointer(kOp, "x", params.x);
    check_pointer(kOp, "out", params.out);
    check_pointer(kOp, "seed", params.seed);
  }
  return dispatch<DropoutParams>(kOp, kDropout, params, place, variant);
}

std::vector<VariantInfo> variants(std::string_view op) {
  if (op == "dropout") return describe<DropoutParams>(kDropout);
  return {};
}

}  // namespace pyfast::dropout
