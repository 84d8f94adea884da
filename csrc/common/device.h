// SPDX-License-Identifier: Apache-2.0
// What this machine can run: CPU instruction sets and CUDA devices.
#pragma once

#include <string>

namespace pyfast {

enum class Isa { scalar, avx2, avx512 };

// Empty when the CPU and the operating system support `isa`, else a sentence saying what is
// missing.
std::string missing(Isa isa);

#ifdef PYFAST_CUDA

struct CudaDevice {
  int sm = 0;  // compute capability times ten: 90 for 9.0
  int sm_count = 0;
};

// The properties of device `ordinal`, read once per process.
const CudaDevice& cuda_device(int ordinal);

// Empty when a visible device has at least capability `min_sm`, else a sentence.
std::string missing_cuda(int min_sm);

// Makes `ordinal` the current device for its lifetime.
class DeviceGuard {
 public:
  explicit DeviceGuard(int ordinal);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int ordinal_;
  int previous_ = -1;
};

#endif

}  // namespace pyfast
