// SPDX-License-Identifier: Apache-2.0
// Choice and launch of the adapter's kernels for Hopper, for one element type a file.
#pragma once

#include "adapter/launch.cuh"
#include "adapter/wide_rows.cuh"
#include "adapter/wide_tiles.cuh"

namespace pyfast::adapter {

template <class Visitor>
auto visit_wide_rank(std::int64_t rank, const Visitor& visitor) {
  if (rank <= 128) return visitor(std::integral_constant<int, 128>{});
  return visitor(std::integral_constant<int, 256>{});
}

template <class T>
void launch_wide_rows(const RowsArgs& args, bool backward, void* stream) {
  visit_wide_rank(args.rank, [&](auto rank) {
    constexpr int kRank = decltype(rank)::value;
    const auto launch = [&](auto rows, auto is_backward) {
      constexpr int kRows = decltype(rows)::value;
      using S = WideRowsShape<kRank, kRows>;
      enqueue<&adapter_wide_rows_kernel<T, kRank, kRows, decltype(is_backward)::value>,
              S::kThreads>(std::int64_t{args.cut.bands} * args.cut.slabs, S::kShared, true, args,
                           stream, args.cut.slabs);
    };
    const auto launch_rows = [&](auto rows) {
      if (backward) return launch(rows, std::true_type{});
      launch(rows, std::false_type{});
    };
    if (args.cut.rows == 128) return launch_rows(std::integral_constant<int, 128>{});
    launch_rows(std::integral_constant<int, 64>{});
  });
}

template <class T>
void launch_wide_up(const UpArgs& args, void* stream) {
  visit_wide_rank(args.rank, [&](auto rank) {
    constexpr int kRank = decltype(rank)::value;
    enqueue<&adapter_wide_up_kernel<T, kRank>>(std::int64_t{args.cut.bands} * args.cut.slabs,
                                               WideUpShape<kRank>::kShared, true, args, stream);
  });
}

template <class T, int kRank, Makes kMakes>
void launch_wide_grads(const GradsArgs& args, void* stream) {
  enqueue<&adapter_wide_grads_kernel<T, kRank, kMakes>>(
      std::int64_t{args.cut.bands} * args.cut.slabs, WideGradsShape<kRank, kMakes>::kShared, true,
      args, stream);
}
template <class T>
void launch_wide_grads(const GradsArgs& args, void* stream) {
  if (args.rank <= 128) return launch_wide_grads<T, 128, Makes::both>(args, stream);
  if (args.dx != nullptr || args.down_parts != nullptr || args.dy_parts != nullptr ||
      args.dh_parts != nullptr) {
    launch_wide_grads<T, 256, Makes::down>(args, stream);
  }
  if (args.up_parts != nullptr) launch_wide_grads<T, 256, Makes::up>(args, stream);
}

template <class T>
inline constexpr Products kWideProducts = {&launch_wide_rows<T>, &launch_wide_up<T>,
                                           &launch_wide_grads<T>};

}  // namespace pyfast::adapter
