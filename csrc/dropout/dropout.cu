// SPDX-License-Identifier: Apache-2.0
// Bound by memory: a thread draws a word of the mask (about 60 integer instructions) for the 32
// columns that it serves. Its warp goes through 32 groups in units of 8 columns, neighbours side by
// side, in 16-byte accesses where pointers and the row length allow; each lane gets the word of its
// unit from the lane that drew it. The seed is read here and not on the host, so that a graph's
// replay takes the values it finds then.
#include <cuda_runtime.h>

#include <algorithm>

#include "common/check.h"
#include "common/philox.h"
#include "common/vec.cuh"
#include "dropout/kernels.h"

namespace pyfast::dropout {
namespace {

constexpr int kThreads = 256;
constexpr int kUnit = 8;                      // columns
constexpr int kUnits = kMaskColumns / kUnit;  // of a group

template <class T>
struct Args {
  const T* x;
  T* out;
  std::int64_t columns;
  std::int64_t groups;  // a row
  std::int64_t total;   // groups of all rows
  const std::int64_t* seed;
  MaskLevel level;
  float scale;
};

template <class T>
__device__ __forceinline__ T dropped(T value, bool keep, float scale) {
  const float product = __fmul_rn(widen(value), scale);  // outside of the choice: no branch
  narrow(keep ? product : 0.0F, &value);
  return value;
}

// What a thread reads of a unit of which so many columns are in the row.
template <class T, bool kVectors>
struct Unit {
  static constexpr int kCount = Pack16<T>::kCount;
  Pack16<T> packs[kUnit / kCount];

  __device__ __forceinline__ void load(const T* x, int columns) {
    if constexpr (kVectors) {
      if (columns <= 0) return;
#pragma unroll
      for (int p = 0; p < kUnit / kCount; ++p) {
        *reinterpret_cast<uint4*>(&packs[p]) = __ldcs(reinterpret_cast<const uint4*>(x) + p);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kUnit; ++i) {
        if (i < columns) packs[i / kCount].values[i % kCount] = x[i];
      }
    }
  }
  __device__ __forceinline__ void store(T* out, int columns, std::uint32_t keep, float scale) {
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      T& value = packs[i / kCount].values[i % kCount];
      value = dropped(value, (keep >> i & 1U) != 0, scale);
    }
    if constexpr (kVectors) {
      if (columns <= 0) return;
#pragma unroll
      for (int p = 0; p < kUnit / kCount; ++p) {
        reinterpret_cast<uint4*>(out)[p] = *reinterpret_cast<const uint4*>(&packs[p]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kUnit; ++i) {
        if (i < columns) out[i] = packs[i / kCount].values[i % kCount];
      }
    }
  }
};

// `Index` counts groups.
template <class T, bool kVectors, class Index>
__global__ void __launch_bounds__(kThreads) dropout_kernel(const Args<T> args) {
  const MaskSeed seed(args.seed);
  const auto groups = static_cast<Index>(args.groups);
  const int lane = threadIdx.x % 32;
  const auto step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x - lane;
       first < args.total; first += step) {
    const auto mine = static_cast<Index>(first + lane);
    const Index row = mine / groups;
    const auto group = static_cast<std::uint32_t>(mine - row * groups);
    Unit<T, kVectors> units[kUnits];
    std::int64_t begin[kUnits];
    int columns[kUnits];
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int source = (i * 32 + lane) / kUnits;
      const auto its_row = __shfl_sync(0xFFFFFFFF, static_cast<std::uint32_t>(row), source);
      const auto its_group = __shfl_sync(0xFFFFFFFF, group, source);
      const std::int64_t column =
          static_cast<std::int64_t>(its_group) * kMaskColumns + lane % kUnits * kUnit;
      begin[i] = its_row * args.columns + column;
      columns[i] = first + source < args.total
                       ? static_cast<int>(min(args.columns - column, std::int64_t{kUnit}))
                       : 0;
      units[i].load(args.x + begin[i], columns[i]);
    }
    const std::uint32_t word = keep_word(seed, static_cast<std::uint32_t>(row), group, args.level);
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const std::uint32_t its_word = __shfl_sync(0xFFFFFFFF, word, (i * 32 + lane) / kUnits);
      units[i].store(args.out + begin[i], columns[i], its_word >> lane % kUnits * kUnit,
                     args.scale);
    }
  }
}

bool aligned(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0; }

template <class T, bool kVectors>
void launch(const Args<T>& args, cudaStream_t stream) {
  constexpr std::int64_t kMostBlocks = 0x7FFFFFFF;
  const auto grid =
      static_cast<unsigned>(std::min((args.total + kThreads - 1) / kThreads, kMostBlocks));
  if (args.total <= 0xFFFFFFFF) {
    dropout_kernel<T, kVectors, std::uint32_t><<<grid, kThreads, 0, stream>>>(args);
  } else {
    dropout_kernel<T, kVectors, std::uint64_t><<<grid, kThreads, 0, stream>>>(args);
  }
  CUDA_CHECK("dropout", cudaGetLastError());
}

}  // namespace

void launch_dropout(const DropoutParams& params, const Placement& place) {
  const std::int64_t groups = (params.columns + kMaskColumns - 1) / kMaskColumns;
  if (params.rows * groups == 0) return;
  auto* stream = static_cast<cudaStream_t>(place.stream);
  visit_cuda_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Args<T> args{static_cast<const T*>(params.x),
                       static_cast<T*>(params.out),
                       params.columns,
                       groups,
                       params.rows * groups,
                       params.seed,
                       MaskLevel(params.threshold),
                       keep_scale(params.threshold)};
    if (params.columns % kUnit == 0 && aligned(params.x) && aligned(params.out)) {
      launch<T, true>(args, stream);
    } else {
      launch<T, false>(args, stream);
    }
  });
}

}  // namespace pyfast::dropout
