// SPDX-License-Identifier: Apache-2.0
// What a GEMM that makes its own low-rank operand (makes_z.cuh) holds in shared memory, and its
// producer.
#pragma once

#include <algorithm>

#include "common/sync.cuh"
#include "lora/mask_tiles.cuh"
#include "lora/narrow_wgmma.cuh"
#include "lora/row_sums.cuh"
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

// Of shared memory that a kernel needs for Q, and for the forward's z where it makes parts of dB.
constexpr int making_bytes(int rank) {
  constexpr int kTileM = 128, kTileK = 64;
  return rank * kTileK * 2 + (rank == kSideRank ? rank * kTileM * 2 : 0);
}

// Dropout of x where z is made of it, as forward; or of z B^T and in dA, as backward.
enum class Drop { kNone, kInX, kInDx };

template <class Base, int kRank, Drop kDrop>
struct MakingOperands : TwoPairs<Base> {
  using DispatchPolicy = WithAuxiliary<typename Base::DispatchPolicy>;
  using Pairs = TwoPairs<Base>;
  using Scheduler = cutlass::gemm::kernel::detail::PersistentTileSchedulerSm90;
  using Pairs::kTileK;
  using typename Base::ElementA;
  using typename Base::MainloopPipeline;
  using typename Base::PipelineState;
  static constexpr int kTileM = cute::size<0>(typename Base::TileShape{});
  static constexpr int kWarps = cute::size(typename Base::TiledMma{}) / 32;
  // A maker loads Q once in so many tiles of K, hence one buffer for Q is enough.
  static constexpr int kStride = kMakers / 2;
  static_assert(Base::K_PIPE_MAX <= kStride);
  static constexpr bool kSide = kRank == kSideRank;
  static constexpr int kBarriers =
      static_cast<int>(cutlass::arch::ReservedNamedBarriers::FirstUserBarrier);
  // Named barriers, the first that CUTLASS leaves to others; of the last each consumer has its own.
  static constexpr int kPart = kBarriers, kPartThreads = kWarps * 32 + 32;  // the part is stored
  static constexpr int kReady = kBarriers + 1, kReadyThreads = 64;          // z of the row is there
  static constexpr int kDrawn = kBarriers + 2, kDrawnThreads = kWarps * 32;  // the mask is
  static constexpr int kCleared = kBarriers + 3;  // a box is free of what is dropped
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

  // The forward's z for a row of tiles, and the layer's input 64 columns at a time: four boxes
  // above a tile of dx. Two of them and dz fill a stage. The two stages come a few tiles before the
  // end of K (Params::back): dz is there by then, and two in a row would leave the pipeline empty.
  using TileV = cute::Shape<cute::Int<kSideRank>, cute::Int<kTileM>>;
  using LayoutV =
      decltype(cute::tile_to_shape(cute::GMMA::Layout_MN_SW32_Atom<ElementA>{}, TileV{}));
  using TileT = cute::Shape<cute::Int<kTileM>, cute::_64>;
  using LayoutT =
      decltype(cute::tile_to_shape(cute::GMMA::Layout_K_SW128_Atom<ElementA>{}, TileT{}));
  static constexpr int kTilesT = 2, kBoxes = 4;
  static constexpr int kBox = kTileM * kTileK, kStageB = kBoxes * kTileK * kTileK;  // elements
  static_assert(cute::size<1>(typename Base::TileShape{}) == kBoxes * kTileK);
  static constexpr unsigned kBytesV = kSideRank * kTileM * sizeof(ElementA);

  struct TensorStorage : Base::TensorStorage {
    // Q and the forward's z; between a tile's last product with them and the next tile what the
    // warp that adds up fetches.
    cute::array_aligned<ElementA, making_bytes(kRank) / 2> smem_q;
    // Masks of this tile of y and of the next.
    cute::array_aligned<std::uint32_t, kDrop == Drop::kInDx ? 2 * kMaskTileWords : 4> smem_mask;
  };

  struct Arguments : Pairs::Arguments {
    Making making;
    SideParts side;
    Mask mask;
    int rows_at_once = 0;
    std::int64_t pitch_z = 0;
  };

  struct Params : Pairs::Params {
    using TmaQ = decltype(cute::make_tma_copy(
        cute::SM90_TMA_LOAD{},
        cute::make_tensor(cute::make_gmem_ptr(static_cast<const ElementA*>(nullptr)),
                          cute::make_shape(0, 0), cute::take<0, 2>(StrideQ{})),
        LayoutQ{}, TileQ{}, cute::_1{}));
    using Pitched = cute::Stride<std::int64_t, cute::_1>;
    using ByColumn = cute::Stride<cute::_1, std::int64_t>;
    template <class Stride, class Layout, class Tile>
    using Tma = decltype(cute::make_tma_copy(
        cute::SM90_TMA_LOAD{},
        cute::make_tensor(cute::make_gmem_ptr(static_cast<const ElementA*>(nullptr)),
                          cute::make_shape(0, 0), Stride{}),
        Layout{}, Tile{}, cute::_1{}));
    using TmaV = Tma<ByColumn, LayoutV, TileV>;
    using TmaT = Tma<Pitched, LayoutT, TileT>;
    TmaQ load_q;
    TmaV load_v;
    TmaT load_t;
    float* db = nullptr;
    float* da = nullptr;
    int tiles_t = 0;  // kTilesT where parts of dA are wanted
    int back = 0;  // tiles of K from one stage of load_above to the next, and to the end (NOTES.md)
    int rows_at_once = 0;  // rows of tiles that the grid holds; so many sums are made side by side
    Mask mask;
    MaskLevel level;
    RowSums<ElementA, kTileM> row_sums;
    unsigned* counters = nullptr;
    int m = 0, n = 0;
    int k = 0, r = 0;  // of Q
    int tiles_n = 0;
    typename Scheduler::Params scheduler;  // a copy of the kernel's
  };

  template <class Shape>
  static Params to_underlying_arguments(const Shape& shape, const Arguments& args,
                                        void* workspace) {
    using namespace cute;
    constexpr int kTileN = size<1>(typename Base::TileShape{});
    const auto stride_q = [&] {
      if constexpr (kByRank) {
        return make_stride(args.making.pitch_q, _1{});
      } else {
        return make_stride(_1{}, args.making.pitch_q);
      }
    }();
    const auto tensor = [](const void* data, int rows, int cols, auto stride) {
      return make_tensor(make_gmem_ptr(static_cast<const ElementA*>(data)), make_shape(rows, cols),
                         stride);
    };
    const int m = static_cast<int>(get<0>(shape)), n = static_cast<int>(get<1>(shape));
    const auto& side = args.side;
    // What is not wanted gets the address of something else, and is not read.
    const bool db = side.db != nullptr, da = side.da != nullptr;
    const auto v = tensor(db ? side.z : args.making.z, args.r, m,
                          typename Params::ByColumn{_1{}, db ? side.pitch_z : args.pitch_z});
    const auto t = tensor(da ? side.x : args.making.z, m, da ? n : args.r,
                          typename Params::Pitched{da ? side.pitch_x : args.pitch_z, _1{}});
    Params params;
    static_cast<typename Pairs::Params&>(params) =
        Pairs::to_underlying_arguments(shape, args, workspace);
    params.k = params.main_tiles > params.first_tiles ? params.main_tiles * kTileK : args.k;
    params.r = args.making.r;
    params.load_q =
        make_tma_copy(SM90_TMA_LOAD{}, tensor(args.making.q, params.r, params.k, stride_q),
                      LayoutQ{}, TileQ{}, _1{});
    params.load_v = make_tma_copy(SM90_TMA_LOAD{}, v, LayoutV{}, TileV{}, _1{});
    params.load_t = make_tma_copy(SM90_TMA_LOAD{}, t, LayoutT{}, TileT{}, _1{});
    params.db = side.db;
    params.da = side.da;
    params.tiles_t = da ? kTilesT : 0;
    params.back = std::min(params.main_tiles / 12, 5);
    params.rows_at_once = args.rows_at_once;
    params.row_sums = {args.making.partials,   static_cast<ElementA*>(args.making.z),
                       args.pitch_z,           args.making.scale,
                       making_width(params.r), m,
                       (params.r + 7) / 8 * 8};
    params.mask = args.mask;
    params.level = MaskLevel(args.mask.threshold);
    params.counters = args.making.counters;
    params.m = m;
    params.n = n;
    params.tiles_n = (n + kTileN - 1) / kTileN;
    return params;
  }

  template <class Inputs, class Coord, class Iterator>
  CUTLASS_DEVICE void load(const Params& params, MainloopPipeline pipeline, PipelineState state,
                           const Inputs& inputs, const Coord& coord, Iterator tiles, int count,
                           int lane, uint32_t rank, TensorStorage& storage) {
    // The grid after this one may start on SMs that this one leaves.
    asm volatile("griddepcontrol.launch_dependents;");
    int at = 0;  // of main_tiles
    if constexpr (kSide) {
      for (int i = 0; i < params.tiles_t; ++i) {
        const int until = params.main_tiles - params.back * (kTilesT - i);
        load_main(params, pipeline, state, inputs, coord, rank, storage, at, until);
        state.advance(until - at);
        at = until;
        if (i == 0) wait_for_z();
        load_above(params, pipeline, state, inputs, coord, i, storage);
        ++state;
      }
    }
    load_main(params, pipeline, state, inputs, coord, rank, storage, at, params.main_tiles);
    state.advance(params.main_tiles - at);
    if (params.tiles_t == 0) wait_for_z();
    Base::load(params.low_rank, pipeline, state, inputs, coord, tiles,
               count - params.main_tiles - params.tiles_t, lane, rank, storage);
  }

 protected:
  // A block's walk along K: it begins at tile `begin`, and a maker makes its part of z on the tiles
  // that are first, first + kStride ... last in its walk; others have first = -1, last = -2. One
  // half of the makers share the first half of K, the other the second, and walk so that they have
  // passed it by the middle of their walk.
  struct Walk {
    int begin, first, last;
    CUTLASS_DEVICE Walk(const Params& params, int col) {
      const int half = params.main_tiles / 2;
      const bool second = col >= kStride;
      const int length = second ? params.main_tiles - half : half;
      begin = second ? half - 1 : params.main_tiles - 1;
      first = 1 + col % kStride;
      last = first + (length - first) / kStride * kStride;
      if (col >= kMakers) {
        begin = 0;
        first = -1;
        last = -2;
      }
    }
  };

  CUTLASS_DEVICE static std::uint32_t* mask_of(std::uint32_t turn, TensorStorage& storage) {
    return storage.smem_mask.data() + (kDrop == Drop::kInDx ? turn % 2 * kMaskTileWords : 0);
  }

 private:
  // Where a tile of K lies: in which pair, and which of its tiles it is.
  CUTLASS_DEVICE static cute::tuple<const typename Base::Params*, int> pair_of(const Params& params,
                                                                               int tile) {
    if (tile < params.first_tiles) return {&params, tile};
    tile -= params.first_tiles;
    if (tile < params.more_tiles[0]) return {&params.more[0], tile};
    return {&params.more[1], tile - params.more_tiles[0]};
  }

  template <class Inputs, class Coord>
  CUTLASS_DEVICE static void load_main(const Params& params, MainloopPipeline& pipeline,
                                       PipelineState state, const Inputs& inputs,
                                       const Coord& coord, uint32_t rank, TensorStorage& storage,
                                       int begin, int end) {
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

    int k = walk.begin + begin, next = begin == 0 ? walk.first : -1;
    if (k >= params.main_tiles) k -= params.main_tiles;
    CUTLASS_PRAGMA_NO_UNROLL
    for (int tile = begin; tile < end; ++tile, ++state) {
      pipeline.producer_acquire(state);
      auto* barrier = pipeline.producer_get_barrier(state);
      if (tile == next) {
        // Before the loads, so that the barrier cannot complete without these bytes.
        const bool with_v = kSide && params.db != nullptr && next == walk.first;
        cutlass::arch::ClusterTransactionBarrier::expect_transaction(
            barrier, kBytesQ + (with_v ? kBytesV : 0));
        copy(params.load_q.with(*barrier), from_q(_, _, _, k), to_q(_, _, _));
        if constexpr (kSide) {
          if (with_v) load_v(params, get<0>(coord), *barrier, storage);
        }
        next = next < walk.last ? next + kStride : -1;
      }
      const auto [pair, at] = pair_of(params, k);
      copy(pair->tma_load_a.with(*barrier), from_a(_, _, _, at), to_a(_, _, _, state.index()));
      copy(pair->tma_load_b.with(*barrier, kBoth), from_b(_, _, _, at),
           to_b(_, _, _, state.index()));
      k = k + 1 < params.main_tiles ? k + 1 : 0;
    }
  }

  // The forward's z for a row of tiles.
  template <class Barrier>
  CUTLASS_DEVICE static void load_v(const Params& params, int row, Barrier& barrier,
                                    TensorStorage& storage) {
    using namespace cute;
    const Tensor v = local_tile(params.load_v.get_tma_tensor(make_shape(params.r, params.m)),
                                TileV{}, make_coord(0, row));
    auto slice = params.load_v.get_slice(0);
    Tensor to = slice.partition_D(
        make_tensor(make_smem_ptr(storage.smem_q.data() + kRank * kTileK), LayoutV{}));
    copy(params.load_v.with(barrier), slice.partition_S(v), to);
  }

  // Two boxes of the layer's input above this tile of dx, and dz, in the next stage.
  template <class Inputs, class Coord>
  CUTLASS_DEVICE static void load_above(const Params& params, MainloopPipeline& pipeline,
                                        PipelineState state, const Inputs& inputs,
                                        const Coord& coord, int pair, TensorStorage& storage) {
    using namespace cute;
    if (!elect_one_sync()) return;
    static_assert(kStageB == 2 * kBox);
    ElementA* in_a = storage.smem_A.data() + state.index() * kBox;
    ElementA* in_b = storage.smem_B.data() + state.index() * kStageB;
    auto slice = params.load_t.get_slice(0);
    const Tensor t = params.load_t.get_tma_tensor(make_shape(params.m, params.n));
    const auto to = [](auto& slice_of, ElementA* box) {
      return slice_of.partition_D(make_tensor(make_smem_ptr(box), LayoutT{}));
    };
    pipeline.producer_acquire(state);
    auto* barrier = pipeline.producer_get_barrier(state);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 2; ++i) {
      const auto at = make_coord(get<0>(coord), get<1>(coord) * kBoxes + pair * 2 + i);
      Tensor box = to(slice, i == 0 ? in_a : in_b);
      copy(params.load_t.with(*barrier), slice.partition_S(local_tile(t, TileT{}, at)), box);
    }
    auto slice_z = params.low_rank.tma_load_a.get_slice(0);
    const Tensor z = get<0>(inputs)(_, _, get<0>(coord), 0, get<3>(coord));
    Tensor box = to(slice_z, in_b + kBox);
    copy(params.low_rank.tma_load_a.with(*barrier), slice_z.partition_S(z), box);
  }

  // The producer, before it reads z.
  CUTLASS_DEVICE static void wait_for_z() {
    sync(kReadyThreads, kReady);
    asm volatile("fence.proxy.async;" ::: "memory");
  }
};

}  // namespace pyfast::lora
