// SPDX-License-Identifier: Apache-2.0
// Dispatch: a table of kernels per op, each row with a reason when it does not fit; first match
// wins.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "common/check.h"
#include "common/device.h"

namespace pyfast {

// Where an op runs: device -1 is the CPU, otherwise a CUDA ordinal with a stream of it.
struct Placement {
  int device = -1;
  int threads = 1;         // CPU only
  void* stream = nullptr;  // CUDA only: a cudaStream_t
  bool on_cpu() const { return device < 0; }
};

template <class Params>
struct Variant {
  std::string_view name;
  Isa isa = Isa::scalar;  // CPU rows
  int min_sm = 0;         // CUDA rows: at least 80
  void (*launch)(const Params&, const Placement&) = nullptr;

  bool on_cpu() const { return min_sm == 0; }

  // Empty when this machine can run the kernel, else why not.
  std::string reason() const {
#ifdef PYFAST_CUDA
    if (!on_cpu()) return missing_cuda(min_sm);
#endif
    return missing(isa);
  }

  // Empty when the kernel can run at `place`, else why not.
  std::string reason_at(const Placement& place) const {
    if (on_cpu() != place.on_cpu()) {
      return concat("it runs on ", on_cpu() ? "cpu" : "cuda", ", the tensors are on ",
                    place.on_cpu() ? "cpu" : "cuda");
    }
#ifdef PYFAST_CUDA
    if (!on_cpu()) {
      const int sm = cuda_device(place.device).sm;
      if (sm >= min_sm) return {};
      return concat("it needs compute capability ", min_sm / 10, ".", min_sm % 10, ", device ",
                    place.device, " has ", sm / 10, ".", sm % 10);
    }
#endif
    return missing(isa);
  }
};

// Runs the first row that fits, or the row called `name` when it is given. Returns the row's name.
template <class Params>
std::string_view dispatch(std::string_view op, std::span<const Variant<Params>> table,
                          const Params& params, const Placement& place, std::string_view name) {
  std::string reasons;
  for (const Variant<Params>& row : table) {
    if (!name.empty() && row.name != name) continue;
    if (const std::string reason = row.reason_at(place); !reason.empty()) {
      reasons += concat(reasons.empty() ? "" : "; ", row.name, ": ", reason);
      continue;
    }
    row.launch(params, place);
    return row.name;
  }
  PYFAST_CHECK(name.empty() || !reasons.empty(), op, ": this build has no variant \"", name,
               "\"; variants(\"", op, "\") lists them");
  throw std::invalid_argument(concat(op, ": no kernel can run here (",
                                     reasons.empty() ? "this build has none" : reasons, ")"));
}

struct VariantInfo {
  std::string_view name;
  bool cuda;
  std::string reason;
};

template <class Params>
std::vector<VariantInfo> describe(std::span<const Variant<Params>> table) {
  std::vector<VariantInfo> rows;
  for (const Variant<Params>& row : table) {
    rows.push_back({row.name, !row.on_cpu(), row.reason()});
  }
  return rows;
}

}  // namespace pyfast
