// SPDX-License-Identifier: Apache-2.0
// Errors: PYFAST_CHECK for what a caller got wrong, CUDA_CHECK for what the driver reports.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace pyfast {

template <class... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

}  // namespace pyfast

// Throws std::invalid_argument (ValueError in Python) whose sentence is the concatenated parts.
#define PYFAST_CHECK(condition, ...)                              \
  do {                                                            \
    if (!(condition)) [[unlikely]]                                \
      throw std::invalid_argument(::pyfast::concat(__VA_ARGS__)); \
  } while (false)

// Throws std::runtime_error naming the op, the CUDA error and the place. Needs cuda_runtime_api.h.
#define CUDA_CHECK(op, call)                                                                     \
  do {                                                                                           \
    const cudaError_t cuda_check_status = (call);                                                \
    if (cuda_check_status != cudaSuccess) [[unlikely]]                                           \
      throw std::runtime_error(::pyfast::concat(op, ": CUDA error \"",                           \
                                                cudaGetErrorString(cuda_check_status), "\" at ", \
                                                __FILE_NAME__, ":", __LINE__));                  \
  } while (false)
