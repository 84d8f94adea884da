// SPDX-License-Identifier: Apache-2.0
#include "dropout/dropout.h"

#include "bindings/bindings.h"

namespace py = pybind11;

namespace pyfast {
namespace {

std::string_view dropout_op(int device, std::uintptr_t x, std::uintptr_t out, int dtype,
                            std::int64_t rows, std::int64_t columns, std::uint32_t threshold,
                            std::uintptr_t seed, int threads, std::uintptr_t stream,
                            const std::string& variant) {
  return dropout::dropout({.x = pointer<const void>(x),
                           .out = pointer<void>(out),
                           .dtype = static_cast<DType>(dtype),
                           .rows = rows,
                           .columns = columns,
                           .threshold = threshold,
                           .seed = pointer<const std::int64_t>(seed)},
                          {device, threads, pointer<void>(stream)}, variant);
}

}  // namespace

void bind_dropout(py::module_& m) {
  m.def("dropout", &dropout_op, Unlocked(), py::kw_only(), py::arg("device"), py::arg("x"),
        py::arg("out"), py::arg("dtype"), py::arg("rows"), py::arg("columns"), py::arg("threshold"),
        py::arg("seed"), py::arg("threads"), py::arg("stream"), py::arg("variant") = "",
        "Write x[rows, columns] / (1 - threshold / 65536) or 0 to out. Returns the kernel's name.");
}

}  // namespace pyfast
