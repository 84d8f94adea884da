// SPDX-License-Identifier: Apache-2.0
// dx = D * s and the sums of D * x over each row of tiles, D = dy W, by CUTLASS's sm90 collectives.
// The epilogue's producer loads x as the source while the products run; a thread adds up its
// columns in registers, then the lanes and warps of a tile do in a fixed order.
#include "adapter/scaled_gemm.h"
#include "common/check.h"
#include "lora/gemm_sm90.cuh"

namespace pyfast::adapter {
namespace {

namespace fusion = cutlass::epilogue::fusion;

constexpr const char* kOp = "scaled_linear_backward";
constexpr int kAlign = 8;

using Element = cutlass::bfloat16_t;
using Row = cutlass::layout::RowMajor;
using Tile = cute::Shape<cute::Int<kScaledTileM>, cute::Int<kScaledTileN>, cute::_64>;
using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;

constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;
using Scaled =
    fusion::Sm90EVT<fusion::Sm90Compute<cutlass::multiplies, Element, float, kRound>,
                    fusion::Sm90RowBroadcast<0, Tile, float, float>, fusion::Sm90SplitTreeFetch>;
using Source =
    fusion::Sm90EVT<fusion::Sm90Compute<cutlass::epilogue::thread::Identity, float, float, kRound>,
                    fusion::Sm90SrcFetch<Element>>;
// D and x are the first two operands of a fused multiply-add, the sum the third. Rows and columns
// outside of the matrices are zeros, so that no check of bounds is needed.
using Sums = fusion::Sm90EVT<
    fusion::Sm90RowReduction<cutlass::homogeneous_multiply_add, cutlass::plus, cutlass::plus, 0,
                             Tile, float, float, kRound, cute::Stride<cute::_0, cute::_1, cute::_0>,
                             4, /*EnableNullptr=*/false, /*FinalReduction=*/false,
                             /*VisitCheckOOB=*/false, cute::seq<1, 2, 0>>,
    fusion::Sm90SplitTreeFetch, Source>;
using Fusion = fusion::Sm90SplitTreeVisitor<fusion::Sm90AccFetch, Scaled, Sums>;

// Four stages of 32 columns, which x and dx share, leave room for four of the products.
using Epilogue = cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster, lora::EpilogueTileAuto,
    float, float, Element, Row, kAlign, Element, Row, kAlign,
    cutlass::epilogue::TmaWarpSpecializedCooperative, Fusion>::CollectiveOp;
using Mainloop = cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, Row, kAlign, Element, Row, kAlign,
    float, Tile, Cluster,
    cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
        sizeof(Epilogue::SharedStorage))>,
    lora::Cooperative>::CollectiveOp;
using Kernel =
    cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue>;
static_assert(Mainloop::DispatchPolicy::Stages == 4);

Kernel::Arguments arguments_of(const ScaledGemmArgs& args, const lora::GemmPlan& plan,
                               int sm_count) {
  const auto rows = [](std::int64_t pitch) {
    return cute::make_stride(pitch, cute::Int<1>{}, std::int64_t{0});
  };
  Kernel::Arguments arguments{};
  arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
  arguments.problem_shape = {static_cast<int>(args.m), static_cast<int>(args.k),
                             static_cast<int>(args.n), 1};
  arguments.mainloop.ptr_A = static_cast<const Element*>(args.dy);
  arguments.mainloop.dA = rows(args.pitch_dy);
  arguments.mainloop.ptr_B = static_cast<const Element*>(args.w);
  arguments.mainloop.dB = cute::make_stride(cute::Int<1>{}, args.pitch_w, std::int64_t{0});
  arguments.epilogue.thread = {{},                                      // D
                               {{}, {{}, {}}, {args.parts, 0.0F, {}}},  // D, x and the sums
                               {{args.scale, 1.0F}, {}, {}}};           // s and D
  arguments.epilogue.ptr_C = static_cast<const Element*>(args.x);
  arguments.epilogue.dC = rows(args.pitch_x);
  arguments.epilogue.ptr_D = static_cast<Element*>(args.dx);
  arguments.epilogue.dD = rows(args.k);
  arguments.hw_info.sm_count = sm_count;
  arguments.scheduler.max_swizzle_size = 1;  // order_of_tiles has the last word
  using Raster = Kernel::TileScheduler::RasterOrderOptions;
  arguments.scheduler.raster_order = plan.along_n ? Raster::AlongN : Raster::AlongM;
  return arguments;
}

}  // namespace

void launch_scaled_gemm_sm90(const ScaledGemmArgs& args, const lora::GemmPlan& plan, int sm_count,
                             void* stream) {
  auto params = Kernel::to_underlying_arguments(arguments_of(args, plan, sm_count), nullptr);
  const int most = sm_count / cute::size(Cluster{});
  const int all =
      lora::order_of_tiles<Cluster>(params.scheduler, lora::tiles_of(args.m, kScaledTileM),
                                    lora::tiles_of(args.k, kScaledTileN), plan, false, most);
  lora::launch_clusters<Kernel>(kOp, params, plan.along_n, lora::clusters_for(all, most),
                                lora::Start::kInOrder, stream);
}

}  // namespace pyfast::adapter
