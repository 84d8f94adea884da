// SPDX-License-Identifier: Apache-2.0
// NF4 to float in one launch, nested scales included. Bound by memory: 0.516 bytes in and 2 out per
// weight. A lane turns one small load into one 16-byte store, so that a warp stores 512 bytes in a
// row, and issues all loads of its tile before it uses the first.
#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "common/check.h"
#include "common/vec.cuh"
#include "nf4/kernels.h"
#include "nf4/tables.cuh"

namespace pyfast::nf4 {
namespace {

constexpr int kThreads = 256;
// Two, four and eight 4-byte loads a lane measure the same; persistent blocks are 5 to 8 % slower.
constexpr int kBytesPerLane = 16;

struct Args {
  const std::uint8_t* packed;  // from first_block on
  const void* absmax;          // from first_block on: float, or uint8 when nested
  const float* nested_absmax;
  const float* offset;
  void* out;
  std::int64_t first_block;  // for the index into nested_absmax
  std::int64_t numel;
  int log2_blocksize;
};

// What has to be loaded for the scale of a block, and the scale made of it.
template <bool kNested>
struct RawScale;

template <>
struct RawScale<false> {
  float value;
  __device__ __forceinline__ float resolve(const float*, float) const { return value; }
};

template <>
struct RawScale<true> {
  std::uint32_t code;
  float group;
  // Rounded twice, as bitsandbytes does: never a fused multiply-add.
  __device__ __forceinline__ float resolve(const float* map, float offset) const {
    return __fadd_rn(__fmul_rn(map[code], group), offset);
  }
};

// The scales from block `first` on; indices from there fit 32 bits.
template <bool kNested>
struct Scales;

template <>
struct Scales<false> {
  const float* absmax;
  __device__ __forceinline__ Scales(const Args& args, std::int64_t first)
      : absmax(static_cast<const float*>(args.absmax) + first) {}
  __device__ __forceinline__ RawScale<false> load(std::uint32_t block) const {
    return {__ldg(absmax + block)};
  }
};

template <>
struct Scales<true> {
  const std::uint8_t* codes;
  const float* groups;
  std::uint32_t in_group;
  __device__ __forceinline__ Scales(const Args& args, std::int64_t first)
      : codes(static_cast<const std::uint8_t*>(args.absmax) + first),
        groups(args.nested_absmax + (args.first_block + first) / kNestedBlocksize),
        in_group(static_cast<std::uint32_t>(args.first_block + first) % kNestedBlocksize) {}
  __device__ __forceinline__ RawScale<true> load(std::uint32_t block) const {
    return {__ldg(codes + block), __ldg(groups + (in_group + block) / kNestedBlocksize)};
  }
};

// The bytes behind one 16-byte store.
template <class T>
using Word = std::conditional_t<sizeof(T) == 4, std::uint16_t, std::uint32_t>;

template <class T, bool kNested>
__device__ __forceinline__ void one_element(const Args& args, std::int64_t element) {
  const RawScale<kNested> raw = Scales<kNested>(args, element >> args.log2_blocksize).load(0);
  const float scale = raw.resolve(d_dynamic_map, kNested ? __ldg(args.offset) : 0.0F);
  const std::uint32_t byte = args.packed[element / 2];
  const std::uint32_t code = element % 2 == 0 ? byte >> 4 : byte & 15U;
  narrow(__fmul_rn(c_codes[code], scale), static_cast<T*>(args.out) + element);
}

// A block of threads decodes tiles of kThreads * kUnroll chunks of kWeights elements, the bytes of
// one store. A tile is a multiple of every blocksize.
template <class T, bool kNested, int kUnroll>
__global__ void __launch_bounds__(kThreads, kUnroll <= 4 ? 8 : 4)
    dequantize_kernel(const Args args) {
  constexpr int kWeights = Pack16<T>::kCount;
  constexpr int kTile = kThreads * kUnroll;
  static_assert(kTile * kWeights % 4096 == 0);
  // A column per lane: a warp's 32 look-ups fall into 32 banks whatever the codes are.
  __shared__ float table[16][32];
  __shared__ float map[kNested ? 256 : 1];

  const std::int64_t chunks = args.numel / kWeights;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kTile;
  const std::uint32_t thread = threadIdx.x;

  Word<T> words[kUnroll];
  RawScale<kNested> scales[kUnroll];
  // Chunks of this tile; a full tile, the usual case, takes a path without checks.
  const auto left =
      static_cast<std::uint32_t>(max(min(chunks - first, std::int64_t{kTile}), std::int64_t{0}));
  const auto load_tile = [&](auto full) {
    const Word<T>* packed = reinterpret_cast<const Word<T>*>(args.packed) + first + thread;
    const Scales<kNested> source(args, (first * kWeights) >> args.log2_blocksize);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const std::uint32_t at = thread + u * kThreads;
      if (full || at < left) {
        words[u] = __ldcs(packed + u * kThreads);
        scales[u] = source.load((at * kWeights) >> args.log2_blocksize);
      }
    }
  };
  // In flight while the tables are filled.
  if (left == kTile) {
    load_tile(std::true_type{});
  } else {
    load_tile(std::false_type{});
  }
  const float offset = kNested ? __ldg(args.offset) : 0.0F;
#pragma unroll
  for (int i = 0; i < 16; i += kThreads / 32) {
    table[i + thread / 32][thread % 32] = c_codes[i + thread / 32];
  }
  if constexpr (kNested) map[thread] = d_dynamic_map[thread];
  __syncthreads();

  // Byte offsets, because then a look-up takes one shift and one three-input logic operation. The
  // code's lowest bit stands at bit `bit` of the word and goes to bit 7, as a row has 128 bytes.
  std::uint32_t column;  // not thread % 32: the assembler would mask that anew in each look-up
  asm("mov.u32 %0, %%laneid;" : "=r"(column));
  column *= 4;
  const auto look_up = [&](std::uint32_t word, int bit) {
    const std::uint32_t row = bit < 7 ? word << (7 - bit) : word >> (bit - 7);
    const std::uint32_t offset_in_table = (row & 0x780U) | column;
    return *reinterpret_cast<const float*>(reinterpret_cast<const char*>(table) + offset_in_table);
  };
  const auto store_tile = [&](auto full) {
    uint4* out = reinterpret_cast<uint4*>(args.out) + first + thread;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (full || thread + u * kThreads < left) {
        const float scale = scales[u].resolve(map, offset);
        const std::uint32_t word = words[u];
        Pack16<T> pack;
#pragma unroll
        for (int i = 0; i < kWeights; i += 2) {
          const float even = __fmul_rn(look_up(word, 4 * i + 4), scale);
          const float odd = __fmul_rn(look_up(word, 4 * i), scale);
          narrow_pair(even, odd, pack.values + i);
        }
        out[u * kThreads] = *reinterpret_cast<const uint4*>(&pack);
      }
    }
  };
  if (left == kTile) {
    store_tile(std::true_type{});
  } else {
    store_tile(std::false_type{});
  }

  const std::int64_t rest = chunks * kWeights + thread;
  if (blockIdx.x == 0 && rest < args.numel) one_element<T, kNested>(args, rest);
}

// For pointers that vector accesses cannot use.
template <class T, bool kNested>
__global__ void __launch_bounds__(kThreads) dequantize_unaligned_kernel(const Args args) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
       i < args.numel; i += step) {
    one_element<T, kNested>(args, i);
  }
}

bool aligned(const void* pointer, std::size_t bytes) {
  return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0;
}

template <class T, bool kNested>
void launch(const Args& args, const Placement& place) {
  auto* stream = static_cast<cudaStream_t>(place.stream);
  constexpr int kWeights = Pack16<T>::kCount;
  constexpr int kUnroll = kBytesPerLane / static_cast<int>(sizeof(Word<T>));
  const bool vectors = aligned(args.packed, kWeights / 2) && aligned(args.out, 16);
  const std::int64_t per_block = vectors ? std::int64_t{kThreads} * kUnroll * kWeights : kThreads;
  const auto grid = static_cast<unsigned>(
      std::min((args.numel + per_block - 1) / per_block, std::int64_t{1} << 30));
  if (vectors) {
    dequantize_kernel<T, kNested, kUnroll><<<grid, kThreads, 0, stream>>>(args);
  } else {
    dequantize_unaligned_kernel<T, kNested><<<grid, kThreads, 0, stream>>>(args);
  }
  CUDA_CHECK("nf4_dequantize", cudaGetLastError());
}

}  // namespace

void launch_dequantize(const DequantizeParams& params, const Placement& place) {
  if (params.numel == 0) return;
  const bool nested = params.nested_absmax != nullptr;
  Args args{};
  args.packed = params.packed + params.first_block * params.blocksize / 2;
  args.absmax = static_cast<const std::uint8_t*>(params.absmax) +
                params.first_block * static_cast<std::int64_t>(nested ? 1 : sizeof(float));
  args.nested_absmax = params.nested_absmax;
  args.offset = params.offset;
  args.out = params.out;
  args.first_block = params.first_block;
  args.numel = params.numel;
  while (1 << args.log2_blocksize < params.blocksize) ++args.log2_blocksize;
  visit_cuda_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (nested) {
      launch<T, true>(args, place);
    } else {
      launch<T, false>(args, place);
    }
  });
}

}  // namespace pyfast::nf4
