// SPDX-License-Identifier: Apache-2.0
#include "common/device.h"

#include <algorithm>
#include <array>
#include <mutex>

#include "common/check.h"

#ifdef PYFAST_CUDA
#include <cuda_runtime_api.h>
#endif

namespace pyfast {

std::string missing(Isa isa) {
#if defined(__x86_64__)
  // The compiler's run-time asks CPUID and, for the wide registers, the operating system (XGETBV).
  const bool avx2 = __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("f16c") != 0;
  const bool avx512 =
      avx2 && __builtin_cpu_supports("avx512f") != 0 && __builtin_cpu_supports("avx512bw") != 0 &&
      __builtin_cpu_supports("avx512dq") != 0 && __builtin_cpu_supports("avx512vl") != 0;
#else
  const bool avx2 = false, avx512 = false;
#endif
  switch (isa) {
    case Isa::scalar:
      return {};
    case Isa::avx2:
      return avx2 ? "" : "this CPU or operating system lacks AVX2 with F16C";
    case Isa::avx512:
      return avx512 ? "" : "this CPU or operating system lacks AVX-512 F, BW, DQ and VL";
  }
  return "unknown instruction set";
}

#ifdef PYFAST_CUDA

const CudaDevice& cuda_device(int ordinal) {
  constexpr int kMost = 64;
  static std::array<CudaDevice, kMost> devices;
  static std::array<std::once_flag, kMost> once;
  PYFAST_CHECK(ordinal >= 0 && ordinal < kMost, "device: expected a CUDA ordinal below ", kMost,
               ", got ", ordinal);
  const auto index = static_cast<std::size_t>(ordinal);
  CudaDevice& device = devices[index];
  std::call_once(once[index], [&] {
    int major = 0, minor = 0;
    CUDA_CHECK("device",
               cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal));
    CUDA_CHECK("device",
               cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, ordinal));
    CUDA_CHECK("device",
               cudaDeviceGetAttribute(&device.sm_count, cudaDevAttrMultiProcessorCount, ordinal));
    device.sm = 10 * major + minor;
  });
  return device;
}

std::string missing_cuda(int min_sm) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    static_cast<void>(cudaGetLastError());  // do not leave it for the next caller
    if (status == cudaErrorInsufficientDriver) {
      return concat("there is no NVIDIA driver, or one too old for CUDA ", CUDART_VERSION / 1000);
    }
    return concat("no CUDA device can be used: ", cudaGetErrorString(status));
  }
  if (count == 0) return "no CUDA device is visible";
  int best = 0;
  for (int i = 0; i < count; ++i) best = std::max(best, cuda_device(i).sm);
  if (best >= min_sm) return {};
  return concat("needs compute capability ", min_sm / 10, ".", min_sm % 10, ", this machine has ",
                best / 10, ".", best % 10);
}

DeviceGuard::DeviceGuard(int ordinal) : ordinal_(ordinal) {
  CUDA_CHECK("device", cudaGetDevice(&previous_));
  // A thread has no context before the runtime made one current, which the driver's own functions
  // do not do: autograd's threads begin without.
  thread_local bool has_context = false;
  if (previous_ != ordinal_ || !has_context) CUDA_CHECK("device", cudaSetDevice(ordinal_));
  has_context = true;
}

DeviceGuard::~DeviceGuard() {
  if (previous_ != ordinal_) static_cast<void>(cudaSetDevice(previous_));
}

#endif

}  // namespace pyfast
