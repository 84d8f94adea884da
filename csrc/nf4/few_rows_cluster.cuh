// SPDX-License-Identifier: Apache-2.0
// Sums of a tile that the four warpgroups of a cluster of two blocks have added up along k.
#pragma once

#include "common/sync.cuh"
#include "nf4/few_rows_async.cuh"

namespace pyfast::nf4::few {

__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// All threads of both blocks that have not ended.
__device__ __forceinline__ void arrive_cluster() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}
__device__ __forceinline__ void wait_cluster() {
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}
// The threads of a block that multiply.
constexpr int kConsumers = 256;
__device__ __forceinline__ void meet_consumers() { sync(kConsumers, 1); }
// Where a block of the cluster has what this one has at `at`.
__device__ __forceinline__ std::uint32_t address_in(int rank, std::uint32_t at) {
  std::uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(rank));
  return there;
}
__device__ __forceinline__ void wait_for_cluster(std::uint32_t barrier, int phase) {
  asm volatile(
      "{\n.reg .pred done;\nwaiting:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra waiting;\n}" ::"r"(barrier),
      "r"(phase)
      : "memory");
}

// `given`: all sums lie in shared memory; `taken`: all have been read. All that multiply in both
// blocks arrive, each thread for itself. In the last tile, where nobody else is left to wait, the
// cluster's own barrier does it faster.
struct Exchange {
  std::uint32_t given, taken;
  int phase = 0;

  __device__ __forceinline__ explicit Exchange(std::uint32_t barriers)
      : given(barriers), taken(barriers + 8) {}
  __device__ __forceinline__ void init() const {
    barrier_init(given, 2 * kConsumers);
    barrier_init(taken, 2 * kConsumers);
  }
  __device__ __forceinline__ static void tell_both(std::uint32_t barrier) {
#pragma unroll
    for (int rank = 0; rank < 2; ++rank) {
      asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(
                       address_in(rank, barrier))
                   : "memory");
    }
  }
  // By the warp that copies into the memory that held the sums.
  __device__ __forceinline__ void wait_until_taken() {
    wait_for_cluster(taken, phase);
    phase ^= 1;
  }

  // Leaves in the first quarter of `total` the quarter number `mine` of all warpgroups' sums, added
  // in order. `at`: [group][sum][thread] of this block, which no copy and no product uses.
  template <int kSums>
  __device__ __forceinline__ void add_up(float (&total)[kSums], std::uint32_t at, int group,
                                         int mine, bool last) {
    constexpr int kQuarter = kSums / 4, kPitch = 128 * 4;
    at += threadIdx.x % 128 * 4;
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      asm volatile("st.shared.f32 [%0], %1;" ::"r"(at + (group * kSums + i) * kPitch), "f"(total[i])
                   : "memory");
    }
    if (last) {
      arrive_cluster();
      wait_cluster();
    } else {
      tell_both(given);
      wait_for_cluster(given, phase);
    }
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const std::uint32_t from =
          address_in(part / 2, at) + (part % 2 * kSums + mine * kQuarter) * kPitch;
#pragma unroll
      for (int i = 0; i < kQuarter; ++i) {
        float value;
        asm volatile("ld.shared::cluster.f32 %0, [%1];"
                     : "=f"(value)
                     : "r"(from + i * kPitch)
                     : "memory");
        total[i] = part == 0 ? value : total[i] + value;
      }
    }
    if (last) {
      arrive_cluster();
    } else {
      asm volatile("fence.proxy.async.shared::cluster;" ::
                       : "memory");  // ahead of copies to the same place
      tell_both(taken);
    }
    phase ^= 1;
  }
};

}  // namespace pyfast::nf4::few
