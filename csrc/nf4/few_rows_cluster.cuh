// SPDX-License-Identifier: Apache-2.0
// Sums of a tile that the four warpgroups of a cluster of two blocks have added up along k.
#pragma once

#include "nf4/few_rows_async.cuh"

namespace pyfast::nf4::few {

__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// Behind a fence of the barriers that the other block is to see.
__device__ __forceinline__ void meet_cluster() {
  asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
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

// `given`: all sums lie in shared memory; `taken`: all have been read. Warps of both blocks arrive.
struct Exchange {
  std::uint32_t given, taken;
  int phase = 0;

  __device__ __forceinline__ explicit Exchange(std::uint32_t barriers)
      : given(barriers), taken(barriers + 8) {}
  __device__ __forceinline__ void init(int warps) const {
    barrier_init(given, 2 * warps);
    barrier_init(taken, 2 * warps);
  }
  __device__ __forceinline__ static void tell_both(std::uint32_t barrier) {
    __syncwarp();
    const int lane = static_cast<int>(threadIdx.x % 32);
    if (lane < 2) {
      asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(
                       address_in(lane, barrier))
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
                                         int mine) {
    constexpr int kQuarter = kSums / 4, kPitch = 128 * 4;
    at += threadIdx.x % 128 * 4;
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      asm volatile("st.shared.f32 [%0], %1;" ::"r"(at + (group * kSums + i) * kPitch), "f"(total[i])
                   : "memory");
    }
    tell_both(given);
    wait_for_cluster(given, phase);
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
    asm volatile("fence.proxy.async.shared::cluster;" ::
                     : "memory");  // ahead of copies to the same place
    tell_both(taken);
    phase ^= 1;
  }
};

}  // namespace pyfast::nf4::few
