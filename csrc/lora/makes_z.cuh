// SPDX-License-Identifier: Apache-2.0
// A GEMM that makes its own low-rank operand: y = x W^T + z B^T with z = s x Q^T, Q[R, K].
//
// x passes through shared memory anyway, so z costs no pass over x. The blocks of one row of tiles
// share the work: of the tiles of K each multiplies some with Q as well (one narrow wgmma more),
// stores its part of z as float32, and when all parts of the row are there, each block adds up a
// few rows of z and stores them. Before its last step, the low-rank one, a block waits for the z
// of its row. Sums are made in a fixed order: results repeat bit for bit.
//
// So that z is there in time, half of the blocks begin in the middle of K, and all of them do their
// part in the first half of their walk. No block waits for one that cannot start: the grid holds
// all blocks of a row at once (plan_making), and a part needs nothing of another block.
#pragma once

#include <algorithm>

#include "common/vec.cuh"
#include "lora/two_pairs.cuh"

namespace pyfast::lora {

// Has the kernel call load_auxiliary in a warp of its own.
template <class Policy>
struct WithAuxiliary : Policy {};

}  // namespace pyfast::lora

template <class Policy>
struct cutlass::gemm::kernel::detail::HasAuxiliaryLoad<pyfast::lora::WithAuxiliary<Policy>>
    : cute::true_type {};

namespace pyfast::lora {

// Of shared memory that a kernel needs for Q.
constexpr int making_bytes(int rank) {
  constexpr int kTileK = 64, kFetched = kMakingSlices * 32 * 16;
  return rank == 0 ? 0 : std::max(rank * kTileK * 2, kFetched);
}

template <class Base, int kRank>
struct MakesZ : TwoPairs<Base> {
  using DispatchPolicy = WithAuxiliary<typename Base::DispatchPolicy>;
  using Pairs = TwoPairs<Base>;
  using Scheduler = cutlass::gemm::kernel::detail::PersistentTileSchedulerSm90;
  using Pairs::kTileK;
  using typename Base::ElementA;
  using typename Base::MainloopPipeline;
  using typename Base::PipelineState;
  static constexpr int kTileM = cute::size<0>(typename Base::TileShape{});
  static constexpr int kWarps = cute::size(typename Base::TiledMma{}) / 32;
  // A block loads Q at most once in so many tiles of K, hence one buffer for Q is enough.
  static constexpr int kMinStride = 4;
  static_assert(Base::K_PIPE_MAX <= kMinStride);
  static constexpr int kBarriers =
      static_cast<int>(cutlass::arch::ReservedNamedBarriers::FirstUserBarrier);
  // Named barriers, the first two that CUTLASS leaves to others.
  static constexpr int kPart = kBarriers, kPartThreads = kWarps * 32 + 32;  // the part is stored
  static constexpr int kReady = kBarriers + 1, kReadyThreads = 64;          // z of the row is there
  static_assert(cute::is_same_v<typename Base::DispatchPolicy::ClusterShape,
                                cute::Shape<cute::_2, cute::_1, cute::_1>>);

  // Q lies as W does: [R, K] or [K, R].
  using StrideQ = typename Base::StrideB;
  static constexpr bool kByRank =
      cute::is_same_v<cute::remove_cvref_t<decltype(cute::get<1>(StrideQ{}))>, cute::_1>;
  static constexpr auto kMajorQ = kByRank ? cute::GMMA::Major::K : cute::GMMA::Major::MN;
  using AtomQ = std::conditional_t<
      kByRank, cute::GMMA::Layout_K_SW128_Atom<ElementA>,
      std::conditional_t<kRank == 16, cute::GMMA::Layout_MN_SW32_Atom<ElementA>,
                         std::conditional_t<kRank == 32, cute::GMMA::Layout_MN_SW64_Atom<ElementA>,
                                            cute::GMMA::Layout_MN_SW128_Atom<ElementA>>>>;
  using TileQ = cute::Shape<cute::Int<kRank>, cute::Int<kTileK>>;
  using LayoutQ = decltype(cute::tile_to_shape(AtomQ{}, TileQ{}));
  // The product with the first ranks of Q.
  template <int kRanks>
  using TiledMmaZ = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<
          ElementA, ElementA, float,
          cute::Shape<cute::Int<kTileM>, cute::Int<kRanks>, cute::Int<kTileK>>,
          cute::GMMA::Major::K, kMajorQ>(),
      cute::Layout<cute::Shape<cute::_2, cute::_1, cute::_1>>{}));
  static constexpr int kFewRanks = kRank == 128 ? 64 : kRank;  // a narrower product where it does
  static constexpr unsigned kBytesQ = kRank * kTileK * sizeof(ElementA);

  struct TensorStorage : Base::TensorStorage {
    // Q, and between a tile's last product with it and the next tile what the warp that adds up
    // fetches: float4 [kMakingSlices][32].
    cute::array_aligned<ElementA, making_bytes(kRank) / 2> smem_q;
  };

  struct Arguments : Pairs::Arguments {
    Making making;
    void* z = nullptr;
    std::int64_t pitch_z = 0;
  };

  struct Params : Pairs::Params {
    using TmaQ = decltype(cute::make_tma_copy(
        cute::SM90_TMA_LOAD{},
        cute::make_tensor(cute::make_gmem_ptr(static_cast<const ElementA*>(nullptr)),
                          cute::make_shape(0, 0), cute::take<0, 2>(StrideQ{})),
        LayoutQ{}, TileQ{}, cute::_1{}));
    TmaQ load_q;
    ElementA* z = nullptr;
    std::int64_t pitch_z = 0;
    float scale = 1.0F;
    float* partials = nullptr;
    unsigned* counters = nullptr;
    int m = 0, k = 0, r = 0;
    int width = 0;  // columns of a part: the rank rounded up to a power of two
    int tiles_n = 0;
    int slices = 0;                        // parts of z in a row of tiles
    typename Scheduler::Params scheduler;  // a copy of the kernel's
  };

  template <class Shape>
  static Params to_underlying_arguments(const Shape& shape, const Arguments& args,
                                        void* workspace) {
    using namespace cute;
    constexpr int kTileN = size<1>(typename Base::TileShape{});
    const int tiles_n = (static_cast<int>(get<1>(shape)) + kTileN - 1) / kTileN;
    const auto stride_q = [&] {
      if constexpr (kByRank) {
        return make_stride(args.making.pitch_q, _1{});
      } else {
        return make_stride(_1{}, args.making.pitch_q);
      }
    }();
    const Tensor q = make_tensor(make_gmem_ptr(static_cast<const ElementA*>(args.making.q)),
                                 make_shape(args.r, args.k), stride_q);
    return {Pairs::to_underlying_arguments(shape, args, workspace),
            make_tma_copy(SM90_TMA_LOAD{}, q, LayoutQ{}, TileQ{}, _1{}),
            static_cast<ElementA*>(args.z),
            args.pitch_z,
            args.making.scale,
            args.making.partials,
            args.making.counters,
            static_cast<int>(get<0>(shape)),
            args.k,
            args.r,
            making_width(args.r),
            tiles_n,
            tiles_n >= kMakingSlices ? kMakingSlices : kMakingSlices / 2,
            {}};
  }

  template <class Inputs, class Coord, class Iterator>
  CUTLASS_DEVICE void load(const Params& params, MainloopPipeline pipeline, PipelineState state,
                           const Inputs& inputs, const Coord& coord, Iterator tiles, int count,
                           int lane, uint32_t rank, TensorStorage& storage) {
    if (!waited_) Pairs::wait_for_low_rank(params);  // Q may come from the kernel before
    waited_ = true;
    load_main(params, pipeline, state, inputs, coord, rank, storage);
    state.advance(params.main_tiles);
    sync(kReadyThreads, kReady);
    asm volatile("fence.proxy.async;" ::: "memory");
    Base::load(params.low_rank, pipeline, state, inputs, coord, tiles, count - params.main_tiles,
               lane, rank, storage);
  }

  // A warp beside the producer: sees to z while the others multiply.
  template <class Inputs, class Coord, class Iterator>
  CUTLASS_DEVICE void load_auxiliary(const Params& params, MainloopPipeline, PipelineState,
                                     const Inputs&, const Coord& coord, Iterator, int, int lane,
                                     uint32_t, TensorStorage& storage) {
    const int row = cute::get<0>(coord), col = cute::get<1>(coord);
    unsigned* counter = params.counters + 2 * row;
    if (col < params.slices) {
      sync(kPartThreads, kPart);
      if (lane == 0) release_add(counter, 1);
      wait_until(counter, params.slices);
      add_up(params, row, col, lane, storage);
      asm volatile("fence.proxy.async;" ::: "memory");  // TMA will read it
      __syncwarp();
      if (lane == 0) release_add(counter + 1, 1);
    }
    if (col < params.tiles_n) {  // the scheduler may round columns up
      wait_until(counter + 1, params.slices);
      asm volatile("fence.proxy.async;" ::: "memory");
      if (lane == 0) {
        // The last block of the row to come by leaves zeros behind.
        const unsigned passed = (atomicAdd(counter + 1, 1U << 16) >> 16) + 1;
        if (passed == static_cast<unsigned>(params.tiles_n)) counter[0] = counter[1] = 0;
      }
      __syncwarp();
    }
    sync(kReadyThreads, kReady);
  }

  template <class Accumulator>
  CUTLASS_DEVICE void mma(MainloopPipeline pipeline, PipelineState state, Accumulator& sums,
                          int count, int thread, TensorStorage& storage, const Params& params) {
    using namespace cute;
    typename Base::TiledMma tiled_mma;
    auto [a, b] = Pairs::fragments(tiled_mma, thread, storage);
    Tensor z = partition_fragment_C(TiledMmaZ<kRank>{}, Shape<Int<kTileM>, Int<kRank>>{});
    clear(z);
    PipelineState release = state;

    // Starts the product of the next tile of K, and that with so many ranks of Q.
    const auto multiply = [&](auto ranks) {
      pipeline.consumer_wait(state, pipeline.consumer_try_wait(state));
      const int stage = state.index();
      warpgroup_fence_operand(sums);
      if constexpr (ranks > 0) warpgroup_fence_operand(z);
      warpgroup_arrive();
      CUTLASS_PRAGMA_UNROLL
      for (int step = 0; step < kTileK / 16; ++step) {
        cute::gemm(tiled_mma, a(_, _, step, stage), b(_, _, step, stage), sums);
        tiled_mma.accumulate_ = GMMA::ScaleOut::One;
        if constexpr (ranks > 0) add_z<ranks>(a(_, _, step, stage), step, z, storage);
      }
      warpgroup_commit_batch();
      ++state;
    };
    const auto finish_one = [&] {
      warpgroup_wait<1>();
      warpgroup_fence_operand(sums);
      pipeline.consumer_release(release);
      ++release;
    };

    // No block makes its part on its first tile.
    tiled_mma.accumulate_ = GMMA::ScaleOut::Zero;
    const auto turn = state.count() / static_cast<std::uint32_t>(count);
    warpgroup_fence_operand(z);
    multiply(_0{});

    // This block's tile of y number `turn`, as the kernel's own scheduler counts.
    Scheduler scheduler(params.scheduler);
    scheduler.advance_to_next_work(turn);
    const auto work = scheduler.get_current_work();
    const Walk walk(params, work.N_idx);
    int tile = 1;
    if (walk.first > 0) {
      int plain = walk.first - 1;
      CUTLASS_PRAGMA_NO_UNROLL
      for (; tile <= walk.last; tile += plain + 1, plain = walk.stride - 1) {
        CUTLASS_PRAGMA_NO_UNROLL
        for (int i = 0; i < plain; ++i) {
          multiply(_0{});
          finish_one();
        }
        if (params.r <= kFewRanks) {
          multiply(Int<kFewRanks>{});
        } else {
          multiply(Int<kRank>{});
        }
        finish_one();
      }
      warpgroup_wait<0>();
      warpgroup_fence_operand(sums);
      warpgroup_fence_operand(z);
      store_part(z, params, work.M_idx, work.N_idx, thread);
      arrive(kPartThreads, kPart);
    }
    CUTLASS_PRAGMA_NO_UNROLL
    for (; tile < params.main_tiles; ++tile) {
      multiply(_0{});
      finish_one();
    }
    Pairs::add_low_rank(tiled_mma, pipeline, state, release, sums, count - params.main_tiles,
                        thread, storage, params);
  }

 private:
  // A block's walk along K: it begins at tile `begin`, and makes its part of z on the tiles that
  // are first, first + stride ... last in its walk. Blocks that make none have first = -1, last =
  // -2. One half of the blocks share the first half of K, the other the second, and walk so that
  // they have passed it by the middle of their walk.
  struct Walk {
    int begin, stride, first, last;
    CUTLASS_DEVICE Walk(const Params& params, int col) {
      const int slice = col % params.slices, half = params.main_tiles / 2;
      stride = params.slices / 2;
      const bool second = slice >= stride;
      const int length = second ? params.main_tiles - half : half;
      begin = second ? half - 1 : params.main_tiles - 1;
      first = 1 + slice % stride;
      last = first + (length - first) / stride * stride;
      if (col >= params.slices) {
        first = -1;
        last = -2;
      }
    }
  };

  // z += a Q^T for the first ranks of Q and one step of a tile of K.
  template <int kRanks, class A, class Sums>
  CUTLASS_DEVICE static void add_z(const A& a, int step, Sums& z, TensorStorage& storage) {
    using namespace cute;
    TiledMmaZ<kRanks> mma;
    mma.accumulate_ = GMMA::ScaleOut::One;
    const Tensor tile = local_tile(make_tensor(make_smem_ptr(storage.smem_q.data()), LayoutQ{}),
                                   Shape<Int<kRanks>, Int<kTileK>>{}, make_coord(_0{}, _0{}));
    auto slice = mma.get_slice(0);
    const Tensor q = slice.make_fragment_B(slice.partition_B(tile));
    Tensor sums = make_tensor(
        z.data(), partition_fragment_C(mma, Shape<Int<kTileM>, Int<kRanks>>{}).layout());
    cute::gemm(mma, a, q(_, _, step), sums);
  }

  template <class Inputs, class Coord>
  CUTLASS_DEVICE static void load_main(const Params& params, MainloopPipeline& pipeline,
                                       PipelineState state, const Inputs& inputs,
                                       const Coord& coord, uint32_t rank, TensorStorage& storage) {
    using namespace cute;
    if (!elect_one_sync()) return;
    const Walk walk(params, get<1>(coord));
    const Tensor a = get<0>(inputs)(_, _, get<0>(coord), _, get<3>(coord));
    const Tensor b = get<1>(inputs)(_, _, get<1>(coord), _, get<3>(coord));
    const Tensor q = local_tile(params.load_q.get_tma_tensor(make_shape(params.r, params.k)),
                                TileQ{}, make_coord(0, _));
    auto slice_a = params.tma_load_a.get_slice(0);
    auto slice_b = params.tma_load_b.get_slice(rank);
    auto slice_q = params.load_q.get_slice(0);
    const Tensor from_a = slice_a.partition_S(a);
    const Tensor from_b = slice_b.partition_S(b);
    const Tensor from_q = slice_q.partition_S(q);
    const Tensor to_a = slice_a.partition_D(
        make_tensor(make_smem_ptr(storage.smem_A.data()), typename Base::SmemLayoutA{}));
    const Tensor to_b = slice_b.partition_D(
        make_tensor(make_smem_ptr(storage.smem_B.data()), typename Base::SmemLayoutB{}));
    const Tensor to_q =
        slice_q.partition_D(make_tensor(make_smem_ptr(storage.smem_q.data()), LayoutQ{}));
    constexpr std::uint16_t kBoth = 3;  // blocks of the cluster, which share W

    int k = walk.begin, next = walk.first;
    CUTLASS_PRAGMA_NO_UNROLL
    for (int tile = 0; tile < params.main_tiles; ++tile, ++state) {
      pipeline.producer_acquire(state);
      auto* barrier = pipeline.producer_get_barrier(state);
      if (tile == next) {
        // Before the loads, so that the barrier cannot complete without these bytes.
        cutlass::arch::ClusterTransactionBarrier::expect_transaction(barrier, kBytesQ);
        copy(params.load_q.with(*barrier), from_q(_, _, _, k), to_q(_, _, _));
        next = next < walk.last ? next + walk.stride : -1;
      }
      copy(params.tma_load_a.with(*barrier), from_a(_, _, _, k), to_a(_, _, _, state.index()));
      copy(params.tma_load_b.with(*barrier, kBoth), from_b(_, _, _, k),
           to_b(_, _, _, state.index()));
      k = k + 1 < params.main_tiles ? k + 1 : 0;
    }
  }

  // The part of z that this thread has summed: [slices, kTileM, width] for a row of tiles.
  template <class Sums>
  CUTLASS_DEVICE static void store_part(const Sums& z, const Params& params, int row, int slice,
                                        int thread) {
    const int lane = thread % 32;
    const std::int64_t lines =
        (static_cast<std::int64_t>(row) * params.slices + slice) * kTileM + thread / 32 * 16;
    float* part = params.partials + (lines + lane / 4) * params.width + lane % 4 * 2;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < cute::size(Sums{}); i += 4) {
      // Of each four sums two lie in one row and two in the row eight further.
      if (i * 2 < params.width) {
        float* to = part + i * 2;
        *reinterpret_cast<float2*>(to) = make_float2(z(i), z(i + 1));
        *reinterpret_cast<float2*>(to + 8 * params.width) = make_float2(z(i + 2), z(i + 3));
      }
    }
  }

  // A warp adds up the parts of its share of the rows of z and stores them.
  CUTLASS_DEVICE static void add_up(const Params& params, int row, int share, int lane,
                                    TensorStorage& storage) {
    const int sums = kTileM * params.width;
    auto* fetched = reinterpret_cast<float4*>(storage.smem_q.data());
    const float* parts = params.partials + static_cast<std::int64_t>(row) * params.slices * sums;
    const int begin = kTileM * share / params.slices * params.width;
    const int end = kTileM * (share + 1) / params.slices * params.width;
    // So many times 128 sums are fetched at once, all in flight without a register each.
    constexpr int kAtOnce = making_bytes(kRank) / (kMakingSlices * 32 * 16), kStep = 32 * 4;
    CUTLASS_PRAGMA_NO_UNROLL
    for (int block = begin + lane * 4; block < end; block += kAtOnce * kStep) {
      CUTLASS_PRAGMA_NO_UNROLL
      for (int i = 0; i < kAtOnce && block + i * kStep < end; ++i) {
        CUTLASS_PRAGMA_NO_UNROLL
        for (int slice = 0; slice < params.slices; ++slice) {
          cutlass::arch::cp_async<16, cutlass::arch::CacheOperation::Global>(
              &fetched[(i * kMakingSlices + slice) * 32 + lane],
              parts + slice * sums + block + i * kStep);
        }
      }
      asm volatile("cp.async.wait_all;" ::: "memory");
      CUTLASS_PRAGMA_NO_UNROLL
      for (int i = 0; i < kAtOnce && block + i * kStep < end; ++i) {
        float4 sum = make_float4(0, 0, 0, 0);
        CUTLASS_PRAGMA_NO_UNROLL
        for (int slice = 0; slice < params.slices; ++slice) {
          const float4 part = fetched[(i * kMakingSlices + slice) * 32 + lane];
          sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
        }
        store_sums(params, row, block + i * kStep, sum);
      }
    }
  }

  // Four neighbours of z; `at` counts in the tile.
  CUTLASS_DEVICE static void store_sums(const Params& params, int row, int at, const float4& sum) {
    const int line = row * kTileM + at / params.width, column = at % params.width;
    if (line >= params.m || column >= (params.r + 7) / 8 * 8) return;
    cutlass::AlignedArray<ElementA, 4> out;
    out[0] = static_cast<ElementA>(sum.x * params.scale);
    out[1] = static_cast<ElementA>(sum.y * params.scale);
    out[2] = static_cast<ElementA>(sum.z * params.scale);
    out[3] = static_cast<ElementA>(sum.w * params.scale);
    *reinterpret_cast<cutlass::AlignedArray<ElementA, 4>*>(params.z + line * params.pitch_z +
                                                           column) = out;
  }

  CUTLASS_DEVICE static void wait_until(const unsigned* counter, int low_half) {
    while ((acquire(counter) & 0xFFFF) < static_cast<unsigned>(low_half)) __nanosleep(64);
  }
  CUTLASS_DEVICE static void sync(int threads, int barrier) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
  }
  CUTLASS_DEVICE static void arrive(int threads, int barrier) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
  }

  CUTLASS_DEVICE static unsigned acquire(const unsigned* from) {
    unsigned value;
    asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
    return value;
  }
  CUTLASS_DEVICE static void release_add(unsigned* to, unsigned value) {
    asm volatile("red.release.gpu.add.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
  }

  bool waited_ = false;  // the producer's
};

}  // namespace pyfast::lora
