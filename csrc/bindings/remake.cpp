// SPDX-License-Identifier: Apache-2.0
#include "bindings/bindings.h"
#include "remake/norm.h"

namespace py = pybind11;

namespace pyfast {

#ifdef PYFAST_CUDA

void bind_remake(py::module_& m) {
  using Address = std::uintptr_t;
  m.def(
      "remake_norm",
      [](int device, Address stream, int dtype, std::int64_t rows, std::int64_t cols, Address x,
         Address inverse, Address weight, Address y) {
        remake::norm({.dtype = static_cast<DType>(dtype),
                      .rows = rows,
                      .cols = cols,
                      .x = pointer<const void>(x),
                      .inverse = pointer<const float>(inverse),
                      .weight = pointer<const void>(weight),
                      .y = pointer<void>(y)},
                     {device, 1, pointer<void>(stream)});
      },
      Unlocked(), "Enqueue an RMSNorm's output again.");
}

#else

void bind_remake(py::module_&) {}

#endif

}  // namespace pyfast
