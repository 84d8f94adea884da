// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

#include "bindings/bindings.h"
#include "bindings/build_info.h"

namespace py = pybind11;

namespace {

// "80;90a" -> ["80", "90a"]
py::list split(const std::string& text) {
  py::list items;
  std::istringstream stream(text);
  for (std::string item; std::getline(stream, item, ';');) items.append(item);
  return items;
}

py::object text_or_none(const std::string& text) {
  return text.empty() ? py::object(py::none()) : py::object(py::str(text));
}

py::dict build_info() {
  py::dict info;
  info["version"] = PYFAST_VERSION;
  info["compiler"] = PYFAST_COMPILER;
  info["build_type"] = PYFAST_BUILD_TYPE;
  info["cuda"] = text_or_none(PYFAST_CUDA_VERSION);
  info["cuda_architectures"] = split(PYFAST_CUDA_ARCHITECTURES);
  info["cpu_isas"] = split(PYFAST_CPU_ISAS);
  info["cutlass"] = text_or_none(PYFAST_CUTLASS_VERSION);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "pyfast's kernels. Raw pointers in: call them through pyfast.ops.";
  m.def("build_info", &build_info, "What this extension was built with and for.");
  m.def("variants", &pyfast::variants, py::arg("op"), "The kernels of `op`, best first.");
  pyfast::bind_adapter(m);
  pyfast::bind_dora(m);
  pyfast::bind_dropout(m);
  pyfast::bind_lora(m);
  pyfast::bind_nf4(m);
  pyfast::bind_remake(m);
}
