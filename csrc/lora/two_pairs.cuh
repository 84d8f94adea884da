// SPDX-License-Identifier: Apache-2.0
// y[M, N] = [x | z] [W | B]^T: a GEMM whose contraction runs over K and then over R.
//
// CUTLASS's sm90 collective (TMA, warp-specialised) does the work. TwoPairs gives it a second pair
// of operands: its producer loads ceil(K / 64) tiles of x and W, then ceil(R / 64) of z and B into
// the same stages. x and W may themselves be several pairs, one after the other. TMA fills what
// lies outside a matrix with zeros and still counts its bytes, so ragged K, R, M and N need no
// code. The consumer multiplies of the last tile only the steps of 16 ranks that there are: at rank
// 16 a quarter of a tile.
//
// MaskedTwoPairs is for dx with dropout, dx = dy W + mask * (dz A) / (1 - p): the low-rank tiles
// come first, the mask is drawn and applied to the sums in registers, and the main tiles are added.
#pragma once

#include <cuda_runtime.h>
#include <cutlass/cutlass.h>

#include <cute/tensor.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/sm90_tile_scheduler.hpp>

#include "lora/gemm.h"
#include "lora/mask_tiles.cuh"

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
    typename Base::Arguments more[kMorePairs];
    typename Base::Arguments low_rank;
    int k = 0;
    int more_k[kMorePairs] = {};
    int r = 0;
    bool wait_for_low_rank = false;  // z comes from the kernel before, which may still run
  };
  struct Params : Base::Params {
    typename Base::Params more[kMorePairs];
    typename Base::Params low_rank;
    int first_tiles = 0, more_tiles[kMorePairs] = {};
    int main_tiles = 0;      // of all pairs
    int low_rank_steps = 0;  // of 16 ranks
    bool wait_for_low_rank = false;
  };

  template <class Shape>
  static Params to_underlying_arguments(const Shape& shape, const Arguments& args,
                                        void* workspace) {
    static_assert(kTileK == kPairStep);
    Params params;
    const auto of = [&](int k, const typename Base::Arguments& operands) {
      auto its_shape = cute::append<4>(shape, 1);
      cute::get<2>(its_shape) = k;
      return Base::to_underlying_arguments(its_shape, operands, workspace);
    };
    const auto tiles = [](int k) { return (k + kTileK - 1) / kTileK; };
    auto& first = static_cast<typename Base::Params&>(params);
    first = of(args.k, args.main);
    params.first_tiles = params.main_tiles = tiles(args.k);
    for (int i = 0; i < kMorePairs; ++i) {
      params.more[i] = args.more_k[i] > 0 ? of(args.more_k[i], args.more[i]) : first;
      params.more_tiles[i] = tiles(args.more_k[i]);
      params.main_tiles += params.more_tiles[i];
    }
    params.low_rank = args.r > 0 ? of(args.r, args.low_rank) : first;
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
    load_mains(params, pipeline, state, inputs, coord, tiles, thread, rank, storage);
    if (count == params.main_tiles) return;
    wait_for_low_rank(params);
    Base::load(params.low_rank, pipeline, state, inputs, coord, tiles, count - params.main_tiles,
               thread, rank, storage);
  }

  template <class Accumulator>
  CUTLASS_DEVICE void mma(MainloopPipeline pipeline, PipelineState state, Accumulator& sums,
                          int count, int thread, TensorStorage& storage, const Params& params) {
    using TiledMma = typename Base::TiledMma;
    const int main = cute::min(count, params.main_tiles);
    Base::mma(pipeline, state, sums, main, thread, storage, params);
    if (count == main) return;

    // One batch is still running, and its stage not yet released: go on from there.
    TiledMma tiled_mma;
    PipelineState release = state;
    release.advance(main - 1);
    state.advance(main);
    add_low_rank(tiled_mma, pipeline, state, release, sums, count - main, thread, storage, params);
  }

 protected:
  // The producer, for the main tiles of all pairs.
  template <class Inputs, class Coord, class Iterator>
  CUTLASS_DEVICE void load_mains(const Params& params, MainloopPipeline& pipeline,
                                 PipelineState& state, const Inputs& inputs, const Coord& coord,
                                 Iterator tiles, int thread, uint32_t rank,
                                 TensorStorage& storage) {
    Base::load(params, pipeline, state, inputs, coord, tiles, params.first_tiles, thread, rank,
               storage);
    state.advance(params.first_tiles);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kMorePairs; ++i) {
      if (params.more_tiles[i] == 0) continue;
      Base::load(params.more[i], pipeline, state, inputs, coord, tiles, params.more_tiles[i],
                 thread, rank, storage);
      state.advance(params.more_tiles[i]);
    }
  }

  // The producer, before it reads what the kernel before made. From here on the grid after this one
  // may start, on SMs that this one leaves: it is either made to run beside, or waits.
  CUTLASS_DEVICE static void wait_for_low_rank(const Params& params) {
    if (params.wait_for_low_rank) asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;");
  }

  // Adds the low-rank tiles to sums of which one batch may be running; `release` is its stage.
  template <class TiledMma, class Accumulator>
  CUTLASS_DEVICE static void add_low_rank(TiledMma& tiled_mma, MainloopPipeline& pipeline,
                                          PipelineState state, PipelineState release,
                                          Accumulator& sums, int tiles, int thread,
                                          TensorStorage& storage, const Params& params) {
    using namespace cute;
    auto [a, b] = fragments(tiled_mma, thread, storage);
    tiled_mma.accumulate_ = GMMA::ScaleOut::One;
    int steps = params.low_rank_steps;
    CUTLASS_PRAGMA_NO_UNROLL
    for (; tiles > 0; --tiles, steps -= kTileK / 16) {
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

  // The operands of this warpgroup in shared memory: (MMA, M or N, K, stage).
  CUTLASS_DEVICE static auto fragments(const typename Base::TiledMma& tiled_mma, int thread,
                                       TensorStorage& storage) {
    using namespace cute;
    const int group = __shfl_sync(0xFFFFFFFF, thread / cutlass::NumThreadsPerWarpGroup, 0);
    auto slice = tiled_mma.get_slice(group * cutlass::NumThreadsPerWarpGroup);
    Tensor a = make_tensor(make_smem_ptr(storage.smem_A.data()), typename Base::SmemLayoutA{});
    Tensor b = make_tensor(make_smem_ptr(storage.smem_B.data()), typename Base::SmemLayoutB{});
    return cute::make_tuple(slice.make_fragment_A(slice.partition_A(a)),
                            slice.make_fragment_B(slice.partition_B(b)));
  }
};

template <class Base>
struct MaskedTwoPairs : TwoPairs<Base> {
  using Pairs = TwoPairs<Base>;
  using Scheduler = cutlass::gemm::kernel::detail::PersistentTileSchedulerSm90;
  using Pairs::kTileK;
  using typename Base::MainloopPipeline;
  using typename Base::PipelineState;
  using typename Base::TensorStorage;
  static constexpr int kTileM = cute::size<0>(typename Base::TileShape{});
  static constexpr int kTileN = cute::size<1>(typename Base::TileShape{});

  struct Arguments : Pairs::Arguments {
    Mask mask;
  };
  struct Params : Pairs::Params {
    Mask mask;
    MaskLevel level;
    typename Scheduler::Params scheduler;  // a copy of the kernel's
  };

  template <class Shape>
  static Params to_underlying_arguments(const Shape& shape, const Arguments& args,
                                        void* workspace) {
    Params params;
    static_cast<typename Pairs::Params&>(params) =
        Pairs::to_underlying_arguments(shape, args, workspace);
    params.mask = args.mask;
    params.level = MaskLevel(args.mask.threshold);
    return params;
  }

  template <class Inputs, class Coord, class Iterator>
  CUTLASS_DEVICE void load(const Params& params, MainloopPipeline pipeline, PipelineState state,
                           const Inputs& inputs, const Coord& coord, Iterator tiles, int count,
                           int thread, uint32_t rank, TensorStorage& storage) {
    const int low = count - params.main_tiles;
    this->wait_for_low_rank(params);
    Base::load(params.low_rank, pipeline, state, inputs, coord, tiles, low, thread, rank, storage);
    state.advance(low);
    this->load_mains(params, pipeline, state, inputs, coord, tiles, thread, rank, storage);
  }

  template <class Accumulator>
  CUTLASS_DEVICE void mma(MainloopPipeline pipeline, PipelineState state, Accumulator& sums,
                          int count, int thread, TensorStorage& storage, const Params& params) {
    using namespace cute;
    typename Base::TiledMma tiled_mma;
    auto [a, b] = Pairs::fragments(tiled_mma, thread, storage);
    const auto turn = state.count() / static_cast<std::uint32_t>(count);
    tiled_mma.accumulate_ = GMMA::ScaleOut::Zero;
    int steps = params.low_rank_steps;
    CUTLASS_PRAGMA_NO_UNROLL
    for (int tile = params.main_tiles; tile < count; ++tile, steps -= kTileK / 16) {
      pipeline.consumer_wait(state, pipeline.consumer_try_wait(state));
      warpgroup_fence_operand(sums);
      warpgroup_arrive();
      CUTLASS_PRAGMA_UNROLL
      for (int step = 0; step < kTileK / 16; ++step) {
        if (step < steps) {
          cute::gemm(tiled_mma, a(_, _, step, state.index()), b(_, _, step, state.index()), sums);
          tiled_mma.accumulate_ = GMMA::ScaleOut::One;
        }
      }
      warpgroup_commit_batch();
      warpgroup_wait<0>();
      warpgroup_fence_operand(sums);
      pipeline.consumer_release(state);
      ++state;
    }

    // This block's tile number `turn`, as the kernel's own scheduler counts.
    Scheduler scheduler(params.scheduler);
    scheduler.advance_to_next_work(turn);
    const auto work = scheduler.get_current_work();
    apply(sums, params, work.M_idx * kTileM, work.N_idx * (kTileN / kMaskColumns), thread);

    PipelineState release = state;
    CUTLASS_PRAGMA_NO_UNROLL
    for (int tile = 0; tile < params.main_tiles; ++tile) {
      pipeline.consumer_wait(state, pipeline.consumer_try_wait(state));
      warpgroup_fence_operand(sums);
      warpgroup_arrive();
      cute::gemm(tiled_mma, a(_, _, _, state.index()), b(_, _, _, state.index()), sums);
      warpgroup_commit_batch();
      if (tile > 0) {
        warpgroup_wait<1>();
        pipeline.consumer_release(release);
        ++release;
      }
      warpgroup_fence_operand(sums);
      ++state;
    }
  }

 private:
  // A thread's sums lie in two rows, and of every eight columns it has two.
  template <class Accumulator>
  CUTLASS_DEVICE static void apply(Accumulator& sums, const Params& params, int row, int group,
                                   int thread) {
    static_assert(decltype(cute::size(sums))::value == kTileN / 2, "a thread has two rows");
    static_assert(kTileN % (2 * kMaskColumns) == 0);
    const MaskSeed seed(params.mask.seed);
    row += thread / 32 * 16 + thread % 32 / 4;
    CUTLASS_PRAGMA_UNROLL
    for (int first = 0; first < kTileN / kMaskColumns; first += 2) {
      std::uint32_t words[4];
      MaskWord word = word_of_quad(row, group + first);
      while (!word.drawn()) word.step(seed, params.level);
      trade_words(word.keep, words);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < 16; ++i) {
        const std::uint32_t bits = words[i / 4] >> thread % 4 * 2 >> i % 4 * 8;
        const int half = i / 4 % 2, unit = (first + i / 8) * 4 + i % 4;
        float& even = sums(4 * unit + 2 * half);
        float& odd = sums(4 * unit + 2 * half + 1);
        even = bits & 1 ? even * params.mask.scale : 0.0F;
        odd = bits & 2 ? odd * params.mask.scale : 0.0F;
      }
    }
  }
};

}  // namespace pyfast::lora
