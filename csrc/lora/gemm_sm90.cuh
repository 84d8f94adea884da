// SPDX-License-Identifier: Apache-2.0
// The GEMM kernels of the LoRA linear for sm_90a, and their launch.
#pragma once

#include <cuda_runtime.h>
#include <cutlass/cutlass.h>

#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/operations.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <type_traits>

#include "common/check.h"
#include "lora/kernels.h"
#include "lora/two_pairs.cuh"

namespace pyfast::lora {

// One kernel of the family. kByOut: W is stored [N, K] and B [N, R]; else [K, N] and [R, N].
template <class Element, bool kByOut, class Tile, class Cluster, class Schedule,
          class EpilogueSchedule, class EpilogueTile, bool kMasked>
struct GemmSm90 {
  using LayoutW =
      std::conditional_t<kByOut, cutlass::layout::ColumnMajor, cutlass::layout::RowMajor>;
  using Row = cutlass::layout::RowMajor;
  static constexpr int kAlign = 8;

  using Fusion = cutlass::epilogue::fusion::LinCombPerColBias<Element, float, Element, void>;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster, EpilogueTile, float,
      float, void, Row, kAlign, Element, Row, kAlign, EpilogueSchedule, Fusion>::CollectiveOp;
  using Stock = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, Row, kAlign, Element, LayoutW,
      kAlign, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename Epilogue::SharedStorage))>,
      Schedule>::CollectiveOp;
  using Mainloop = std::conditional_t<kMasked, MaskedTwoPairs<Stock>, TwoPairs<Stock>>;
  using Kernel =
      cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue>;

  static void launch(const GemmArgs& args, const GemmPlan& plan, int sm_count, bool early,
                     cudaStream_t stream) {
    using StrideX = typename Kernel::StrideA;
    using StrideW = typename Kernel::StrideB;
    using StrideY = typename Kernel::StrideD;
    const auto pitch_w = [](std::int64_t pitch) {
      if constexpr (kByOut) {
        return StrideW{pitch, cute::Int<1>{}, std::int64_t{0}};
      } else {
        return StrideW{cute::Int<1>{}, pitch, std::int64_t{0}};
      }
    };
    const auto tiles = [](int size) { return (size + Mainloop::kTileK - 1) / Mainloop::kTileK; };
    const int extended = Mainloop::kTileK * (tiles(args.k) + tiles(args.r));

    typename Kernel::Arguments arguments{};
    arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    arguments.problem_shape = {args.m, args.n, extended, 1};
    arguments.mainloop.main = {static_cast<const Element*>(args.x),
                               StrideX{args.pitch_x, cute::Int<1>{}, std::int64_t{0}},
                               static_cast<const Element*>(args.w), pitch_w(args.pitch_w)};
    arguments.mainloop.low_rank = {static_cast<const Element*>(args.z),
                                   StrideX{args.pitch_z, cute::Int<1>{}, std::int64_t{0}},
                                   static_cast<const Element*>(args.b), pitch_w(args.pitch_b)};
    arguments.mainloop.k = args.k;
    arguments.mainloop.r = args.r;
    arguments.mainloop.wait_for_low_rank = early;
    if constexpr (kMasked) {
      arguments.mainloop.mask = {args.seed, args.threshold, args.keep_scale};
    }
    arguments.epilogue.thread.alpha = 1.0F;
    arguments.epilogue.thread.bias_ptr = static_cast<const Element*>(args.bias);
    arguments.epilogue.ptr_D = static_cast<Element*>(args.y);
    arguments.epilogue.dD = StrideY{args.pitch_y, cute::Int<1>{}, std::int64_t{0}};
    arguments.hw_info.sm_count = sm_count;
    arguments.scheduler.max_swizzle_size = plan.swizzle;
    using Raster = typename Kernel::TileScheduler::RasterOrderOptions;
    arguments.scheduler.raster_order = plan.along_n ? Raster::AlongN : Raster::AlongM;

    auto params = Kernel::to_underlying_arguments(arguments, nullptr);
    if constexpr (kMasked) params.mainloop.scheduler = params.scheduler;
    auto* kernel = &cutlass::device_kernel<Kernel>;
    constexpr int kShared = Kernel::SharedStorageSize;
    static const cudaError_t raised =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
    CUDA_CHECK("lora_linear", raised);

    cudaLaunchConfig_t config{};
    config.gridDim = Kernel::get_grid_shape(params);
    config.blockDim = Kernel::get_block_shape();
    config.dynamicSmemBytes = kShared;
    config.stream = stream;
    cudaLaunchAttribute attributes[2];
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {cute::size<0>(Cluster{}), cute::size<1>(Cluster{}), 1};
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    config.attrs = attributes;
    config.numAttrs = early ? 2 : 1;
    CUDA_CHECK("lora_linear", cudaLaunchKernelEx(&config, kernel, params));
  }
};

using Cooperative = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
using Pingpong = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
using cutlass::epilogue::collective::EpilogueTileAuto;

template <class Element, bool kByOut, int kM, int kN, int kClusterM, int kClusterN, class Schedule,
          class EpilogueTile, bool kMasked = false>
using GemmOf = GemmSm90<
    Element, kByOut, cute::Shape<cute::Int<kM>, cute::Int<kN>, cute::_64>,
    cute::Shape<cute::Int<kClusterM>, cute::Int<kClusterN>, cute::_1>, Schedule,
    std::conditional_t<std::is_same_v<Schedule, Pingpong>, cutlass::epilogue::TmaWarpSpecialized,
                       cutlass::epilogue::TmaWarpSpecializedCooperative>,
    EpilogueTile, kMasked>;

// In the order of kGemmNames.
template <class Element, bool kByOut>
void launch_gemm_sm90(const GemmArgs& args, const GemmPlan& plan, int sm_count, bool early,
                      cudaStream_t stream) {
  using Wide = cute::Shape<cute::_128, cute::_64>;
  switch (plan.kernel) {
    case 0:
      return GemmOf<Element, kByOut, 128, 256, 2, 1, Cooperative, Wide>::launch(
          args, plan, sm_count, early, stream);
    case 1:
      return GemmOf<Element, kByOut, 128, 256, 2, 1, Cooperative, EpilogueTileAuto>::launch(
          args, plan, sm_count, early, stream);
    case 2:
      return GemmOf<Element, kByOut, 128, 128, 1, 2, Pingpong, EpilogueTileAuto>::launch(
          args, plan, sm_count, early, stream);
    case kGemmMasked:
      return GemmOf<Element, kByOut, 128, 256, 2, 1, Cooperative, Wide, true>::launch(
          args, plan, sm_count, early, stream);
    default:
      PYFAST_CHECK(false, "lora_linear: there is no GEMM kernel ", plan.kernel);
  }
}

}  // namespace pyfast::lora
