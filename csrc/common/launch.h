// SPDX-License-Identifier: Apache-2.0
// What the dispatch files share: how a row of a table launches its kernel, and checks of arguments
// that would corrupt memory.
#pragma once

#include <cstdint>
#include <string_view>

#include "common/check.h"
#include "common/device.h"
#include "common/dtype.h"
#include "common/parallel.h"
#include "common/variant.h"

namespace pyfast {

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Units of work of a call, and how many of them are worth a thread's wake-up (about 5 us).
struct Split {
  std::int64_t count, grain;
};

// CPU rows: `kRange` does a range of units; `split(params)`, found beside Params, counts them.
template <auto kRange, class Params>
void on_cpu(const Params& params, const Placement& place) {
  const Split units = split(params);
  parallel_for(units.count, units.grain, place.threads,
               [&](std::int64_t begin, std::int64_t end) { kRange(params, begin, end); });
}

#ifdef PYFAST_CUDA
// CUDA rows: launch on the tensors' device.
template <auto kLaunch, class Params>
void on_cuda(const Params& params, const Placement& place) {
  const DeviceGuard guard(place.device);
  kLaunch(params, place);
}
#endif

inline void check_dtype(std::string_view op, DType dtype) {
  PYFAST_CHECK(dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16, op,
               ": dtype must be 0 (float32), 1 (float16) or 2 (bfloat16), got ",
               static_cast<int>(dtype));
}

inline void check_pointer(std::string_view op, std::string_view name, const void* pointer) {
  PYFAST_CHECK(pointer != nullptr, op, ": ", name, " is a null pointer");
}

}  // namespace pyfast
