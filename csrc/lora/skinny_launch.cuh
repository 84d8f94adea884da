// SPDX-License-Identifier: Apache-2.0
// Choice, cut and launch of the skinny kernels, for one element type a file.
#pragma once

#include <algorithm>
#include <type_traits>

#include "common/check.h"
#include "common/device.h"
#include "common/shared_memory.cuh"
#include "lora/kernels.h"
#include "lora/skinny.cuh"

namespace pyfast::lora {
namespace skinny {

inline int ceil_div(std::int64_t a, std::int64_t b) { return static_cast<int>((a + b - 1) / b); }

// What a kernel is compiled for.
template <int kRankIn, bool kRowsIn, bool kByRankIn>
struct Shape {
  static constexpr int kRank = kRankIn;
  static constexpr bool kRows = kRowsIn, kByRank = kByRankIn;
  static constexpr int kBytesStage =
      kSkinnyRows * kSkinnyCols * 2 + (kRows ? kSkinnyCols : kSkinnyRows) * kRank * 2;
  // Two blocks share an SM's 228 KiB where that leaves each four stages.
  static constexpr int kBlocksPerSm = kBytesStage <= 28 * 1024 ? 2 : 1;
  static constexpr int kStages = std::min(6, 224 / kBlocksPerSm * 1024 / kBytesStage);
  static constexpr int kShared = kStages * kBytesStage;
  static constexpr int kSums = kRank / 8 * (kRows ? 2 : 4);  // registers of a thread
};

// Cuts T so that the SMs are busy to the end, waves of blocks included. In units of one chunk's
// time: 3 to start a block, and what its last one adds up.
template <class S>
SkinnyGrid plan(const SkinnyArgs& args, int sm_count) {
  const int chunks = ceil_div(args.cols, kSkinnyCols), blocks = ceil_div(args.rows, kSkinnyRows);
  const int slots = sm_count * S::kBlocksPerSm;
  const int fixed = S::kRows ? blocks : chunks, cut = S::kRows ? chunks : blocks;
  int best = cut;
  float least = 0;
  for (int parts = 1; parts <= std::min(cut, 64); ++parts) {
    const int length = ceil_div(cut, parts);
    const int waves = ceil_div(static_cast<std::int64_t>(fixed) * parts, slots);
    const float sum =
        parts == 1 ? 0.0F : 1.0F + 0.02F * static_cast<float>(parts * S::kSums) / 8.0F;
    const float cost = static_cast<float>(waves) * (static_cast<float>(length) + 3.0F) + sum;
    if (least == 0 || cost < least) {
      least = cost;
      best = length;
    }
  }
  SkinnyGrid grid;
  if (S::kRows) {
    grid.slab_chunks = best;
    grid.slabs = ceil_div(chunks, best);
    grid.bands = blocks;
  } else {
    grid.band_blocks = best;
    grid.bands = ceil_div(blocks, best);
    grid.slabs = chunks;
  }
  return grid;
}

template <class S>
std::int64_t workspace(const SkinnyGrid& grid) {
  const bool whole = (S::kRows ? grid.slabs : grid.bands) == 1;
  const std::int64_t parts = whole ? 0 : static_cast<std::int64_t>(grid.slabs) * grid.bands;
  return parts * S::kSums * kSkinnyThreads * static_cast<std::int64_t>(sizeof(float));
}

template <class S, auto kKernel, class... Parameters>
void enqueue(int blocks, Order order, cudaStream_t stream, const Parameters&... parameters) {
  allow_shared_memory<kKernel>("lora_linear", S::kShared);
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(blocks);
  config.blockDim = kSkinnyThreads;
  config.dynamicSmemBytes = S::kShared;
  config.stream = stream;
  cudaLaunchAttribute early;
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &early;
  config.numAttrs = order == Order::kAlone ? 0 : 1;
  CUDA_CHECK("lora_linear", cudaLaunchKernelEx(&config, kKernel, parameters...));
}

template <class T, class S, bool kDrop>
void launch(const SkinnyProduct& first, const SkinnyProduct* second, int sm_count,
            cudaStream_t stream) {
  const SkinnyJob job{first.args, plan<S>(first.args, sm_count), first.order};
  const auto blocks = [](const SkinnyGrid& grid) { return grid.slabs * grid.bands; };
  if constexpr (S::kRows) {
    enqueue<S, &skinny_rows_kernel<T, S::kRank, S::kByRank, kDrop, S::kStages>>(
        blocks(job.grid), job.order, stream, job.args, job.grid, job.order);
  } else {
    SkinnyJob other;
    other.grid.slabs = 0;
    if (second != nullptr) other = {second->args, plan<S>(second->args, sm_count), second->order};
    enqueue<S, &skinny_cols_kernel<T, S::kRank, kDrop, S::kStages>>(
        blocks(job.grid) + blocks(other.grid), job.order, stream, job, other);
  }
}

// Calls visitor(Shape{}) for the kernel that serves the arguments.
template <class Visitor>
void visit_shape(const SkinnyArgs& args, const Visitor& visitor) {
  const auto with = [&](auto rank) {
    constexpr int kRank = decltype(rank)::value;
    if (args.u == nullptr) return visitor(Shape<kRank, false, false>{});
    if (args.u_by_rank) return visitor(Shape<kRank, true, true>{});
    return visitor(Shape<kRank, true, false>{});
  };
  if (args.rank <= 16) return with(std::integral_constant<int, 16>{});
  if (args.rank <= 32) return with(std::integral_constant<int, 32>{});
  if (args.rank <= 64) return with(std::integral_constant<int, 64>{});
  return with(std::integral_constant<int, 128>{});
}

}  // namespace skinny

template <class T>
void launch_skinny(const SkinnyProduct& first, const SkinnyProduct* second, int sm_count,
                   void* stream) {
  skinny::visit_shape(first.args, [&](auto shape) {
    using S = decltype(shape);
    auto* on = static_cast<cudaStream_t>(stream);
    if (first.args.seed == nullptr) return skinny::launch<T, S, false>(first, second, sm_count, on);
    if constexpr (S::kByRank || !S::kRows) {
      return skinny::launch<T, S, true>(first, second, sm_count, on);
    }
  });
}

}  // namespace pyfast::lora
