// SPDX-License-Identifier: Apache-2.0
// What the files of the Python binding share. Device -1 is the CPU; pointers and streams are
// integers.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "common/variant.h"

namespace pyfast {

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);  // NOLINT: the interface is integers
}

// The interpreter is free while a kernel runs or is enqueued.
using Unlocked = pybind11::call_guard<pybind11::gil_scoped_release>;

// A list of {"name", "device", "reason"}; throws for an op that does not exist.
pybind11::list variants(const std::string& op);

void bind_adapter(pybind11::module_& m);
void bind_dora(pybind11::module_& m);
void bind_dropout(pybind11::module_& m);
void bind_lora(pybind11::module_& m);
void bind_nf4(pybind11::module_& m);
void bind_remake(pybind11::module_& m);

}  // namespace pyfast
