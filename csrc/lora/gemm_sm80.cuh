// SPDX-License-Identifier: Apache-2.0
// y[M, N] = c [x | z] [W | B]^T + bias by cp.async and mma.sync, for GPUs without wgmma and TMA.
//
// A block has a tile of y, a warp 64 x 64 of it. The contraction walks over the K of each pair of x
// and W, then over the R of z and B, in steps of kTileK that go through a ring of stages; what lies
// beyond a pair's K is zero; z, and B by out feature, hold zeros up to a multiple of 8 ranks. Rows
// and columns beyond y are those at its edge again, and not stored.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "common/check.h"
#include "common/shared_memory.cuh"
#include "common/vec.cuh"
#include "lora/kernels.h"
#include "lora/skinny.cuh"

namespace pyfast::lora {
namespace sm80 {

constexpr int kWarpTile = 64;
constexpr int kPairs = 1 + kMorePairs + 1;

// A pair of operands as the kernel takes it; pitches in units of 16 bytes.
struct Operands {
  const char* x;
  const char* w;
  std::int64_t pitch_x, pitch_w;
  int k;
};

struct Params {
  Operands pairs[kPairs];
  int last_pair;
  int steps;   // of kTileK, of all pairs
  int last_k;  // of the last step
  int m, n;
  const void* bias;
  const float* columns;  // c
  char* y;
  std::int64_t pitch_y;
  int tiles_m, tiles_n, rows_at_once;  // so many rows of tiles go along N together
};

// What a kernel is compiled for.
template <int kNIn, int kStagesIn, int kBlocksIn, bool kByOutIn>
struct Shape {
  static constexpr int kM = 128, kN = kNIn, kTileK = 32, kStages = kStagesIn;
  static constexpr int kBlocksPerSm = kBlocksIn;
  static constexpr bool kByOut = kByOutIn;
  static constexpr int kWarpsN = kN / kWarpTile;
  static constexpr int kThreads = kM / kWarpTile * kWarpsN * 32;
  static constexpr int kUnitsK = kTileK / 8;  // of 16 bytes
  using TileX = skinny::Tile<kM, kUnitsK>;
  using TileW = std::conditional_t<kByOut, skinny::Tile<kN, kUnitsK>, skinny::Tile<kTileK, kN / 8>>;
  static constexpr int kStage = TileX::kBytes + TileW::kBytes;
  static constexpr int kShared = kStages * kStage;
};

// A thread's share of the copies: of each step the same unit of several rows.
template <class S>
class Copies {
 public:
  __device__ __forceinline__ Copies(const Params& params, int row, int col)
      : params_(params), row_(row), col_(col) {
    begin();
  }

  // Enqueues the copies of a step; zeros after the last one.
  __device__ __forceinline__ void enqueue(std::uint32_t stage) {
    using namespace skinny;
    const int thread = threadIdx.x, unit = thread % S::kUnitsK, line = thread / S::kUnitsK;
    const int bytes = unit * 8 < left_ ? 16 : 0;
#pragma unroll
    for (int i = 0; i < kX; ++i) {
      copy16(stage + S::TileX::offset(line + i * kRows, unit), x_ + std::uint64_t{x_at_[i]} * 16,
             bytes);
    }
    stage += S::TileX::kBytes;
#pragma unroll
    for (int i = 0; i < kW; ++i) {
      const char* from = w_ + std::uint64_t{w_at_[i]} * 16;
      if constexpr (S::kByOut) {
        copy16(stage + S::TileW::offset(line + i * kRows, unit), from, bytes);
      } else {
        const int k = thread / kUnitsN + i * kRowsK;
        copy16(stage + S::TileW::offset(k, thread % kUnitsN), from, k < left_ ? 16 : 0);
      }
    }
  }
  __device__ __forceinline__ void advance() {
    left_ -= S::kTileK;
    if (left_ <= 0 && pair_ < params_.last_pair) [[unlikely]] {
      ++pair_;
      begin();
    } else {
      x_ += S::kTileK * 2;
      w_ += S::kByOut ? S::kTileK * 2 : params_.pairs[pair_].pitch_w * (16 * S::kTileK);
    }
  }

 private:
  static constexpr int kRows = S::kThreads / S::kUnitsK;  // at once, of a tile by K
  static constexpr int kUnitsN = S::kN / 8;               // of a tile of W by N
  static constexpr int kRowsK = S::kThreads / kUnitsN;
  static constexpr int kX = S::kM / kRows, kW = S::kByOut ? S::kN / kRows : S::kTileK / kRowsK;

  __device__ __forceinline__ void begin() {
    const Operands& pair = params_.pairs[pair_];
    const int thread = threadIdx.x, unit = thread % S::kUnitsK, line = thread / S::kUnitsK;
    left_ = pair.k;
    x_ = pair.x + (row_ * pair.pitch_x + unit) * 16;
    rows<kX>(line, kRows, params_.m - 1 - row_, pair.pitch_x, x_at_);
    if constexpr (S::kByOut) {
      w_ = pair.w + (col_ * pair.pitch_w + unit) * 16;
      rows<kW>(line, kRows, params_.n - 1 - col_, pair.pitch_w, w_at_);
    } else {
      w_ = pair.w + min(col_ + thread % kUnitsN * 8, params_.n - 8) * 2;
      rows<kW>(thread / kUnitsN, kRowsK, S::kTileK, pair.pitch_w, w_at_);
    }
  }

  // Where rows lie that are `step` apart, in units of 16 bytes.
  template <int kCount>
  static __device__ __forceinline__ void rows(int first, int step, int most, std::int64_t pitch,
                                              std::uint32_t (&at)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      at[i] = static_cast<std::uint32_t>(min(first + i * step, most) * pitch);
    }
  }

  const Params& params_;
  int row_, col_;
  int pair_ = 0;
  int left_ = 0;  // of the pair's K
  const char* x_ = nullptr;
  const char* w_ = nullptr;
  std::uint32_t x_at_[kX], w_at_[kW];
};

// A warp's operands for 16 of K.
template <class S>
struct Fragments {
  std::uint32_t x[kWarpTile / 16][4], w[kWarpTile / 16][4];

  // `x_lane` and `w_lane`: where this lane's row begins at the first step.
  __device__ __forceinline__ void load(std::uint32_t x_lane, std::uint32_t w_lane,
                                       std::uint32_t stage, int step) {
    // Tile permutes the units of a row by exclusive or, which commutes with the step's.
    const std::uint32_t from_x = stage + (x_lane ^ step * 32);
#pragma unroll
    for (int i = 0; i < kWarpTile / 16; ++i) {
      skinny::load_matrices<false>(x[i], from_x + i * (16 * S::kUnitsK * 16));
    }
    stage += S::TileX::kBytes;
#pragma unroll
    for (int i = 0; i < kWarpTile / 16; ++i) {
      if constexpr (S::kByOut) {
        skinny::load_matrices<false>(w[i],
                                     stage + (w_lane ^ step * 32) + i * (16 * S::kUnitsK * 16));
      } else {
        skinny::load_matrices<true>(w[i], stage + (w_lane ^ i * 32) + step * (16 * S::kN * 2));
      }
    }
  }
};

template <class T, class S>
__device__ __forceinline__ void multiply_all(float (&sums)[kWarpTile / 16][kWarpTile / 8][4],
                                             const Fragments<S>& operands) {
#pragma unroll
  for (int i = 0; i < kWarpTile / 16; ++i) {
#pragma unroll
    for (int j = 0; j < kWarpTile / 8; ++j) {
      // There and back, so that one operand of the next product is that of this one.
      const int at = i % 2 ? kWarpTile / 8 - 1 - j : j;
      const std::uint32_t (&w)[4] = operands.w[at / 2];
      skinny::multiply<T>(sums[i][at], operands.x[i], w[at % 2 * 2], w[at % 2 * 2 + 1]);
    }
  }
}

// Of four words a lane and four lanes, the transpose.
__device__ __forceinline__ void transpose_in_quad(std::uint32_t (&words)[4]) {
  const int quad = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = quad & bit;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int low = bit == 1 ? 2 * i : i, high = low + bit;
      const std::uint32_t got = __shfl_xor_sync(0xFFFFFFFF, upper ? words[low] : words[high], bit);
      (upper ? words[low] : words[high]) = got;
    }
  }
}

// Rounds and stores a warp's sums, of each row 8 neighbours a lane.
template <class T>
__device__ __forceinline__ void store(const float (&sums)[kWarpTile / 16][kWarpTile / 8][4],
                                      const Params& params, int row, int col) {
  const int lane = threadIdx.x % 32;
  const T* bias = static_cast<const T*>(params.bias);
  float shift[kWarpTile / 8][2], factor[kWarpTile / 8][2];
#pragma unroll
  for (int j = 0; j < kWarpTile / 8; ++j) {
    const int at = min(col + j * 8, params.n - 8) + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      shift[j][i] = bias != nullptr ? widen(bias[at + i]) : 0.0F;
      factor[j][i] = params.columns != nullptr ? params.columns[at + i] : 1.0F;
    }
  }
  row += lane / 4, col += lane % 4 * 8;
#pragma unroll
  for (int i = 0; i < kWarpTile / 8; ++i, row += 8) {
    char* line = params.y + row * params.pitch_y * 16;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      std::uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int tile = half * 4 + j;
        const float (&four)[4] = sums[i / 2][tile];
        narrow_pair(fmaf(four[i % 2 * 2], factor[tile][0], shift[tile][0]),
                    fmaf(four[i % 2 * 2 + 1], factor[tile][1], shift[tile][1]),
                    reinterpret_cast<T*>(&words[j]));
      }
      transpose_in_quad(words);
      const int at = col + half * 32;
      if (row < params.m && at < params.n) {
        *reinterpret_cast<uint4*>(line + at * 2) =
            make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
  }
}

template <class T, class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocksPerSm)
    gemm_sm80_kernel(const __grid_constant__ Params params) {
  using namespace skinny;
  extern __shared__ __align__(128) char storage[];
  const std::uint32_t ring = shared_address(storage);

  const int block = blockIdx.x, band = params.rows_at_once * params.tiles_n;
  const int first = block / band * params.rows_at_once;
  const int rows = min(params.rows_at_once, params.tiles_m - first);
  const int row = (first + block % band % rows) * S::kM, col = block % band / rows * S::kN;

  Copies<S> copies(params, row, col);
  std::uint32_t filled = ring;
  const auto next = [&](std::uint32_t stage) {
    return stage == ring + (S::kStages - 1) * S::kStage ? ring : stage + S::kStage;
  };
  for (int i = 0; i < S::kStages - 1; ++i, filled = next(filled)) {
    copies.enqueue(filled);
    commit();
    copies.advance();
  }

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp / S::kWarpsN * kWarpTile, warp_col = warp % S::kWarpsN * kWarpTile;
  const std::uint32_t x_lane = S::TileX::offset(warp_row + lane % 16, lane / 16);
  const std::uint32_t w_lane =
      S::kByOut ? S::TileW::offset(warp_col + lane % 8 + lane / 16 * 8, lane / 8 % 2)
                : S::TileW::offset(lane % 16, warp_col / 8 + lane / 16);

  constexpr int kSteps = S::kTileK / 16;
  Fragments<S> operands[2];
  float sums[kWarpTile / 16][kWarpTile / 8][4] = {};
  std::uint32_t stage = ring;
  wait<S::kStages - 2>();
  __syncthreads();
  operands[0].load(x_lane, w_lane, stage, 0);
  for (int left = params.steps; left > 1; --left) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (step == kSteps - 1) {
        stage = next(stage);
        wait<S::kStages - 2>();
        __syncthreads();
      }
      operands[(step + 1) % 2].load(x_lane, w_lane, stage, (step + 1) % kSteps);
      if (step == 0) {
        copies.enqueue(filled);
        commit();
      }
      multiply_all<T>(sums, operands[step % 2]);
    }
    copies.advance();
    filled = next(filled);
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    if (step * 16 >= params.last_k) break;
    if (step + 1 < kSteps) operands[(step + 1) % 2].load(x_lane, w_lane, stage, step + 1);
    multiply_all<T>(sums, operands[step % 2]);
  }
  store<T>(sums, params, row + warp_row, col + warp_col);
}

template <class T, class S>
void launch(const GemmArgs& args, int rows_at_once, cudaStream_t stream) {
  Params params{};
  int count = 0;
  const auto add = [&](const void* x, std::int64_t pitch_x, const void* w, std::int64_t pitch_w,
                       int k) {
    if (k == 0) return;
    params.pairs[count++] = {static_cast<const char*>(x), static_cast<const char*>(w), pitch_x / 8,
                             pitch_w / 8, k};
    const int steps = (k + S::kTileK - 1) / S::kTileK;
    params.steps += steps;
    params.last_k = k - (steps - 1) * S::kTileK;
  };
  add(args.x, args.pitch_x, args.w, args.pitch_w, args.k);
  for (const Pair& pair : args.more) add(pair.x, pair.pitch_x, pair.w, pair.pitch_w, pair.k);
  add(args.z, args.pitch_z, args.b, args.pitch_b, args.r);
  params.last_pair = count - 1;
  params.m = args.m, params.n = args.n;
  params.bias = args.bias;
  params.columns = args.columns;
  params.y = static_cast<char*>(args.y);
  params.pitch_y = args.pitch_y / 8;
  params.tiles_m = (args.m + S::kM - 1) / S::kM;
  params.tiles_n = (args.n + S::kN - 1) / S::kN;
  params.rows_at_once = std::min(rows_at_once, params.tiles_m);
  constexpr auto* kKernel = &gemm_sm80_kernel<T, S>;
  allow_shared_memory<kKernel>("lora_linear", S::kShared);
  const auto blocks = static_cast<unsigned>(params.tiles_m) * static_cast<unsigned>(params.tiles_n);
  kKernel<<<blocks, S::kThreads, S::kShared, stream>>>(params);
  CUDA_CHECK("lora_linear", cudaGetLastError());
}

}  // namespace sm80

// In the order of kGemmNames. Either has 96 KiB of an SM, of which the smallest have 99.
template <class T, bool kByOut>
void launch_gemm_sm80(const GemmArgs& args, const GemmPlan& plan, cudaStream_t stream) {
  PYFAST_CHECK(args.mask.seed == nullptr, "lora_linear: the GEMM for sm_80 has no dropout");
  switch (plan.kernel) {
    case kGemmSm80Wide:
      return sm80::launch<T, sm80::Shape<256, 4, 1, kByOut>>(args, plan.swizzle, stream);
    case kGemmSm80Narrow:
      return sm80::launch<T, sm80::Shape<128, 3, 2, kByOut>>(args, plan.swizzle, stream);
    default:
      PYFAST_CHECK(false, "lora_linear: there is no GEMM kernel ", plan.kernel, " for sm_80");
  }
}

}  // namespace pyfast::lora
