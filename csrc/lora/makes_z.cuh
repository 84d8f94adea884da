// SPDX-License-Identifier: Apache-2.0
// A GEMM that makes its own low-rank operand: y = x W^T + z B^T with z = s x Q^T, Q[R, K].
//
// x passes through shared memory anyway, so z costs no pass over x. The first eight blocks of a row
// of tiles, its makers, share the work: of the tiles of K each multiplies some with Q as well (one
// narrow wgmma more), stores its part of z as float32, and when all parts of the row are there,
// each adds up a few rows of z and stores them. Before its last step, the low-rank one, a block
// waits for the z of its row. Sums are made in a fixed order: results repeat bit for bit.
//
// So that z is there in time, half of the makers begin in the middle of K, and all of them do their
// part in the first half of their walk. No block waits for one that cannot start: the grid takes
// the tiles eight columns at a time, rows first, a multiple of eight blocks at once (plan_making,
// order_of_tiles), so that the makers of a row run together and not after those that wait for them.
//
// Where x is dy and z is dz, up to 16 ranks, the factors' gradients are made on the way
// (SideParts): a maker multiplies its tiles of dy with the forward's z too, for dB = dy^T z, and
// every block the tile of the layer's input above its tile of dx with dz, for dA^T = x^T dz. A
// block adds what it has to float32 sums that no other block adds to (order again fixed);
// side_parts.cu adds them up.
#pragma once

#include "common/sync.cuh"
#include "lora/making_operands.cuh"
#include "lora/mask_tiles.cuh"
#include "lora/narrow_wgmma.cuh"

namespace pyfast::lora {

template <class Base, int kRank, Drop kDrop = Drop::kNone>
struct MakesZ : MakingOperands<Base, kRank, kDrop> {
  using Operands = MakingOperands<Base, kRank, kDrop>;
  using Operands::kBox, Operands::kBoxes, Operands::kStageB, Operands::kTilesT;
  using Operands::kByRank, Operands::kFewRanks, Operands::kMajorQ, Operands::kSide;
  using Operands::kCleared, Operands::kDrawn, Operands::kDrawnThreads;
  using Operands::kPart, Operands::kPartThreads, Operands::kReady, Operands::kReadyThreads;
  using Operands::kTileK, Operands::kTileM, Operands::kStride;
  using Operands::mask_of;
  using typename Base::MainloopPipeline;
  using typename Base::PipelineState;
  using typename Operands::ElementA;
  using typename Operands::Pairs;
  using typename Operands::Params;
  using typename Operands::Scheduler;
  using typename Operands::TensorStorage;
  using typename Operands::Walk;
  template <int kRanks>
  using TiledMmaZ = typename Operands::template TiledMmaZ<kRanks>;

  // A warp beside the producer: sees to z while the others multiply.
  template <class Inputs, class Coord, class Iterator>
  CUTLASS_DEVICE void load_auxiliary(const Params& params, MainloopPipeline, PipelineState,
                                     const Inputs&, const Coord& coord, Iterator, int, int lane,
                                     uint32_t, TensorStorage& storage) {
    const int row = cute::get<0>(coord), col = cute::get<1>(coord);
    unsigned* counter = params.counters + 2 * row;
    if (col < kMakers) {
      sync(kPartThreads, kPart);
      if (lane == 0) release_add(counter, 1);
      wait_until(counter, kMakers);
      params.row_sums.template add_up<making_bytes(kRank)>(
          row, col, lane, reinterpret_cast<float4*>(storage.smem_q.data()));
      asm volatile("fence.proxy.async;" ::: "memory");  // TMA will read it
      __syncwarp();
      if (lane == 0) release_add(counter + 1, 1);
    }
    if (col < params.tiles_n) {  // columns are rounded up
      wait_until(counter + 1, kMakers);
      asm volatile("fence.proxy.async;" ::: "memory");
      __syncwarp();  // before zeros are written, all lanes have seen the count
      if (lane == 0) {
        // The last block of the row to come by leaves zeros behind.
        const unsigned passed = (atomicAdd(counter + 1, 1U << 16) >> 16) + 1;
        if (passed == static_cast<unsigned>(params.tiles_n)) counter[0] = counter[1] = 0;
      }
    }
    __syncwarp();
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

    // Starts the product of the next tile of K, that with so many ranks of Q, and that of the
    // tile's columns with the forward's z.
    const auto multiply = [&](auto ranks, auto with_db,
                              float (&db)[kNarrowSums]) __attribute__((always_inline)) {
      pipeline.consumer_wait(state, pipeline.consumer_try_wait(state));
      const int stage = state.index();
      warpgroup_fence_operand(sums);
      if constexpr (ranks > 0) warpgroup_fence_operand(z);
      if constexpr (with_db) narrow_fence(db);
      warpgroup_arrive();
      CUTLASS_PRAGMA_UNROLL
      for (int step = 0; step < kTileK / 16; ++step) {
        cute::gemm(tiled_mma, a(_, _, step, stage), b(_, _, step, stage), sums);
        tiled_mma.accumulate_ = GMMA::ScaleOut::One;
        if constexpr (ranks > 0) add_z<ranks>(a(_, _, step, stage), step, z, storage);
      }
      if constexpr (with_db) {
        narrow_multiply<ElementA, kTileM, kSideRank * 2>(
            storage.smem_A.data() + stage * kTileM * kTileK, storage.smem_q.data() + kRank * kTileK,
            db);
      }
      warpgroup_commit_batch();
      ++state;
    };
    // Waits until all but so many batches are done, and gives the stage before the last away.
    const auto finish = [&](auto running) __attribute__((always_inline)) {
      warpgroup_wait<running>();
      warpgroup_fence_operand(sums);
      pipeline.consumer_release(release);
      ++release;
    };
    float none[kNarrowSums];
    // No block makes its part on its first tile.
    tiled_mma.accumulate_ = GMMA::ScaleOut::Zero;
    const auto turn = state.count() / static_cast<std::uint32_t>(count);
    warpgroup_fence_operand(z);
    multiply(_0{}, false_type{}, none);

    // This block's tile of y number `turn`, as the kernel's own scheduler counts.
    Scheduler scheduler(params.scheduler);
    scheduler.advance_to_next_work(turn);
    const auto work = scheduler.get_current_work();
    const Walk walk(params, work.N_idx);
    const int group = thread / kNarrowThreads;  // of the two consumers
    const auto tile_of_k = [&](int tile) {
      const int at = walk.begin + tile;
      return at < params.main_tiles ? at : at - params.main_tiles;
    };

    // The mask is drawn while products run: that of the tile of dx, or the lane's word of that for
    // the next tile of x.
    std::uint32_t* mask = mask_of(turn, storage);
    int draws = 0;
    std::uint32_t keep = 0;
    MaskWord word;
    const auto draw = [&]() __attribute__((always_inline)) {
      if constexpr (kDrop == Drop::kInDx) {
        if (draws == kMaskDraws) return;
        draw_step(mask, keep, MaskSeed(params.mask.seed), params.level, work.M_idx * kTileM,
                  work.N_idx * kMaskRowWords, draws, thread);
        ++draws;
      } else if constexpr (kDrop == Drop::kInX) {
        if (!word.drawn()) word.step(MaskSeed(params.mask.seed), params.level);
      }
    };
    const auto plain = [&](int tiles) __attribute__((always_inline)) {
      CUTLASS_PRAGMA_NO_UNROLL
      for (; tiles > 0; --tiles) {
        multiply(_0{}, false_type{}, none);
        finish(_1{});
        draw();
      }
    };
    const auto finish_mask = [&]() __attribute__((always_inline)) {
      if constexpr (kDrop == Drop::kInDx) {
        while (draws < kMaskDraws) draw();
        sync(kDrawnThreads, kDrawn);
      }
    };

    int tile = 1;
    if (walk.first > 0) {
      CUTLASS_PRAGMA_NO_UNROLL
      for (int part = 0; walk.first + part * kStride <= walk.last; ++part) {
        const int ahead = walk.first + part * kStride - tile;
        tile = walk.first + part * kStride;
        if constexpr (kDrop == Drop::kInX) {
          word = word_of_quad(work.M_idx * kTileM + thread / 32 * 16 + thread % 32 / 4,
                              tile_of_k(tile) * (kTileK / kMaskColumns));
        }
        plain(ahead);
        if constexpr (kDrop == Drop::kInX) {
          while (!word.drawn()) draw();
        }
        bool with_db = false;
        if constexpr (kSide) with_db = params.db != nullptr && part % 2 == group;
        if (with_db) {
          if constexpr (kSide) {
            float db[kNarrowSums];
            multiply(Int<kRank>{}, true_type{}, db);
            finish(_1{});
            multiply(_0{}, false_type{}, none);
            finish(_1{});
            narrow_fence(db);
            store_side(params.db, params, work.M_idx, params.main_tiles, tile_of_k(tile), db,
                       thread);
            ++tile;
          }
        } else if constexpr (kDrop == Drop::kInX) {
          const int stage = state.index();
          multiply(_0{}, false_type{}, none);
          finish(_1{});
          add_kept_x(storage.smem_A.data() + stage * kBox, word.keep, z, thread, storage);
        } else {
          if (params.r <= kFewRanks) {
            multiply(Int<kFewRanks>{}, false_type{}, none);
          } else {
            multiply(Int<kRank>{}, false_type{}, none);
          }
          finish(_1{});
        }
        ++tile;
      }
      warpgroup_wait<0>();
      warpgroup_fence_operand(sums);
      warpgroup_fence_operand(z);
      params.row_sums.store_part(z, work.M_idx, work.N_idx, thread);
      __syncwarp();
      arrive(kPartThreads, kPart);
    }
    if constexpr (kSide) {
      CUTLASS_PRAGMA_NO_UNROLL
      for (int i = 0; i < params.tiles_t; ++i) {
        const int until = params.main_tiles - params.back * (kTilesT - i);
        plain(until - tile);
        if (i == 0) finish_mask();
        float da[kNarrowSums];
        multiply_above(pipeline, state, group, mask + (i * 2 + group) * (kTileK / kMaskColumns),
                       thread, da, storage);
        ++state;
        finish(_1{});
        plain(1);
        tile = until + 1;
        narrow_fence(da);
        if (work.N_idx < params.tiles_n) {  // columns are rounded up
          store_side(params.da, params, work.M_idx, params.tiles_n * kBoxes,
                     work.N_idx * kBoxes + i * 2 + group, da, thread);
        }
      }
    }
    plain(params.main_tiles - tile);
    if constexpr (kDrop == Drop::kInDx) {
      if (params.tiles_t == 0) finish_mask();
      add_kept_low_rank(pipeline, state, release, sums, mask, thread, storage, params);
    } else {
      Pairs::add_low_rank(tiled_mma, pipeline, state, release, sums,
                          count - params.main_tiles - params.tiles_t, thread, storage, params);
    }
  }

 private:
  // The sums of one warpgroup for 64 columns: the row of tiles says whose they are.
  CUTLASS_DEVICE static void store_side(float* sums, const Params& params, int row, int tiles,
                                        int tile, const float (&part)[kNarrowSums], int thread) {
    const std::int64_t at = static_cast<std::int64_t>(row % params.rows_at_once) * tiles + tile;
    narrow_store(sums + at * (kNarrowColumns * kNarrowRanks), part, thread % kNarrowThreads,
                 row < params.rows_at_once);
  }

  // Starts z += D(x) Q^T for a tile of K: x from shared memory by way of registers; `drawn` is the
  // lane's word of the mask.
  template <class Sums>
  CUTLASS_DEVICE static void add_kept_x(const ElementA* tile, std::uint32_t drawn, Sums& z,
                                        int thread, TensorStorage& storage) {
    const int lane = thread % 32, warp_row = thread / 32 * 16;
    std::uint32_t x[kTileK / 16][4];
    CUTLASS_PRAGMA_UNROLL
    for (int step = 0; step < kTileK / 16; ++step) {
      const int line = warp_row + lane % 16, unit = step * 2 + lane / 16;
      const auto from = cute::cast_smem_ptr_to_uint(tile) + line * 128 + ((unit ^ line % 8) << 4);
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                   : "=r"(x[step][0]), "=r"(x[step][1]), "=r"(x[step][2]), "=r"(x[step][3])
                   : "r"(from)
                   : "memory");
    }
    std::uint32_t words[4];
    trade_words(drawn, words);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 16; ++i) {
      const std::uint32_t word = words[i / 4];
      const int half = i / 4 % 2, unit = i / 8 * 4 + i % 4;
      x[unit / 2][unit % 2 * 2 + half] &=
          kept_halves(word << (7 - lane % 4 * 2), word << (6 - lane % 4 * 2), i % 4);
    }
    auto& sums = reinterpret_cast<float (&)[kNarrowSums]>(*z.data());
    narrow_fence(sums);
    CUTLASS_PRAGMA_UNROLL
    for (auto& step : x) {
      for (std::uint32_t& word : step) cute::warpgroup_fence_operand(word);
    }
    cute::warpgroup_arrive();
    CUTLASS_PRAGMA_UNROLL
    for (int step = 0; step < kTileK / 16; ++step) {
      narrow_multiply_rows<ElementA, kByRank>(x[step], storage.smem_q.data(), step, sums);
    }
    cute::warpgroup_commit_batch();
  }

  // The low-rank step with dropout, 64 columns at a time; mma_tail gives its stage away.
  template <class Accumulator>
  CUTLASS_DEVICE static void add_kept_low_rank(MainloopPipeline& pipeline, PipelineState state,
                                               PipelineState release, Accumulator& sums,
                                               const std::uint32_t* mask, int thread,
                                               TensorStorage& storage, const Params& params) {
    using namespace cute;
    constexpr int kColumns = 64;
    using Product =
        decltype(make_tiled_mma(GMMA::ss_op_selector<ElementA, ElementA, float,
                                                     Shape<Int<kTileM>, Int<kColumns>, Int<kTileK>>,
                                                     GMMA::Major::K, kMajorQ>(),
                                Layout<Shape<_2, _1, _1>>{}));
    Product product;
    pipeline.consumer_wait(state, pipeline.consumer_try_wait(state));
    const int stage = state.index(), group = thread / kNarrowThreads;
    auto slice = product.get_slice(group * kNarrowThreads);
    const Tensor all_a =
        make_tensor(make_smem_ptr(storage.smem_A.data()), typename Base::SmemLayoutA{});
    const Tensor all_b =
        make_tensor(make_smem_ptr(storage.smem_B.data()), typename Base::SmemLayoutB{});
    const Tensor a = slice.make_fragment_A(slice.partition_A(all_a));
    warpgroup_wait<0>();
    warpgroup_fence_operand(sums);
    pipeline.consumer_release(release);
    const std::uint32_t* rows = mask + group * (kTileM / 2) * kMaskRowWords;
    const auto add = [&](auto chunk) __attribute__((always_inline)) {
      Tensor low = partition_fragment_C(product, Shape<Int<kTileM>, Int<kColumns>>{});
      const Tensor part = local_tile(all_b(_, _, stage), Shape<Int<kColumns>, Int<kTileK>>{},
                                     make_coord(chunk, _0{}));
      const Tensor b = slice.make_fragment_B(slice.partition_B(part));
      product.accumulate_ = GMMA::ScaleOut::Zero;
      warpgroup_fence_operand(low);
      warpgroup_arrive();
      cute::gemm(product, a(_, _, _0{}, stage), b(_, _, _0{}), low);
      warpgroup_commit_batch();
      warpgroup_wait<0>();
      warpgroup_fence_operand(low);
      add_kept<chunk * kColumns / 2>(sums, low, rows + chunk * (kColumns / kMaskColumns),
                                     params.mask.scale, thread % kNarrowThreads);
    };
    add(_0{});
    add(_1{});
    add(_2{});
    add(_3{});
  }

  // Starts this warpgroup's part of dA from a stage of load_above.
  CUTLASS_DEVICE static void multiply_above(MainloopPipeline& pipeline, PipelineState state,
                                            int group, const std::uint32_t* mask, int thread,
                                            float (&da)[kNarrowSums], TensorStorage& storage) {
    pipeline.consumer_wait(state, pipeline.consumer_try_wait(state));
    ElementA* in_a = storage.smem_A.data() + state.index() * kBox;
    ElementA* in_b = storage.smem_B.data() + state.index() * kStageB;
    if constexpr (kDrop == Drop::kInDx) {
      clear_dropped(group == 0 ? in_a : in_b, mask, thread % kNarrowThreads);
      asm volatile("fence.proxy.async;" ::: "memory");  // wgmma will read it
      sync(kNarrowThreads, kCleared + group);
    }
    narrow_fence(da);
    cute::warpgroup_arrive();
    narrow_multiply<ElementA, kTileM, kTileK * 2>(group == 0 ? in_a : in_b, in_b + kBox, da);
    cute::warpgroup_commit_batch();
  }

  // z += a Q^T for the first ranks of Q and one step of a tile of K.
  template <int kRanks, class A, class Sums>
  CUTLASS_DEVICE static void add_z(const A& a, int step, Sums& z, TensorStorage& storage) {
    using namespace cute;
    TiledMmaZ<kRanks> mma;
    mma.accumulate_ = GMMA::ScaleOut::One;
    const Tensor tile =
        local_tile(make_tensor(make_smem_ptr(storage.smem_q.data()), typename Operands::LayoutQ{}),
                   Shape<Int<kRanks>, Int<kTileK>>{}, make_coord(_0{}, _0{}));
    auto slice = mma.get_slice(0);
    const Tensor q = slice.make_fragment_B(slice.partition_B(tile));
    Tensor sums = make_tensor(
        z.data(), partition_fragment_C(mma, Shape<Int<kTileM>, Int<kRanks>>{}).layout());
    cute::gemm(mma, a, q(_, _, step), sums);
  }
};

}  // namespace pyfast::lora
