// SPDX-License-Identifier: Apache-2.0
// Copies by TMA through a ring of slots, and programmatic launches, for the few-row kernels of
// sm_90.
#pragma once

#include <cuda.h>

#include "nf4/few_rows.cuh"

namespace pyfast::nf4::few {

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

constexpr int kMostSharedBytes = 227 * 1024 - 1024;                // the rest is alignment
constexpr int kChunkColumns = 256, kChunkRow = kChunkColumns / 2;  // of W, in bytes

__device__ __forceinline__ void barrier_init(std::uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_expect(std::uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void barrier_arrive(std::uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
template <int kTimes>
__device__ __forceinline__ void barrier_arrive(std::uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "n"(kTimes)
               : "memory");
}
__device__ __forceinline__ void barrier_wait(std::uint32_t barrier, int phase) {
  asm volatile(
      "{\n.reg .pred done;\nwaiting:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra waiting;\n}" ::"r"(barrier),
      "r"(phase)
      : "memory");
}
__device__ __forceinline__ void load_box(std::uint32_t to, const CUtensorMap* map,
                                         std::uint32_t barrier, int column, int row,
                                         std::uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "l"(policy)
      : "memory");
}
// Of three dimensions, the first from its beginning.
__device__ __forceinline__ void load_box3(std::uint32_t to, const CUtensorMap* map,
                                          std::uint32_t barrier, int second, int third,
                                          std::uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(0), "r"(second), "r"(third), "l"(policy)
      : "memory");
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Programmatic dependent launch: the next grid may begin now, and this one has to wait for the end
// of the grid before it ahead of reading what that wrote.
__device__ __forceinline__ void launch_next_grid() {
  asm volatile("griddepcontrol.launch_dependents;");
}
__device__ __forceinline__ void wait_for_grid_before() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

__device__ __forceinline__ void fence_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// A ring of slots with a barrier each for "full" and "empty".
struct Slots {
  std::uint32_t full, empty;
  int count, slot = 0, phase = 0;
  __device__ __forceinline__ Slots(std::uint32_t barriers, int slots)
      : full(barriers), empty(barriers + 8 * slots), count(slots) {}
  // By one thread; so many arrivals fill a slot, and so many empty it.
  __device__ __forceinline__ void init(int consumers, int producers = 1) const {
    for (int i = 0; i < count; ++i) {
      barrier_init(full + 8 * i, producers);
      barrier_init(empty + 8 * i, consumers);
    }
  }
  __device__ __forceinline__ std::uint32_t full_at() const { return full + 8 * slot; }
  __device__ __forceinline__ std::uint32_t empty_at() const { return empty + 8 * slot; }
  __device__ __forceinline__ void next() {
    if (++slot == count) slot = 0, phase ^= 1;
  }
};

}  // namespace pyfast::nf4::few
