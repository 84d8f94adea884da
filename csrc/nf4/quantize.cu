// SPDX-License-Identifier: Apache-2.0
// Float to NF4, and scales to 8 bits, one launch each. Bytes and scales equal those of bitsandbytes
// on CUDA, which is built with fast-math: the reciprocal is rcp.approx.ftz, and subnormals count as
// zero. An all-zero block gets the code of zero, 7, where bitsandbytes' 0 * inf gives -1.
//
// A NaN is passed over by the maximum and gets code 0. An infinity makes the block's absmax
// infinite; the other elements get code 7 then, the infinities 0.
#include <cuda_runtime.h>

#include <algorithm>

#include "common/check.h"
#include "common/vec.cuh"
#include "nf4/codebook.h"
#include "nf4/kernels.h"

namespace pyfast::nf4 {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kLaneElements = 8;                   // one 4-byte store of codes
constexpr int kWarpElements = 32 * kLaneElements;  // 256
constexpr unsigned kAllLanes = 0xFFFFFFFFU;

__device__ const float d_dynamic_map[256] = {
#include "nf4/dynamic_map.inc"
};

__device__ const Buckets d_buckets = kBuckets;

__device__ __forceinline__ float max_ftz(float a, float b) {
  float most;
  asm("max.ftz.f32 %0, %1, %2;" : "=f"(most) : "f"(a), "f"(b));
  return most;
}

__device__ __forceinline__ float mul_ftz(float a, float b) {
  float product;
  asm("mul.rn.ftz.f32 %0, %1, %2;" : "=f"(product) : "f"(a), "f"(b));
  return product;
}

__device__ __forceinline__ float reciprocal(float x) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  return inverse;
}

// The largest value of `lanes` neighbouring lanes, a power of two.
__device__ __forceinline__ float max_over(float value, int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    value = max_ftz(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

// Threshold and base of a bucket, in 16 columns: half a warp's 8-byte look-ups fall into all 32
// banks.
struct Tables {
  float2 bucket[32][16];
  __device__ __forceinline__ void fill() {
    for (int i = threadIdx.x; i < 32 * 16; i += kThreads) {
      bucket[i / 16][i % 16] =
          make_float2(d_buckets.threshold[i / 16], __int_as_float(d_buckets.base[i / 16]));
    }
  }
};

// As Buckets says, through [0, 1], where saturation sends NaN to the lowest bucket, hence code 0.
__device__ __forceinline__ std::uint32_t encode(const float2* column, float x) {
  const float unit = __saturatef(fmaf(x, 0.5F, 0.5F));
  const std::uint32_t index = __float_as_uint(fmaf(unit, 30.0F, 0x1p23F + 1.0F)) & 31U;
  const float2 bucket = column[index * 16];
  return __float_as_uint(bucket.y) + (x > bucket.x ? 1U : 0U);
}

template <class T>
struct Lane {
  float values[kLaneElements];

  // Whole lanes in 16-byte loads where pointers allow; past the end are zeros.
  __device__ __forceinline__ void load(const T* src, std::int64_t at, std::int64_t numel,
                                       bool vectors) {
    constexpr int kPacks = kLaneElements / Pack16<T>::kCount;
    if (vectors && at + kLaneElements <= numel) {
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        const uint4 raw = __ldcs(reinterpret_cast<const uint4*>(src + at) + p);
        const auto* elements = reinterpret_cast<const T*>(&raw);
#pragma unroll
        for (int i = 0; i < Pack16<T>::kCount; ++i) {
          values[p * Pack16<T>::kCount + i] = widen(elements[i]);
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < kLaneElements; ++i) {
        values[i] = at + i < numel ? widen(src[at + i]) : 0.0F;
      }
    }
  }

  __device__ __forceinline__ float absmax() const {
    float most = 0.0F;
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) most = max_ftz(most, fabsf(values[i]));
    return most;
  }

  __device__ __forceinline__ void store(const float2* column, float factor, std::uint8_t* packed,
                                        std::int64_t at, std::int64_t numel, bool vectors) const {
    std::uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) {
      word |= encode(column, mul_ftz(values[i], factor)) << (i % 2 == 0 ? 4 * i + 4 : 4 * i - 4);
    }
    if (vectors && at + kLaneElements <= numel) {
      *reinterpret_cast<std::uint32_t*>(packed + at / 2) = word;
    } else {
      for (int i = 0; i < kLaneElements && at + i < numel; i += 2) {
        packed[(at + i) / 2] = static_cast<std::uint8_t>(word >> (4 * i));
      }
    }
  }
};

// The factor that scales a block; an all-zero block stays zero.
__device__ __forceinline__ float factor_of(float absmax) {
  return absmax > 0.0F ? reciprocal(absmax) : 0.0F;
}

// Blocks of up to 256: a warp takes kTiles runs of 256 elements, each of one or more whole blocks.
template <class T, int kTiles>
__global__ void __launch_bounds__(kThreads)
    quantize_kernel(const QuantizeParams params, const bool vectors) {
  __shared__ Tables tables;
  const auto* src = static_cast<const T*>(params.src);
  const int lane = threadIdx.x % 32;
  const int lanes = params.blocksize / kLaneElements;
  const std::int64_t warp = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const std::int64_t first = warp * (kTiles * kWarpElements) + lane * kLaneElements;

  Lane<T> tiles[kTiles];
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    tiles[t].load(src, first + t * kWarpElements, params.numel, vectors);
  }
  tables.fill();
  __syncthreads();

  const float2* column = &tables.bucket[0][lane % 16];
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    const std::int64_t at = first + t * kWarpElements;
    const float absmax = max_over(tiles[t].absmax(), lanes);
    if (at < params.numel && lane % lanes == 0) params.absmax[at / params.blocksize] = absmax;
    tiles[t].store(column, factor_of(absmax), params.packed, at, params.numel, vectors);
  }
}

// Blocks of 512 and more: a warp takes one, and reads it twice; the second time it comes from a
// cache.
template <class T>
__global__ void __launch_bounds__(kThreads)
    quantize_large_kernel(const QuantizeParams params, const bool vectors) {
  __shared__ Tables tables;
  const auto* src = static_cast<const T*>(params.src);
  const int lane = threadIdx.x % 32;
  const std::int64_t block = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const std::int64_t begin = block * params.blocksize + lane * kLaneElements;
  const std::int64_t end = min(params.numel, (block + 1) * params.blocksize);
  tables.fill();
  __syncthreads();
  if (block * params.blocksize >= params.numel) return;

  float most = 0.0F;
  for (std::int64_t at = begin; at < end; at += kWarpElements) {
    Lane<T> tile;
    tile.load(src, at, params.numel, vectors);
    most = max_ftz(most, tile.absmax());
  }
  const float absmax = max_over(most, 32);
  if (lane == 0) params.absmax[block] = absmax;
  const float factor = factor_of(absmax);
  const float2* column = &tables.bucket[0][lane % 16];
  for (std::int64_t at = begin; at < end; at += kWarpElements) {
    Lane<T> tile;
    tile.load(src, at, params.numel, vectors);
    tile.store(column, factor, params.packed, at, params.numel, vectors);
  }
}

// A warp takes a group of 256 scales. The code is the nearest one, a tie going to the even index:
// the number of bounds below x, where bound j is the midpoint of codes j and j + 1, and for odd j
// the float just below it.
__global__ void __launch_bounds__(kThreads) nest_kernel(const NestParams params) {
  __shared__ float bounds[256];
  const int i = threadIdx.x;
  if (i < 255) {
    const float midpoint = __fmul_rn(__fadd_rn(d_dynamic_map[i], d_dynamic_map[i + 1]), 0.5F);
    bounds[i] = i % 2 == 0 ? midpoint : nextafterf(midpoint, -2.0F);
  }
  __syncthreads();

  const std::int64_t group = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const std::int64_t first = group * kNestedBlocksize + threadIdx.x % 32;
  if (group * kNestedBlocksize >= params.num_blocks) return;
  const float offset = __ldg(params.offset);
  float centred[8];
  float most = 0.0F;
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    const std::int64_t at = first + 32 * k;
    centred[k] = at < params.num_blocks ? __fsub_rn(params.absmax[at], offset) : 0.0F;
    most = max_ftz(most, fabsf(centred[k]));
  }
  const float absmax = max_over(most, 32);
  if (threadIdx.x % 32 == 0) params.nested_absmax[group] = absmax;
  const float factor =
      reciprocal(absmax);  // 1 / 0 makes NaN below, whose code is 0 as in bitsandbytes
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    const std::int64_t at = first + 32 * k;
    const float x = mul_ftz(centred[k], factor);
    int code = 0;
#pragma unroll
    for (int step = 128; step > 0; step /= 2) {
      if (x > bounds[code + step - 1]) code += step;
    }
    if (at < params.num_blocks) params.codes[at] = static_cast<std::uint8_t>(code);
  }
}

bool aligned(const void* pointer, std::size_t bytes) {
  return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0;
}

unsigned grid_for(const char* op, std::int64_t work, std::int64_t per_block) {
  const std::int64_t blocks = (work + per_block - 1) / per_block;
  PYFAST_CHECK(blocks <= 0x7FFFFFFF, op, ": the tensor is too large for one launch");
  return static_cast<unsigned>(blocks);
}

}  // namespace

void launch_quantize(const QuantizeParams& params, const Placement& place) {
  if (params.numel == 0) return;
  constexpr int kTiles = 2;
  auto* stream = static_cast<cudaStream_t>(place.stream);
  const bool vectors = aligned(params.src, 16) && aligned(params.packed, 4);
  visit_cuda_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (params.blocksize <= kWarpElements) {
      const unsigned grid = grid_for("nf4_quantize", params.numel, kWarps * kTiles * kWarpElements);
      quantize_kernel<T, kTiles><<<grid, kThreads, 0, stream>>>(params, vectors);
    } else {
      const unsigned grid =
          grid_for("nf4_quantize", params.numel, std::int64_t{kWarps} * params.blocksize);
      quantize_large_kernel<T><<<grid, kThreads, 0, stream>>>(params, vectors);
    }
  });
  CUDA_CHECK("nf4_quantize", cudaGetLastError());
}

void launch_nest(const NestParams& params, const Placement& place) {
  if (params.num_blocks == 0) return;
  const unsigned grid = grid_for("nf4_nest", params.num_blocks, kWarps * kNestedBlocksize);
  nest_kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(place.stream)>>>(params);
  CUDA_CHECK("nf4_nest", cudaGetLastError());
}

}  // namespace pyfast::nf4
