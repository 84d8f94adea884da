// SPDX-License-Identifier: Apache-2.0
// The sums of a row of tiles of z: its makers store their parts, and each adds up some of the rows.
#pragma once

#include <cuda_runtime.h>
#include <cutlass/arch/memory_sm80.h>
#include <cutlass/array.h>
#include <cutlass/cutlass.h>

#include <cute/arch/copy_sm80.hpp>
#include <cute/numeric/int.hpp>
#include <cute/tensor.hpp>

#include "lora/gemm.h"

namespace pyfast::lora {

template <class Element, int kTileM>
struct RowSums {
  float* partials = nullptr;  // [rows of tiles][kMakers][kTileM][width]
  Element* z = nullptr;
  std::int64_t pitch_z = 0;
  float scale = 1.0F;
  int width = 0;  // columns of a part: the rank rounded up to a multiple of 16
  int m = 0;
  int columns = 0;  // of z that are stored

  // The part that this thread has summed, as wgmma leaves it.
  template <class Sums>
  CUTLASS_DEVICE void store_part(const Sums& sums, int row, int maker, int thread) const {
    const int lane = thread % 32;
    const std::int64_t lines =
        (static_cast<std::int64_t>(row) * kMakers + maker) * kTileM + thread / 32 * 16;
    float* part = partials + (lines + lane / 4) * width + lane % 4 * 2;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < cute::size(Sums{}); i += 4) {
      // Of each four sums two lie in one row and two in the row eight further.
      if (i * 2 < width) {
        float* to = part + i * 2;
        *reinterpret_cast<float2*>(to) = make_float2(sums(i), sums(i + 1));
        *reinterpret_cast<float2*>(to + 8 * width) = make_float2(sums(i + 2), sums(i + 3));
      }
    }
  }

  // A warp adds up its share of the rows and stores them. In kBytes of shared memory it has parts
  // in flight without a register each.
  template <int kBytes>
  CUTLASS_DEVICE void add_up(int row, int share, int lane, float4* fetched) const {
    constexpr int kAtOnce = kBytes / (kMakers * 32 * 16), kStep = 32 * 4;
    static_assert(kAtOnce > 0);
    const int sums = kTileM * width;
    const float* parts = partials + static_cast<std::int64_t>(row) * kMakers * sums;
    const int begin = kTileM / kMakers * share * width, end = begin + kTileM / kMakers * width;
    CUTLASS_PRAGMA_NO_UNROLL
    for (int block = begin + lane * 4; block < end; block += kAtOnce * kStep) {
      CUTLASS_PRAGMA_NO_UNROLL
      for (int i = 0; i < kAtOnce && block + i * kStep < end; ++i) {
        CUTLASS_PRAGMA_UNROLL
        for (int maker = 0; maker < kMakers; ++maker) {
          cutlass::arch::cp_async<16, cutlass::arch::CacheOperation::Global>(
              &fetched[(i * kMakers + maker) * 32 + lane],
              parts + maker * sums + block + i * kStep);
        }
      }
      asm volatile("cp.async.wait_all;" ::: "memory");
      CUTLASS_PRAGMA_NO_UNROLL
      for (int i = 0; i < kAtOnce && block + i * kStep < end; ++i) {
        float4 sum = make_float4(0, 0, 0, 0);
        CUTLASS_PRAGMA_UNROLL
        for (int maker = 0; maker < kMakers; ++maker) {
          const float4 part = fetched[(i * kMakers + maker) * 32 + lane];
          sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
        }
        store(row, block + i * kStep, sum);
      }
    }
  }

 private:
  // Four neighbours; `at` counts in the tile.
  CUTLASS_DEVICE void store(int row, int at, const float4& sum) const {
    const int line = row * kTileM + at / width, column = at % width;
    if (line >= m || column >= columns) return;
    cutlass::AlignedArray<Element, 4> out;
    out[0] = static_cast<Element>(sum.x * scale);
    out[1] = static_cast<Element>(sum.y * scale);
    out[2] = static_cast<Element>(sum.z * scale);
    out[3] = static_cast<Element>(sum.w * scale);
    *reinterpret_cast<cutlass::AlignedArray<Element, 4>*>(z + line * pitch_z + column) = out;
  }
};

}  // namespace pyfast::lora
