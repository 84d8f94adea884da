// SPDX-License-Identifier: Apache-2.0
// The GEMM kernels of the LoRA linear for sm_90a, and their launch.
#pragma once

#include <cuda_runtime.h>
#include <cutlass/cutlass.h>

#include <algorithm>
#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/operations.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <type_traits>

#include "common/check.h"
#include "lora/kernels.h"
#include "lora/launch_sm90.cuh"
#include "lora/makes_z.cuh"
#include "lora/two_pairs.cuh"

namespace pyfast::lora {

enum class Kind {
  kPlain,
  kScaled,
  kMasked,
  kMaking16,
  kMaking16Scaled,
  kMaking128,
  kMaking16InX,
  kMaking16InDx
};

template <class Stock, Kind kKind>
struct MainloopOf {
  using type = TwoPairs<Stock>;
};
template <class Stock>
struct MainloopOf<Stock, Kind::kMasked> {
  using type = MaskedTwoPairs<Stock>;
};
template <class Stock>
struct MainloopOf<Stock, Kind::kMaking16> {
  using type = MakesZ<Stock, 16>;
};
template <class Stock>
struct MainloopOf<Stock, Kind::kMaking16Scaled> {
  using type = MakesZ<Stock, 16>;
};
template <class Stock>
struct MainloopOf<Stock, Kind::kMaking16InX> {
  using type = MakesZ<Stock, 16, Drop::kInX>;
};
template <class Stock>
struct MainloopOf<Stock, Kind::kMaking16InDx> {
  using type = MakesZ<Stock, 16, Drop::kInDx>;
};
template <class Stock>
struct MainloopOf<Stock, Kind::kMaking128> {
  using type = MakesZ<Stock, 128>;
};

// One kernel of the family. kByOut: W is stored [N, K] and B [N, R]; else [K, N] and [R, N].
template <class Element, bool kByOut, class Tile, class Cluster, class Schedule,
          class EpilogueSchedule, class EpilogueTile, Kind kKind>
struct GemmSm90 {
  using LayoutW =
      std::conditional_t<kByOut, cutlass::layout::ColumnMajor, cutlass::layout::RowMajor>;
  using Row = cutlass::layout::RowMajor;
  static constexpr int kAlign = 8;
  static constexpr int kM = cute::size<0>(Tile{}), kN = cute::size<1>(Tile{});
  static constexpr bool kDrops = kKind == Kind::kMaking16InX || kKind == Kind::kMaking16InDx;
  static constexpr bool kScales = kKind == Kind::kScaled || kKind == Kind::kMaking16Scaled;
  static constexpr bool kMakes16 =
      kKind == Kind::kMaking16 || kKind == Kind::kMaking16Scaled || kDrops;
  static constexpr int kMakingRank = kMakes16 ? 16 : (kKind == Kind::kMaking128 ? 128 : 0);
  static constexpr int kBytesMore =
      making_bytes(kMakingRank) + (kKind == Kind::kMaking16InDx ? 2 * kMaskTileBytes : 16);

  // y = c sums + bias; without a pointer the bias is 0.
  template <class T>
  using OfColumn = cutlass::epilogue::fusion::Sm90RowBroadcast<0, Tile, T, float>;
  using Scaling = cutlass::epilogue::fusion::Sm90EVT<
      cutlass::epilogue::fusion::Sm90Compute<cutlass::homogeneous_multiply_add, Element, float,
                                             cutlass::FloatRoundStyle::round_to_nearest>,
      OfColumn<float>, cutlass::epilogue::fusion::Sm90AccFetch, OfColumn<Element>>;
  // Serves without c too, but costs up to 0.9 % more than CUTLASS's own.
  using Fusion = std::conditional_t<
      kScales, Scaling,
      cutlass::epilogue::fusion::LinCombPerColBias<Element, float, Element, void>>;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster, EpilogueTile, float,
      float, void, Row, kAlign, Element, Row, kAlign, EpilogueSchedule, Fusion>::CollectiveOp;
  using Stock = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, Row, kAlign, Element, LayoutW,
      kAlign, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename Epilogue::SharedStorage) + kBytesMore)>,
      Schedule>::CollectiveOp;
  using Mainloop = typename MainloopOf<Stock, kKind>::type;
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
    const auto steps = [](int size) { return (size + Mainloop::kTileK - 1) / Mainloop::kTileK; };
    int tiles_k = steps(args.k) + steps(args.r);
    for (const Pair& pair : args.more) tiles_k += steps(pair.k);
    if constexpr (kMakingRank > 0) {
      if (args.side.da != nullptr) tiles_k += Mainloop::kTilesT;
    }
    const int extended = Mainloop::kTileK * tiles_k;

    typename Kernel::Arguments arguments{};
    arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    arguments.problem_shape = {args.m, args.n, extended, 1};
    const auto operands = [&](const void* x, std::int64_t pitch_x, const void* w,
                              std::int64_t pitch) {
      return typename Stock::Arguments{static_cast<const Element*>(x),
                                       StrideX{pitch_x, cute::Int<1>{}, std::int64_t{0}},
                                       static_cast<const Element*>(w), pitch_w(pitch)};
    };
    arguments.mainloop.main = operands(args.x, args.pitch_x, args.w, args.pitch_w);
    arguments.mainloop.low_rank = operands(args.z, args.pitch_z, args.b, args.pitch_b);
    for (int i = 0; i < kMorePairs; ++i) {
      const Pair& pair = args.more[i];
      arguments.mainloop.more[i] = operands(pair.x, pair.pitch_x, pair.w, pair.pitch_w);
      arguments.mainloop.more_k[i] = pair.k;
    }
    arguments.mainloop.k = args.k;
    arguments.mainloop.r = args.r;
    arguments.mainloop.wait_for_low_rank = early;
    if constexpr (kKind == Kind::kMasked) {
      arguments.mainloop.mask = args.mask;
    } else if constexpr (kMakingRank > 0) {
      PYFAST_CHECK(!early, "lora_linear: a GEMM that makes z cannot be launched early");
      PYFAST_CHECK(kMakingRank == kSideRank || (args.side.da == nullptr && args.side.db == nullptr),
                   "lora_linear: this GEMM makes no parts of dA and dB");
      PYFAST_CHECK(kDrops == (args.mask.seed != nullptr), "lora_linear: this GEMM is for products ",
                   kDrops ? "with" : "without", " dropout");
      arguments.mainloop.mask = args.mask;
      arguments.mainloop.making = args.making;
      arguments.mainloop.side = args.side;
      arguments.mainloop.rows_at_once = side_part_rows(plan);
      arguments.mainloop.pitch_z = args.pitch_z;
    }
    const auto* bias = static_cast<const Element*>(args.bias);
    PYFAST_CHECK(kScales == (args.columns != nullptr), "lora_linear: this GEMM is for columns ",
                 kScales ? "with" : "without", " factors");
    if constexpr (kScales) {
      arguments.epilogue.thread = {{args.columns, 1.0F}, {}, {bias, Element(0)}, {}};
    } else {
      arguments.epilogue.thread.alpha = 1.0F;
      arguments.epilogue.thread.bias_ptr = bias;
    }
    arguments.epilogue.ptr_D = static_cast<Element*>(args.y);
    arguments.epilogue.dD = StrideY{args.pitch_y, cute::Int<1>{}, std::int64_t{0}};
    arguments.hw_info.sm_count = sm_count;
    arguments.scheduler.max_swizzle_size = 1;  // order_of_tiles has the last word
    using Raster = typename Kernel::TileScheduler::RasterOrderOptions;
    arguments.scheduler.raster_order = plan.along_n ? Raster::AlongN : Raster::AlongM;

    auto params = Kernel::to_underlying_arguments(arguments, nullptr);
    int clusters = (plan.blocks > 0 ? plan.blocks : sm_count) / cute::size(Cluster{});
    const int all = order_of_tiles<Cluster>(params.scheduler, tiles_of(args.m, kM),
                                            tiles_of(args.n, kN), plan, kMakingRank > 0, clusters);
    clusters = std::min(plan.blocks > 0 ? clusters : clusters_for(all, clusters), all);
    if constexpr (kKind == Kind::kMasked || kMakingRank > 0)
      params.mainloop.scheduler = params.scheduler;
    // Blocks that make z wait for one another: all must run, whatever else runs on the device.
    const Start start = kMakingRank > 0 ? Start::kTogether
                        : early         ? Start::kEarly
                                        : Start::kInOrder;
    launch_clusters<Kernel>("lora_linear", params, plan.along_n, clusters, start, stream);
  }
};

using Cooperative = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
using Pingpong = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
using cutlass::epilogue::collective::EpilogueTileAuto;

template <class Element, bool kByOut, int kM, int kN, int kClusterM, int kClusterN, class Schedule,
          class EpilogueTile, Kind kKind = Kind::kPlain>
using GemmOf = GemmSm90<
    Element, kByOut, cute::Shape<cute::Int<kM>, cute::Int<kN>, cute::_64>,
    cute::Shape<cute::Int<kClusterM>, cute::Int<kClusterN>, cute::_1>, Schedule,
    std::conditional_t<std::is_same_v<Schedule, Pingpong>, cutlass::epilogue::TmaWarpSpecialized,
                       cutlass::epilogue::TmaWarpSpecializedCooperative>,
    EpilogueTile, kKind>;

// In the order of kGemmNames.
template <class Element, bool kByOut>
void launch_gemm_sm90(const GemmArgs& args, const GemmPlan& plan, int sm_count, bool early,
                      cudaStream_t stream) {
  // 64 columns stored at a time cost twice the shared memory of the default, and win 0.5 %.
  using Wide = cute::Shape<cute::_128, cute::_64>;
  // DoRA's forward: of bf16, W by out feature.
  if constexpr (kByOut && std::is_same_v<Element, cutlass::bfloat16_t>) {
    if (plan.kernel == kGemmScaled) {
      return GemmOf<Element, kByOut, 128, 256, 2, 1, Cooperative, Wide, Kind::kScaled>::launch(
          args, plan, sm_count, early, stream);
    }
    if (plan.kernel == kGemmMaking16Scaled) {
      return GemmOf<Element, kByOut, 128, 256, 2, 1, Cooperative, EpilogueTileAuto,
                    Kind::kMaking16Scaled>::launch(args, plan, sm_count, early, stream);
    }
  }
  switch (plan.kernel) {
    case 0:
      return GemmOf<Element, kByOut, 128, 256, 2, 1, Cooperative, Wide>::launch(
          args, plan, sm_count, early, stream);
    case 1:
      return GemmOf<Element, kByOut, 128, 128, 1, 2, Pingpong, EpilogueTileAuto>::launch(
          args, plan, sm_count, early, stream);
    case kGemmMasked:
      return GemmOf<Element, kByOut, 128, 256, 2, 1, Cooperative, Wide, Kind::kMasked>::launch(
          args, plan, sm_count, early, stream);
    case kGemmMaking16:
      return GemmOf<Element, kByOut, 128, 256, 2, 1, Cooperative, EpilogueTileAuto,
                    Kind::kMaking16>::launch(args, plan, sm_count, early, stream);
    case kGemmMaking128:
      return GemmOf<Element, kByOut, 128, 256, 2, 1, Cooperative, EpilogueTileAuto,
                    Kind::kMaking128>::launch(args, plan, sm_count, early, stream);
    // With dropout, for weights by out feature alone: of x in y = x W^T, of z B^T in dx = dy W.
    case kGemmMakingDrop:
      return GemmOf < Element, kByOut, 128, 256, 2, 1, Cooperative, EpilogueTileAuto,
             kByOut ? Kind::kMaking16InX
                    : Kind::kMaking16InDx > ::launch(args, plan, sm_count, early, stream);
    default:
      PYFAST_CHECK(false, "lora_linear: there is no GEMM kernel ", plan.kernel);
  }
}

}  // namespace pyfast::lora
