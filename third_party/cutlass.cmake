# SPDX-License-Identifier: Apache-2.0
# Defines third_party::cutlass (headers only) and CUTLASS_VERSION. The headers come from CUTLASS_DIR (a
# checkout, whose include/ holds cutlass/), else from the Python package nvidia-cutlass.

set(CUTLASS_DIR "" CACHE PATH "A CUTLASS checkout; empty: the Python package nvidia-cutlass")

if(CUTLASS_DIR)
  set(cutlass_include "${CUTLASS_DIR}/include")
else()
  # Found without importing it: the package's own imports are heavy and not needed.
  execute_process(
    COMMAND
      "${Python_EXECUTABLE}" -c
      "import importlib.util as u; s = u.find_spec('cutlass_library'); \
print(s.submodule_search_locations[0] if s else '', end='')"
    OUTPUT_VARIABLE cutlass_package
    ERROR_QUIET
  )
  set(cutlass_include "${cutlass_package}/source/include")
endif()

if(NOT EXISTS "${cutlass_include}/cutlass/version.h")
  message(
    FATAL_ERROR
    "The CUDA build needs the CUTLASS headers, and \"${cutlass_include}\" has no cutlass/version.h. "
    "Run \"pip install nvidia-cutlass==4.2.0.0\", or set CUTLASS_DIR to a CUTLASS checkout, or build "
    "for CPU with PYFAST_CUDA=OFF."
  )
endif()

file(
  STRINGS "${cutlass_include}/cutlass/version.h"
  cutlass_lines
  REGEX "define CUTLASS_(MAJOR|MINOR|PATCH)"
)
set(cutlass_parts "")
foreach(part IN ITEMS MAJOR MINOR PATCH)
  if(NOT cutlass_lines MATCHES "CUTLASS_${part} +([0-9]+)")
    message(FATAL_ERROR "${cutlass_include}/cutlass/version.h does not define CUTLASS_${part}.")
  endif()
  list(APPEND cutlass_parts "${CMAKE_MATCH_1}")
endforeach()
list(JOIN cutlass_parts "." CUTLASS_VERSION)
message(STATUS "CUTLASS ${CUTLASS_VERSION}: ${cutlass_include}")

add_library(third_party_cutlass INTERFACE)
add_library(third_party::cutlass ALIAS third_party_cutlass)
target_include_directories(third_party_cutlass SYSTEM INTERFACE "${cutlass_include}")
