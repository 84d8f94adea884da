// SPDX-License-Identifier: Apache-2.0
// Launches of persistent CUTLASS kernels for sm_90a: which block takes which tile, and the grid.
#pragma once

#include <cuda_runtime.h>
#include <cutlass/cutlass.h>
#include <cutlass/device_kernel.h>

#include <algorithm>
#include <cute/tensor.hpp>

#include "common/check.h"
#include "common/shared_memory.cuh"
#include "lora/gemm.h"

namespace pyfast::lora {

constexpr int tiles_of(std::int64_t size, int tile) {
  return static_cast<int>((size + tile - 1) / tile);
}

// Has the scheduler take the tiles in a plan's order: `swizzle` columns of clusters at a time along
// M, or rows along N. CUTLASS would round both up to the swizzle. Where rounding costs a wave and
// the kernel does not rely on the swizzle, it is halved.
template <class Cluster, class Params>
int order_of_tiles(Params& params, int tiles_m, int tiles_n, const GemmPlan& plan, bool relies,
                   int most_clusters) {
  using Divmod = decltype(params.divmod_cluster_blk_major_);
  constexpr int kM = cute::size<0>(Cluster{}), kN = cute::size<1>(Cluster{});
  const int rows = tiles_of(tiles_m, kM), columns = tiles_of(tiles_n, kN);
  const int along = plan.along_n ? columns : rows, across = plan.along_n ? rows : columns;
  const auto clusters = [&](int log) { return tiles_of(across, 1 << log) * (1 << log) * along; };
  int log = 0;
  while (2 << log <= plan.swizzle) ++log;
  while (!relies && log > 0 &&
         tiles_of(clusters(log), most_clusters) > tiles_of(clusters(0), most_clusters)) {
    --log;
  }
  const auto blocks = static_cast<std::uint64_t>(clusters(log)) * kM * kN;
  params.log_swizzle_size_ = log;
  params.divmod_cluster_blk_major_ = Divmod(static_cast<std::uint64_t>(along));
  params.divmod_batch_ = Divmod(blocks);
  params.blocks_per_problem_ = blocks;
  return clusters(log);
}

// No more clusters than the waves need: what runs beside gets the SMs that are left.
constexpr int clusters_for(int all, int most) { return tiles_of(all, tiles_of(all, most)); }

// kEarly: ahead of the end of the grid before. kTogether: all blocks at once, or none.
enum class Start { kInOrder, kEarly, kTogether };

template <class Kernel>
void launch_clusters(const char* op, const typename Kernel::Params& params, bool along_n,
                     int clusters, Start start, void* stream) {
  using Cluster = typename Kernel::ClusterShape;
  constexpr int kM = cute::size<0>(Cluster{}), kN = cute::size<1>(Cluster{});
  constexpr int kShared = Kernel::SharedStorageSize;
  auto* kernel = &cutlass::device_kernel<Kernel>;
  allow_shared_memory<&cutlass::device_kernel<Kernel>>(op, kShared);

  cudaLaunchConfig_t config{};
  config.gridDim = along_n ? dim3(kM, clusters * kN) : dim3(clusters * kM, kN);
  config.blockDim = Kernel::get_block_shape();
  config.dynamicSmemBytes = kShared;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {kM, kN, 1};
  config.attrs = attributes;
  config.numAttrs = start == Start::kInOrder ? 1 : 2;
  if (start == Start::kTogether) {
    attributes[1].id = cudaLaunchAttributeCooperative;
    attributes[1].val.cooperative = 1;
  } else {
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
  }
  CUDA_CHECK(op, cudaLaunchKernelEx(&config, kernel, params));
}

}  // namespace pyfast::lora
