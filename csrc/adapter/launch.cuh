// SPDX-License-Identifier: Apache-2.0
// Choice, cut and launch of the adapter's kernels, for one element type a file.
#pragma once

#include <type_traits>

#include "adapter/small.cuh"
#include "adapter/tiles.cuh"
#include "common/check.h"
#include "common/launch.h"
#include "common/shared_memory.cuh"

namespace pyfast::adapter {

inline constexpr const char* kOp = "adapter_bottleneck";

// Calls visitor(integral_constant) with the ranks that a kernel is compiled for.
template <class Visitor>
auto visit_rank(std::int64_t rank, const Visitor& visitor) {
  if (rank <= 16) return visitor(std::integral_constant<int, 16>{});
  if (rank <= 32) return visitor(std::integral_constant<int, 32>{});
  if (rank <= 64) return visitor(std::integral_constant<int, 64>{});
  if (rank <= 128) return visitor(std::integral_constant<int, 128>{});
  return visitor(std::integral_constant<int, 256>{});
}

// `early`: launched while the grid before it still runs, for whose end it waits.
template <auto kKernel, int kThreadsIn = kThreads, class Args>
void enqueue(std::int64_t blocks, int shared, bool early, const Args& args, void* stream,
             int cluster = 1) {
  if (shared > 0) allow_shared_memory<kKernel>(kOp, shared);
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(blocks);
  config.blockDim = kThreadsIn;
  config.dynamicSmemBytes = static_cast<std::size_t>(shared);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attributes[2];
  config.attrs = attributes;
  if (early) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  CUDA_CHECK(kOp, cudaLaunchKernelEx(&config, kKernel, args));
}

// Cuts [M, K] so that the SMs are busy to the end. In units of one chunk's time: 3 to start a
// block, and what each band's part of the gradients costs.
template <class S>
Cut walk_cut(std::int64_t m, std::int64_t k, int sm_count, float part) {
  const std::int64_t chunks = ceil_div(m, S::kRows), slabs = ceil_div(k, S::kSlab);
  const std::int64_t slots = static_cast<std::int64_t>(sm_count) * S::kBlocks;
  Cut best;
  best.slabs = static_cast<int>(slabs);
  float least = 0;
  for (std::int64_t bands = 1; bands <= std::min<std::int64_t>(chunks, 64); ++bands) {
    const std::int64_t length = ceil_div(chunks, bands);
    const auto waves = static_cast<float>(ceil_div(slabs * bands, slots));
    const float cost =
        waves * (static_cast<float>(length) + 3.0F) + part * static_cast<float>(bands);
    if (least == 0 || cost < least) {
      least = cost;
      best.chunks = static_cast<int>(length);
      best.bands = static_cast<int>(ceil_div(chunks, length));
    }
  }
  return best;
}

template <class T>
void launch_weigh(const WeighArgs& args, void* stream) {
  enqueue<&adapter_weigh_kernel<T>>(args.rank, 0, false, args, stream);
}

template <class T>
void launch_rows(const RowsArgs& args, bool backward, void* stream) {
  visit_rank(args.rank, [&](auto rank) {
    constexpr int kRank = decltype(rank)::value;
    using S = RowsShape<kRank>;
    const auto launch = [&](auto is_backward) {
      constexpr bool kBackward = decltype(is_backward)::value;
      enqueue<&adapter_rows_kernel<T, kRank, kBackward>, S::kThreads>(
          std::int64_t{args.cut.bands} * args.cut.slabs, S::kShared, true, args, stream);
      if (args.cut.slabs == 1) return;
      using F = FinishShape<kRank>;
      enqueue<&adapter_finish_kernel<T, kRank, kBackward>, F::kThreads>(
          (args.rows + F::kRows - 1) / F::kRows, 0, true, args, stream);
    };
    if (backward) return launch(std::true_type{});
    launch(std::false_type{});
  });
}

template <class T>
void launch_up(const UpArgs& args, void* stream) {
  visit_rank(args.rank, [&](auto rank) {
    constexpr int kRank = decltype(rank)::value;
    enqueue<&adapter_up_kernel<T, kRank>>(args.cut.bands * args.cut.slabs, UpShape<kRank>::kShared,
                                          true, args, stream);
  });
}

template <class T>
void launch_grads(const GradsArgs& args, void* stream) {
  visit_rank(args.rank, [&](auto rank) {
    constexpr int kRank = decltype(rank)::value;
    enqueue<&adapter_grads_kernel<T, kRank>>(args.cut.bands * args.cut.slabs,
                                             GradsShape<kRank>::kShared, true, args, stream);
  });
}

template <class T>
void launch_sum(const SumArgs& args, void* stream) {
  enqueue<&adapter_sum_kernel<T>>((args.cols + kSumCols - 1) / kSumCols, 0, true, args, stream);
}

template <class T>
inline constexpr Launchers kLaunchers = {
    {&launch_rows<T>, &launch_up<T>, &launch_grads<T>}, &launch_weigh<T>, &launch_sum<T>};

}  // namespace pyfast::adapter
