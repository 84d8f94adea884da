// SPDX-License-Identifier: Apache-2.0
// Checks of what would corrupt memory, and the launches.
#include <algorithm>

#include "common/launch.h"
#include "dora/kernels.h"

namespace pyfast::dora {

#ifdef PYFAST_CUDA
namespace {

constexpr std::int64_t kMostSize = std::int64_t{1} << 31;

void check_aligned(std::string_view op, std::string_view name, const void* pointer) {
  check_pointer(op, name, pointer);
  PYFAST_CHECK(reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0, op, ": ", name,
               " must begin on 16 bytes");
}

void check_columns(std::string_view op, const Columns& c) {
  check_dtype(op, c.dtype);
  check_pointer(op, "magnitude", c.magnitude);
  check_pointer(op, "norms", c.norms);
}

void check_sizes(std::string_view op, std::int64_t rows, std::int64_t columns) {
  PYFAST_CHECK(
      rows > 0 && columns > 0 && columns % 8 == 0 && rows < kMostSize && columns < kMostSize, op,
      ": expected rows and a multiple of 8 columns, got ", rows, " x ", columns);
}

}  // namespace

std::string_view norms(const Norms& params, const Placement& place) {
  constexpr std::string_view kOp = "dora_norms";
  check_dtype(kOp, params.dtype);
  check_dtype(kOp, params.adapter_dtype);
  check_sizes(kOp, params.n, params.k);
  PYFAST_CHECK(params.r > 0 && params.r <= kMostRank, kOp, ": expected 1 to ", kMostRank,
               " ranks, got ", params.r);
  check_aligned(kOp, "weight", params.w);
  check_aligned(kOp, "lora_A", params.a);
  check_pointer(kOp, "lora_B", params.b);
  check_pointer(kOp, "norms", params.norms);
  const DeviceGuard guard(place.device);
  launch_norms(params, place.stream);
  return "dora_norms_mma";
}

std::string_view scale(const Scale& params, const Placement& place) {
  constexpr std::string_view kOp = "dora_scale";
  check_sizes(kOp, params.rows, params.columns);
  PYFAST_CHECK(params.rows * (params.columns / 8) < kMostSize && params.r < kMostSize / 8 &&
                   std::max(params.rows, params.columns) * params.r < kMostSize,
               kOp, ": the matrix has too many elements");
  check_aligned(kOp, "x", params.x);
  check_aligned(kOp, "out", params.out);
  check_columns(kOp, params.c);
  const DeviceGuard guard(place.device);
  launch_scale(params, place.stream);
  return params.by_row ? "dora_scale_rows" : "dora_scale_columns";
}

void factors(std::int64_t n, const Columns& c, float* out, const Placement& place) {
  constexpr std::string_view kOp = "dora_factors";
  check_sizes(kOp, 1, n);
  check_columns(kOp, c);
  check_pointer(kOp, "out", out);
  const DeviceGuard guard(place.device);
  launch_factors(n, c, out, place.stream);
}

std::int64_t slices(int device, std::int64_t m, std::int64_t n) {
  // Of 32 rows or more, so many that each SM has the four blocks that fit.
  const std::int64_t wanted = 4 * cuda_device(device).sm_count / ceil_div(n, kTileColumns);
  return std::clamp<std::int64_t>(wanted, 1, ceil_div(m, 32));
}

std::string_view sums(const Sums& params, const Placement& place) {
  constexpr std::string_view kOp = "dora_sums";
  check_sizes(kOp, params.m, params.n);
  check_aligned(kOp, "dy", params.dy);
  check_aligned(kOp, "y", params.y);
  check_columns(kOp, params.c);
  check_aligned(kOp, "parts", params.parts);
  const DeviceGuard guard(place.device);
  launch_sums(params, slices(place.device, params.m, params.n), place.stream);
  return "dora_sums";
}

std::string_view finish(const Finish& params, const Placement& place) {
  constexpr std::string_view kOp = "dora_finish";
  check_sizes(kOp, params.m, params.n);
  check_columns(kOp, params.c);
  if (params.dmagnitude != nullptr) check_pointer(kOp, "parts", params.parts);
  const DeviceGuard guard(place.device);
  launch_finish(params, slices(place.device, params.m, params.n), place.stream);
  return "dora_finish";
}
#endif

std::vector<VariantInfo> variants(std::string_view op) {
  const bool linear = op == "dora_linear" || op == "dora_linear_backward";
  if (!linear && op != "dora_norms") return {};
#ifdef PYFAST_CUDA
  const std::string reason = missing_cuda(80);
#else
  const std::string reason = "this build has no CUDA kernels";
#endif
  if (!linear) return {{"dora_norms_mma", true, reason}};
  const bool forward = op == "dora_linear";
  return {{forward ? "dora_linear_epilogue" : "dora_linear_weight", true, reason},
          {"dora_linear_columns", true, reason}};
}

}  // namespace pyfast::dora
