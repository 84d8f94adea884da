// SPDX-License-Identifier: Apache-2.0
#include "dora/dora.h"

#include "bindings/bindings.h"

namespace py = pybind11;

namespace pyfast {

#ifdef PYFAST_CUDA
namespace {

using Address = std::uintptr_t;

dora::Columns columns(int dtype, Address magnitude, Address norms) {
  return {static_cast<DType>(dtype), pointer<const void>(magnitude), pointer<const float>(norms)};
}

std::string_view norms(int device, Address stream, int dtype, int adapter_dtype, std::int64_t n,
                       std::int64_t k, std::int64_t r, Address w, std::int64_t pitch_w, Address a,
                       Address b, float scale, Address norms) {
  return dora::norms({.dtype = static_cast<DType>(dtype),
                      .adapter_dtype = static_cast<DType>(adapter_dtype),
                      .n = n,
                      .k = k,
                      .r = r,
                      .w = pointer<const void>(w),
                      .pitch_w = pitch_w,
                      .a = pointer<const void>(a),
                      .b = pointer<const void>(b),
                      .scale = scale,
                      .norms = pointer<float>(norms)},
                     {device, 1, pointer<void>(stream)});
}

std::string_view scale(int device, Address stream, bool by_row, std::int64_t rows,
                       std::int64_t cols, Address x, std::int64_t pitch, Address out, int dtype,
                       Address magnitude, Address norms, int factor_dtype, std::int64_t r,
                       Address b, Address scaled_b) {
  return dora::scale({.by_row = by_row,
                      .rows = rows,
                      .columns = cols,
                      .x = pointer<const void>(x),
                      .pitch = pitch,
                      .out = pointer<void>(out),
                      .c = columns(dtype, magnitude, norms),
                      .factor_dtype = static_cast<DType>(factor_dtype),
                      .r = r,
                      .b = pointer<const void>(b),
                      .scaled_b = pointer<void>(scaled_b)},
                     {device, 1, pointer<void>(stream)});
}

void factors(int device, Address stream, std::int64_t n, int dtype, Address magnitude,
             Address norms, Address out) {
  dora::factors(n, columns(dtype, magnitude, norms), pointer<float>(out),
                {device, 1, pointer<void>(stream)});
}

std::string_view sums(int device, Address stream, std::int64_t m, std::int64_t n, Address dy,
                      std::int64_t pitch_dy, Address y, Address scaled_dy, int dtype,
                      Address magnitude, Address norms, Address parts) {
  return dora::sums({.m = m,
                     .n = n,
                     .dy = pointer<const void>(dy),
                     .pitch_dy = pitch_dy,
                     .y = pointer<const void>(y),
                     .scaled_dy = pointer<void>(scaled_dy),
                     .c = columns(dtype, magnitude, norms),
                     .parts = pointer<float>(parts)},
                    {device, 1, pointer<void>(stream)});
}

std::string_view finish(int device, Address stream, std::int64_t m, std::int64_t n, std::int64_t r,
                        Address parts, int dtype, Address magnitude, Address norms,
                        Address dmagnitude, int factor_dtype, Address db) {
  return dora::finish({.m = m,
                       .n = n,
                       .r = r,
                       .parts = pointer<const float>(parts),
                       .c = columns(dtype, magnitude, norms),
                       .dmagnitude = pointer<void>(dmagnitude),
                       .factor_dtype = static_cast<DType>(factor_dtype),
                       .db = pointer<void>(db)},
                      {device, 1, pointer<void>(stream)});
}

}  // namespace
#endif

void bind_dora([[maybe_unused]] py::module_& m) {
#ifdef PYFAST_CUDA
  m.def("dora_norms", &norms, Unlocked(), "Write the norms. Returns the kernel's name.");
  m.def("dora_scale", &scale, Unlocked(), "Write c times a matrix, and c B.");
  m.def("dora_factors", &factors, Unlocked(), "Write c.");
  m.def("dora_slices", &dora::slices, "Rows of the parts that dora_sums writes.");
  m.def("dora_sums", &sums, Unlocked(), "Write parts of the sums of dy y, and c dy.");
  m.def("dora_finish", &finish, Unlocked(), "Write dmagnitude, and scale dB.");
  m.attr("dora_most_rank") = dora::kMostRank;
#endif
}

}  // namespace pyfast
