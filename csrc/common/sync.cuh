// SPDX-License-Identifier: Apache-2.0
// Named barriers of a block, and counters in global memory by which blocks wait for one another.
#pragma once

#include <cuda_runtime.h>

namespace pyfast {

// All of the warp take part; `threads` counts those of all warps that meet.
__device__ __forceinline__ void sync(int threads, int barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
// Does not wait.
__device__ __forceinline__ void arrive(int threads, int barrier) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ __forceinline__ unsigned acquire(const unsigned* from) {
  unsigned value;
  asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}
__device__ __forceinline__ void release_add(unsigned* to, unsigned value) {
  asm volatile("red.release.gpu.add.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}
// Until the low half of the counter has come to a number.
__device__ __forceinline__ void wait_until(const unsigned* counter, unsigned low_half) {
  while ((acquire(counter) & 0xFFFF) < low_half) __nanosleep(64);
}

}  // namespace pyfast
