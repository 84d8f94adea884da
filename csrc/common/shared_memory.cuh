// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "common/check.h"

namespace pyfast {

// Lets a kernel have so much dynamic shared memory on the current device; asked once for each.
template <auto kKernel>
void allow_shared_memory(const char* op, int bytes) {
  static std::atomic<std::uint64_t> devices = 0;
  int device = 0;
  CUDA_CHECK(op, cudaGetDevice(&device));
  const std::uint64_t bit = device < 64 ? std::uint64_t{1} << device : 0;
  if ((devices & bit) != 0) return;
  CUDA_CHECK(op, cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  devices |= bit;
}

}  // namespace pyfast
