// SPDX-License-Identifier: Apache-2.0
// Bound by memory: a thread draws one Philox block (about 100 integer instructions) for the 8
// columns that it serves, in 16-byte accesses where pointers and the row length allow. The seed is
// read here and not on the host, so that a graph's replay takes the values it finds then.
#include <cuda_runtime.h>

#include <algorithm>

#include "common/check.h"
#include "common/philox.h"
#include "common/vec.cuh"
#include "dropout/kernels.h"

namespace pyfast::dropout {
namespace {

constexpr int kThreads = 256;

template <class T>
struct Args {
  const T* x;
  T* out;
  std::int64_t columns;
  std::int64_t groups;  // a row
  std::int64_t total;   // groups of all rows
  const std::int64_t* seed;
  std::uint32_t threshold;
  float scale;
};

template <class T>
__device__ __forceinline__ T dropped(T value, bool keep, float scale) {
  const float product = __fmul_rn(widen(value), scale);  // outside of the choice: no branch
  narrow(keep ? product : 0.0F, &value);
  return value;
}

// One group of 8 columns, or `count` of them. `draw()` gives its keep bits; loads are issued before
// it.
template <bool kVectors, class T, class Draw>
__device__ __forceinline__ void drop_group(const T* x, T* out, int count, float scale,
                                           const Draw& draw) {
  if constexpr (kVectors) {
    constexpr int kCount = Pack16<T>::kCount;
    constexpr int kPacks = kMaskColumns / kCount;
    uint4 raw[kPacks];
#pragma unroll
    for (int p = 0; p < kPacks; ++p) raw[p] = __ldcs(reinterpret_cast<const uint4*>(x) + p);
    const std::uint32_t keep = draw();
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const auto* elements = reinterpret_cast<const T*>(&raw[p]);
      Pack16<T> pack;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        pack.values[i] = dropped(elements[i], (keep >> (p * kCount + i) & 1U) != 0, scale);
      }
      reinterpret_cast<uint4*>(out)[p] = *reinterpret_cast<const uint4*>(&pack);
    }
  } else {
    const std::uint32_t keep = draw();
    for (int i = 0; i < count; ++i) out[i] = dropped(x[i], (keep >> i & 1U) != 0, scale);
  }
}

// `Index` counts groups.
template <class T, bool kVectors, class Index>
__global__ void __launch_bounds__(kThreads) dropout_kernel(const Args<T> args) {
  const MaskSeed seed(args.seed);
  const auto groups = static_cast<Index>(args.groups);
  const auto step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
       at < args.total; at += step) {
    const Index row = static_cast<Index>(at) / groups;
    const Index group = static_cast<Index>(at) - row * groups;
    const std::int64_t column = static_cast<std::int64_t>(group) * kMaskColumns;
    const std::int64_t first = static_cast<std::int64_t>(row) * args.columns + column;
    const auto count = static_cast<int>(min(args.columns - column, std::int64_t{kMaskColumns}));
    drop_group<kVectors>(args.x + first, args.out + first, count, args.scale, [&] {
      return keep_bits(seed, static_cast<std::uint32_t>(row), static_cast<std::uint32_t>(group),
                       args.threshold);
    });
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
                       params.threshold,
                       keep_scale(params.threshold)};
    if (params.columns % kMaskColumns == 0 && aligned(params.x) && aligned(params.out)) {
      launch<T, true>(args, stream);
    } else {
      launch<T, false>(args, stream);
    }
  });
}

}  // namespace pyfast::dropout
