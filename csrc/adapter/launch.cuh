// SPDX-License-Identifier: Apache-2.0
// Choice, cut and launch of the adapter's kernels, for one element type a file.
#pragma once

#include <type_traits>

#include "adapter/small.cuh"
#include "adapter/tiles.cuh"
#include "common/check.h"
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
void enqueue(std::int64_t blocks, int shared, bool early, const Args& args, void* stream) {
  if (shared > 0) allow_shared_memory<kKernel>(kOp, shared);
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(blocks);
  config.blockDim = kThreadsIn;
  config.dynamicSmemBytes = static_cast<std::size_t>(shared);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = early ? 1 : 0;
  CUDA_CHECK(kOp, cudaLaunchKernelEx(&config, kKernel, args));
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
inline constexpr Launchers kLaunchers = {&launch_weigh<T>, &launch_rows<T>, &launch_up<T>,
                                         &launch_grads<T>, &launch_sum<T>};

}  // namespace pyfast::adapter
