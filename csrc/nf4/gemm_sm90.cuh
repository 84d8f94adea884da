// SPDX-License-Identifier: Apache-2.0
// y[M, N] = x W^T + z B^T + bias from the packed bytes of W, for sm_90a: of CUTLASS's cooperative
// kernel, with W decoded by its own warps.
//
// Two blocks of a cluster have 256 rows of x each and the same 128 or 112 columns of y. Where
// CUTLASS loads a tile of W by TMA, seven warps beside the loading one decode it: a block one half,
// which it copies to the other block too. A stage is full when x and the other's half have come and
// the own half is decoded; products see what nf4_dequantize would have made.
#pragma once

#include <algorithm>

#include "lora/gemm_sm90.cuh"
#include "nf4/gemm_decode.cuh"
#include "nf4/kernels.h"

namespace pyfast::nf4 {

// Carries W; loads are the kernel's.
template <class Base>
struct PackedPairs : lora::TwoPairs<Base> {
  using Pairs = lora::TwoPairs<Base>;
  struct Arguments : Pairs::Arguments {
    PackedWeight w;
  };
  struct Params : Pairs::Params {
    PackedWeight w;
  };

  template <class Shape>
  static Params to_underlying_arguments(const Shape& shape, const Arguments& args,
                                        void* workspace) {
    Params params;
    static_cast<typename Pairs::Params&>(params) =
        Pairs::to_underlying_arguments(shape, args, workspace);
    params.w = args.w;
    return params;
  }
};

// kByOut: W is stored [N, K]; else [K, N].
template <class Mainloop, class Epilogue, class T, bool kByOut>
struct PackedKernel
    : cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue> {
  using Base =
      cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue>;
  using typename Base::ClusterShape;
  using typename Base::Params;
  using typename Base::TileScheduler;
  using typename Base::TileShape;
  using Pipeline = typename Mainloop::MainloopPipeline;
  using State = typename Mainloop::PipelineState;

  static constexpr int kTileN = cute::size<1>(TileShape{}), kTileK = cute::size<2>(TileShape{});
  static constexpr int kStageBytes = kTileN * kTileK * 2;  // of W
  static constexpr int kHalfBytes = kStageBytes / 2;       // a block's
  static constexpr int kParts = 2;                         // of a half
  // Of the second part; W by in feature is cut along k, so that its parts are all alike.
  static constexpr int kLastRows = kByOut ? kTileN / 2 - kPartRows : kPartRows;
  static constexpr int kDecoders = 7;
  static_assert(cute::size(ClusterShape{}) == 2 && kTileK == kPartColumns);
  static_assert(0 < kLastRows && kLastRows <= kPartRows && kLastRows % 8 == 0);
  static_assert(kHalfBytes == kPartBytes + kLastRows * kPartColumns * 2);

  // One more warpgroup than CUTLASS's.
  static constexpr std::uint32_t MaxThreadsPerBlock = Base::MaxThreadsPerBlock + 128;
  static dim3 get_block_shape() { return dim3(MaxThreadsPerBlock, 1, 1); }
  static constexpr int kConsumerRegisters = 168, kOtherRegisters = 88;
  static_assert(2 * (kConsumerRegisters + kOtherRegisters) * 128 <= 65536);

  struct SharedStorage : Base::SharedStorage {
    float map[256];
  };
  static constexpr int SharedStorageSize = sizeof(SharedStorage);

  // Tiles, stages and parts in the order in which a warp decodes: every kDecoders-th part.
  struct Cursor {
    TileScheduler scheduler;
    typename TileScheduler::WorkTileInfo work;
    int steps, rank, step, part;

    CUTLASS_DEVICE Cursor(const Params& params, int steps, int rank, int first)
        : scheduler(params.scheduler),
          work(scheduler.initial_work_tile_info(ClusterShape{})),
          steps(steps),
          rank(rank),
          step(first / kParts),
          part(first % kParts) {
      settle();
    }
    CUTLASS_DEVICE bool valid() const { return work.is_valid(); }
    // How many stages it passes.
    CUTLASS_DEVICE int next() {
      const int passed = (part + kDecoders) / kParts;
      part = (part + kDecoders) % kParts;
      step += passed;
      settle();
      return passed;
    }
    // Where the part begins in W, how many rows it has, and where it begins in the stage.
    CUTLASS_DEVICE int row() const {
      return kByOut ? tile() + rank * (kTileN / 2) + part * kPartRows
                    : step * kTileK + rank * kPartRows;
    }
    CUTLASS_DEVICE int rows() const { return part == 0 ? kPartRows : kLastRows; }
    CUTLASS_DEVICE int column() const {
      return kByOut ? step * kTileK : tile() + part * kPartColumns;
    }
    CUTLASS_DEVICE int bytes() const {
      return kByOut ? rank * kHalfBytes + part * kPartBytes : (part * kParts + rank) * kPartBytes;
    }

   private:
    CUTLASS_DEVICE int tile() const { return static_cast<int>(work.N_idx) * kTileN; }
    CUTLASS_DEVICE void settle() {
      while (step >= steps && work.is_valid()) {
        step -= steps;
        scheduler.advance_to_next_work();
        work = scheduler.get_current_work();
      }
    }
  };

  // By one thread: x, and for the low-rank steps the factor in the place of W.
  template <class Inputs>
  CUTLASS_DEVICE static void load(const Params& params, SharedStorage& shared, Pipeline& pipeline,
                                  State& state, const Inputs& inputs, int rank) {
    using namespace cute;
    Tensor x = make_tensor(make_smem_ptr(shared.tensors.mainloop.smem_A.data()),
                           typename Mainloop::SmemLayoutA{});
    Tensor factor = make_tensor(make_smem_ptr(shared.tensors.mainloop.smem_B.data()),
                                typename Mainloop::SmemLayoutB{});
    const int count = size<3>(get<0>(inputs)), first = params.mainloop.first_tiles;
    TileScheduler scheduler(params.scheduler);
    for (auto work = scheduler.initial_work_tile_info(ClusterShape{}); work.is_valid();) {
      Tensor rows = get<0>(inputs)(_, _, static_cast<int>(work.M_idx), _, 0);
      Tensor columns = get<1>(inputs)(_, _, static_cast<int>(work.N_idx), _, 0);
      for (int step = 0; step < count; ++step, ++state) {
        const bool low = step >= first;
        const typename Mainloop::Base::Params& from =
            low ? params.mainloop.low_rank : params.mainloop;
        pipeline.producer_acquire(state);
        auto* barrier = pipeline.producer_get_barrier(state);
        cutlass::arch::ClusterTransactionBarrier::arrive_and_expect_tx(
            barrier,
            Mainloop::TmaTransactionBytesMK + (low ? Mainloop::TmaTransactionBytesNK : kHalfBytes));
        const auto copy_x = from.tma_load_a.get_slice(0);
        copy(from.tma_load_a.with(*barrier, 0),
             copy_x.partition_S(rows)(_, _, _, low ? step - first : step),
             copy_x.partition_D(x)(_, _, _, state.index()));
        if (low) {
          const auto copy_factor = from.tma_load_b.get_slice(rank);
          copy(from.tma_load_b.with(*barrier, 3),
               copy_factor.partition_S(columns)(_, _, _, step - first),
               copy_factor.partition_D(factor)(_, _, _, state.index()));
        }
      }
      scheduler.advance_to_next_work();
      work = scheduler.get_current_work();
    }
  }

  // Copies a part to the same place of the cluster's other block, whose stage it helps to fill.
  CUTLASS_DEVICE static void share(std::uint32_t at, int bytes, std::uint32_t barrier, int rank) {
    const auto there = [&](std::uint32_t address) {
      std::uint32_t mapped;
      asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank ^ 1));
      return mapped;
    };
    asm volatile(
        "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, "
        "[%3];" ::"r"(there(at)),
        "r"(at), "r"(bytes), "r"(there(barrier))
        : "memory");
  }

  // By a warp. Bytes are read kAhead parts ahead.
  CUTLASS_DEVICE static void decode(const Params& params, SharedStorage& shared, Pipeline& pipeline,
                                    State state, int steps, int rank, int decoder) {
    constexpr int kAhead = 2;
    const PackedWeight& w = params.mainloop.w;
    const int lane = static_cast<int>(threadIdx.x % 32), first = params.mainloop.first_tiles;
    const float offset = w.offset == nullptr ? 0.0F : __ldg(w.offset);
    const std::uint32_t stages = cute::cast_smem_ptr_to_uint(shared.tensors.mainloop.smem_B.data());
    PackedPart parts[kAhead];
    Cursor now(params, steps, rank, decoder), ahead = now;
    state.advance(decoder / kParts);
    const auto fetch = [&](PackedPart& part) __attribute__((always_inline)) {
      if (!ahead.valid()) return;
      if (ahead.step < first) part.load(w, ahead.row() + lane, ahead.column());
      ahead.next();
    };
#pragma unroll
    for (int i = 0; i < kAhead; ++i) fetch(parts[i]);
    while (now.valid()) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (!now.valid()) break;
        pipeline.producer_acquire(state);
        auto* barrier = pipeline.producer_get_barrier(state);
        if (now.step < first) {
          const std::uint32_t at = stages + state.index() * kStageBytes + now.bytes();
          const int rows = now.rows();
          if (lane < rows) parts[i].template decode<T>(w, shared.map, offset, at + lane * 128);
          cutlass::arch::fence_view_async_shared();
          __syncwarp();
          if (lane == 0) share(at, rows * 128, cute::cast_smem_ptr_to_uint(barrier), rank);
        }
        cutlass::arch::ClusterBarrier::arrive(barrier);
        fetch(parts[i]);
        state.advance(now.next());
      }
    }
  }

  CUTLASS_DEVICE void operator()(const Params& params, char* memory) {
    using namespace cute;
    auto& shared = *reinterpret_cast<SharedStorage*>(memory);
    const int warp = cutlass::canonical_warp_idx_sync();
    const int group = cutlass::canonical_warp_group_idx();
    const int thread = static_cast<int>(threadIdx.x);
    const bool consumes = group == 1 || group == 2;
    if (warp == 0 && elect_one_sync()) {
      Mainloop::prefetch_tma_descriptors(params.mainloop);
      Epilogue::prefetch_tma_descriptors(params.epilogue);
    }
    for (int i = thread; i < 256; i += MaxThreadsPerBlock) shared.map[i] = d_dynamic_map[i];

    typename Pipeline::Params pipe{};
    pipe.role = consumes ? Pipeline::ThreadCategory::Consumer : Pipeline::ThreadCategory::Producer;
    pipe.is_leader = false;  // `load` tells what it expects
    pipe.num_consumers = Base::NumMMAThreads;
    pipe.num_producers = 1 + kParts * 32;  // each lane tells of its row
    Pipeline pipeline(shared.pipelines.mainloop, pipe, ClusterShape{});
    using LoadPipeline = typename Epilogue::LoadPipeline;  // of an addend, which there is not
    typename LoadPipeline::Params loads{};
    if (consumes) loads.role = LoadPipeline::ThreadCategory::Consumer;
    loads.dst_blockid = block_rank_in_cluster();
    loads.producer_arv_count = cutlass::NumThreadsPerWarp;
    loads.consumer_arv_count = Base::NumMMAThreads;
    LoadPipeline load_pipeline(shared.pipelines.epi_load, loads);
    using StorePipeline = typename Epilogue::StorePipeline;
    typename StorePipeline::Params stores{};
    stores.always_wait = true;
    StorePipeline store_pipeline(stores);
    cluster_arrive_relaxed();

    const auto shape = append<4>(params.problem_shape, Int<1>{});
    Mainloop mainloop;
    const auto inputs = mainloop.load_init(shape, params.mainloop);
    const int steps = size<3>(get<0>(inputs));
    const int rank = static_cast<int>(block_rank_in_cluster());
    __syncthreads();
    cluster_wait();

    if (!consumes) {
      cutlass::arch::warpgroup_reg_dealloc<kOtherRegisters>();
      auto state = cutlass::make_producer_start_state<Pipeline>();
      if (warp == 0) {
        if (elect_one_sync()) load(params, shared, pipeline, state, inputs, rank);
        __syncwarp();
        mainloop.load_tail(pipeline, state);
      } else {
        decode(params, shared, pipeline, state, steps, rank, group == 0 ? warp - 1 : warp - 9);
      }
      return;
    }
    cutlass::arch::warpgroup_reg_alloc<kConsumerRegisters>();
    Epilogue epilogue(params.epilogue, shared.tensors.epilogue);
    State state;
    typename Epilogue::LoadPipelineState load_state;
    auto store_state = cutlass::make_producer_start_state<StorePipeline>();
    typename Base::TiledMma tiled_mma;
    const int mma_thread = thread - cutlass::NumThreadsPerWarpGroup;
    TileScheduler scheduler(params.scheduler);
    auto work = scheduler.initial_work_tile_info(ClusterShape{});
    const bool stores_any = work.is_valid();
    while (work.is_valid()) {
      auto sums = partition_fragment_C(tiled_mma, take<0, 2>(TileShape{}));
      mainloop.mma(pipeline, state, sums, steps, mma_thread, shared.tensors.mainloop,
                   params.mainloop);
      mainloop.mma_tail(pipeline, state, steps);
      state.advance(steps);
      const auto place =
          make_coord(static_cast<int>(work.M_idx), static_cast<int>(work.N_idx), _, 0);
      const auto next =
          epilogue.store(load_pipeline, load_state, store_pipeline, store_state, shape, TileShape{},
                         place, sums, tiled_mma, mma_thread, shared.tensors.epilogue);
      load_state = get<0>(next);
      store_state = get<1>(next);
      scheduler.advance_to_next_work();
      work = scheduler.get_current_work();
    }
    if (stores_any) epilogue.store_tail(load_pipeline, load_state, store_pipeline, store_state);
  }
};

template <class Element, class T, bool kByOut, int kTileN>
struct PackedGemm {
  using Tile = cute::Shape<cute::_256, cute::Int<kTileN>, cute::_64>;
  using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;
  // The default stores 32 columns at a time.
  using EpilogueTile = std::conditional_t<kTileN % 32 == 0, lora::EpilogueTileAuto,
                                          cute::Shape<cute::_128, cute::_16>>;
  using Dense = lora::GemmOf<Element, kByOut, 256, kTileN, 2, 1, lora::Cooperative, EpilogueTile>;
  using Epilogue = typename Dense::Epilogue;
  static constexpr int kAlign = 8, kMapBytes = 256 * 4 + 64;
  using Stock = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, typename Dense::Row, kAlign,
      Element, typename Dense::LayoutW, kAlign, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename Epilogue::SharedStorage) + kMapBytes)>,
      lora::Cooperative>::CollectiveOp;
  static_assert(Stock::DispatchPolicy::Stages == 4);
  struct Mainloop : PackedPairs<Stock> {
    using Base = Stock;
  };
  using Kernel = PackedKernel<Mainloop, Epilogue, T, kByOut>;

  static void launch(const GemmParams& args, const Placement& place) {
    using Stride = cute::Stride<std::int64_t, cute::Int<1>, std::int64_t>;
    const auto rows = [](std::int64_t pitch) { return Stride{pitch, {}, 0}; };
    const auto stored = [](std::int64_t pitch) {
      typename Kernel::StrideB stride{};
      cute::get<kByOut ? 0 : 1>(stride) = pitch;
      return stride;
    };
    const auto steps = [](int size) { return lora::tiles_of(size, Kernel::kTileK); };
    typename Kernel::Arguments arguments{};
    arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    arguments.problem_shape = {args.m, args.n, Kernel::kTileK * (steps(args.k) + steps(args.r)), 1};
    const auto operands = [&](const void* x, std::int64_t pitch_x, const void* w,
                              std::int64_t pitch_w) {
      return typename Stock::Arguments{static_cast<const Element*>(x), rows(pitch_x),
                                       static_cast<const Element*>(w), stored(pitch_w)};
    };
    // No load reads W by TMA, but its map has to be one.
    arguments.mainloop.main = operands(args.x, args.pitch_x, args.packed, kByOut ? args.k : args.n);
    arguments.mainloop.low_rank = operands(args.z, args.pitch_z, args.b, args.pitch_b);
    arguments.mainloop.k = args.k;
    arguments.mainloop.r = args.r;
    arguments.mainloop.w = {args.packed,
                            args.absmax,
                            args.nested_absmax,
                            args.offset,
                            kByOut ? args.n : args.k,
                            kByOut ? args.k : args.n};
    arguments.epilogue.thread.alpha = 1.0F;
    arguments.epilogue.thread.bias_ptr = static_cast<const Element*>(args.bias);
    arguments.epilogue.ptr_D = static_cast<Element*>(args.y);
    arguments.epilogue.dD = rows(args.pitch_y);
    const int sm_count = cuda_device(place.device).sm_count, most = sm_count / 2;
    arguments.hw_info.sm_count = sm_count;
    arguments.scheduler.max_swizzle_size = 1;
    using Raster = typename Kernel::TileScheduler::RasterOrderOptions;
    arguments.scheduler.raster_order = Raster::AlongM;
    auto params = Kernel::to_underlying_arguments(arguments, nullptr);
    const int all =
        lora::order_of_tiles<Cluster>(params.scheduler, lora::tiles_of(args.m, 256),
                                      lora::tiles_of(args.n, Kernel::kTileN), {}, false, most);
    lora::launch_clusters<Kernel>(kGemmOp, params, false, lora::clusters_for(all, most),
                                  lora::Start::kInOrder, place.stream);
  }
};

// By tiles of so many columns.
template <class Element, class T>
void launch_packed(const GemmParams& args, int columns, const Placement& place) {
  if (columns == kGemmNarrowColumns) {
    PackedGemm<Element, T, true, kGemmNarrowColumns>::launch(args, place);
  } else if (args.by_out) {
    PackedGemm<Element, T, true, kGemmColumns>::launch(args, place);
  } else {
    PackedGemm<Element, T, false, kGemmColumns>::launch(args, place);
  }
}

}  // namespace pyfast::nf4
