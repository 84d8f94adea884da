// SPDX-License-Identifier: Apache-2.0
// y[M, N] = [x | z] [W | B]^T + bias in one pass: a GEMM whose contraction runs over K and then
// over R.
//
// CUTLASS's sm90 collective (TMA, warp-specialised) is used as it is. The class below gives it a
// second pair of operands: its producer loads ceil(K / 64) tiles of x and W, then ceil(R / 64) of z
// and B into the same stages. TMA fills what lies outside a matrix with zeros and still counts its
// bytes, so ragged K, R, M and N need no code, and the consumer never learns that there were two
// pairs.
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

namespace pyfast::lora {

// Adds the pair (z, B) to a collective.
template <class Base>
struct TwoPairs : Base {
  using Base::Base;
  using typename Base::MainloopPipeline;
  using typename Base::PipelineState;
  using typename Base::TensorStorage;
  static constexpr int kTileK = cute::size<2>(typename Base::TileShape{});

  struct Arguments {
    typename Base::Arguments main;
    typename Base::Arguments low_rank;
    int k = 0;
    int r = 0;
    bool wait_for_low_rank = false;  // z comes from the kernel before, which may still run
  };
  struct Params : Base::Params {
    typename Base::Params low_rank;
    int main_tiles = 0;
    int low_rank_steps = 0;  // of 16 ranks
    bool wait_for_low_rank = false;
  };

  template <class Shape>
  static Params to_underlying_arguments(const Shape& shape, const Arguments& args,
                                        void* workspace) {
    auto main_shape = cute::append<4>(shape, 1), low_shape = main_shape;
    cute::get<2>(main_shape) = args.k;
    cute::get<2>(low_shape) = args.r;
    Params params;
    static_cast<typename Base::Params&>(params) =
        Base::to_underlying_arguments(main_shape, args.main, workspace);
    params.low_rank = args.r > 0
                          ? Base::to_underlying_arguments(low_shape, args.low_rank, workspace)
                          : static_cast<const typename Base::Params&>(params);
    params.main_tiles = (args.k + kTileK - 1) / kTileK;
    params.low_rank_steps = (args.r + 15) / 16;
    params.wait_for_low_rank = args.wait_for_low_rank;
    return params;
  }

  template <class Shape>
  static bool can_implement(const Shape&, const Arguments&) {
    return true;  // dispatch has checked pitches and pointers
  }

  template <class Inputs, class Coord, class Iterator>
  CUTLASS_DEVICE void load(const Params& params, MainloopPipeline pipeline, PipelineState state,
                           const Inputs& inputs, const Coord& coord, Iterator tiles, int count,
                           int thread, uint32_t rank, TensorStorage& storage) {
    const int main = cute::min(count, params.main_tiles);
    Base::load(params, pipeline, state, inputs, coord, tiles, main, thread, rank, storage);
    if (count == main) return;
    if (params.wait_for_low_rank) {
      asm volatile("griddepcontrol.wait;" ::: "memory");
      asm volatile("griddepcontrol.launch_dependents;");
    }
    state.advance(main);
    Base::load(params.low_rank, pipeline, state, inputs, coord, tiles, count - main, thread, rank,
               storage);
  }

  template <class Accumulator>
  CUTLASS_DEVICE void mma(MainloopPipeline pipeline, PipelineState state, Accumulator& sums,
                          int count, int thread, TensorStorage& storage, const Params& params) {
    using namespace cute;
    using TiledMma = typename Base::TiledMma;
    const int main = cute::min(count, params.main_tiles);
    Base::mma(pipeline, state, sums, main, thread, storage, params);
    if (count == main) return;

    // One batch is still running, and its stage not yet released: go on from there.
    Tensor shared_a =
        make_tensor(make_smem_ptr(storage.smem_A.data()), typename Base::SmemLayoutA{});
    Tensor shared_b =
        make_tensor(make_smem_ptr(storage.smem_B.data()), typename Base::SmemLayoutB{});
    TiledMma tiled_mma;
    const int group = __shfl_sync(0xFFFFFFFF, thread / cutlass::NumThreadsPerWarpGroup, 0);
    auto slice = tiled_mma.get_slice(group * cutlass::NumThreadsPerWarpGroup);
    Tensor a = slice.make_fragment_A(slice.partition_A(shared_a));  // (MMA, M, K, stage)
    Tensor b = slice.make_fragment_B(slice.partition_B(shared_b));
    tiled_mma.accumulate_ = GMMA::ScaleOut::One;
    PipelineState release = state;
    release.advance(main - 1);
    state.advance(main);
    int steps = params.low_rank_steps;
    CUTLASS_PRAGMA_NO_UNROLL
    for (int tile = main; tile < count; ++tile, steps -= kTileK / 16) {
      pipeline.consumer_wait(state, pipeline.consumer_try_wait(state));
      const int stage = state.index();
      warpgroup_fence_operand(sums);
      warpgroup_arrive();
      CUTLASS_PRAGMA_UNROLL
      for (int step = 0; step < kTileK / 16; ++step) {
        if (step < steps) {
          cute::gemm(tiled_mma, a(_, _, step, stage), b(_, _, step, stage), sums);
        }
      }
      warpgroup_commit_batch();
      warpgroup_wait<Base::K_PIPE_MMAS>();
      warpgroup_fence_operand(sums);
      pipeline.consumer_release(release);
      ++state;
      ++release;
    }
  }
};

// One kernel of the family. kByOut: W is stored [N, K] and B [N, R]; else [K, N] and [R, N].
template <class Element, bool kByOut, class Tile, class Cluster, class Schedule,
          class EpilogueSchedule, class EpilogueTile>
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
  using Mainloop = TwoPairs<Stock>;
  using Kernel =
      cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue>;

  static void launch(const GemmArgs& args, const GemmPlan& plan, int sm_count, bool overlap,
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
    arguments.mainloop.wait_for_low_rank = overlap;
    arguments.epilogue.thread.alpha = 1.0F;
    arguments.epilogue.thread.bias_ptr = static_cast<const Element*>(args.bias);
    arguments.epilogue.ptr_D = static_cast<Element*>(args.y);
    arguments.epilogue.dD = StrideY{args.pitch_y, cute::Int<1>{}, std::int64_t{0}};
    arguments.hw_info.sm_count = sm_count;
    arguments.scheduler.max_swizzle_size = plan.swizzle;
    using Raster = typename Kernel::TileScheduler::RasterOrderOptions;
    arguments.scheduler.raster_order = plan.along_n ? Raster::AlongN : Raster::AlongM;

    const auto params = Kernel::to_underlying_arguments(arguments, nullptr);
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
    config.numAttrs = overlap ? 2 : 1;
    CUDA_CHECK("lora_linear", cudaLaunchKernelEx(&config, kernel, params));
  }
};

using Cooperative = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
using Pingpong = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
using cutlass::epilogue::collective::EpilogueTileAuto;

template <class Element, bool kByOut, int kM, int kN, int kClusterM, int kClusterN, class Schedule,
          class EpilogueTile>
using GemmOf = GemmSm90<
    Element, kByOut, cute::Shape<cute::Int<kM>, cute::Int<kN>, cute::_64>,
    cute::Shape<cute::Int<kClusterM>, cute::Int<kClusterN>, cute::_1>, Schedule,
    std::conditional_t<std::is_same_v<Schedule, Pingpong>, cutlass::epilogue::TmaWarpSpecialized,
                       cutlass::epilogue::TmaWarpSpecializedCooperative>,
    EpilogueTile>;

// In the order of kGemmNames.
template <class Element, bool kByOut>
void launch_gemm_sm90(const GemmArgs& args, const GemmPlan& plan, int sm_count, bool overlap,
                      cudaStream_t stream) {
  using Wide = cute::Shape<cute::_128, cute::_64>;
  switch (plan.kernel) {
    case 0:
      return GemmOf<Element, kByOut, 128, 256, 2, 1, Cooperative, Wide>::launch(
          args, plan, sm_count, overlap, stream);
    case 1:
      return GemmOf<Element, kByOut, 128, 256, 2, 1, Cooperative, EpilogueTileAuto>::launch(
          args, plan, sm_count, overlap, stream);
    case 2:
      return GemmOf<Element, kByOut, 128, 128, 1, 2, Pingpong, EpilogueTileAuto>::launch(
          args, plan, sm_count, overlap, stream);
    default:
      PYFAST_CHECK(false, "lora_linear: there is no GEMM kernel ", plan.kernel);
  }
}

}  // namespace pyfast::lora
