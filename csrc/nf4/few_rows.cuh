// SPDX-License-Identifier: Apache-2.0
// What the kernels of the few-row product share: the look-up table of pairs, copies, scales.
//
// Decoding. Two weights are a byte, and the table has a word of two 2-byte codes for each of the
// 256 bytes, once per lane: row `byte` of 256 bytes, of which a lane reads word `lane`. The address
// is one PRMT of the packed word and the lane, and a look-up meets no bank conflict. The scale of a
// block multiplies float32 sums, so that codes are rounded to 2 bytes and nothing else is.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "common/vec.cuh"
#include "nf4/nf4.h"
#include "nf4/tables.cuh"

namespace pyfast::nf4::few {

constexpr int kBlock = 64;
constexpr int kTableRow = 256;  // bytes
constexpr int kTableBytes = 256 * kTableRow;
constexpr int kMapBytes = 256 * 4;

__device__ __forceinline__ std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

template <class T>
__device__ __forceinline__ std::uint32_t pair_of(float low, float high) {
  alignas(4) T pair[2];
  narrow_pair(low, high, pair);
  return *reinterpret_cast<const std::uint32_t*>(pair);
}

// Units of 16 bytes in an order that has no bank conflicts where a thread fills a row.
__device__ __forceinline__ void fill_table_row(char* table, unsigned row, std::uint32_t pair) {
  const uint4 unit = make_uint4(pair, pair, pair, pair);
#pragma unroll
  for (unsigned i = 0; i < 8; ++i) {
    *reinterpret_cast<uint4*>(table + row * kTableRow + ((i + row) % 8) * 16) = unit;
  }
}

template <class T>
__device__ __forceinline__ void fill_table(char* table) {
  for (unsigned row = threadIdx.x; row < 256; row += blockDim.x) {
    fill_table_row(table, row, pair_of<T>(c_codes[row >> 4], c_codes[row & 15]));
  }
}

__device__ __forceinline__ void fill_map(float* map) {
  for (unsigned i = threadIdx.x; i < 256; i += blockDim.x) map[i] = d_dynamic_map[i];
}

// The same once per lane, in the half of each row that a table of 2-byte codes leaves free.
__device__ __forceinline__ void fill_map_beside(char* table) {
  for (unsigned row = threadIdx.x; row < 256; row += blockDim.x) {
    const float value = d_dynamic_map[row];
    const float4 unit = make_float4(value, value, value, value);
#pragma unroll
    for (unsigned i = 0; i < 8; ++i) {
      *reinterpret_cast<float4*>(table + row * kTableRow + 128 + ((i + row) % 8) * 16) = unit;
    }
  }
}

// The pair of byte kByte of `word`; `lane4` is four times the lane.
template <int kByte>
__device__ __forceinline__ std::uint32_t look_up(const char* table, std::uint32_t word,
                                                 std::uint32_t lane4) {
  const std::uint32_t at = __byte_perm(word, lane4, 0x7704 | kByte << 4);
  return *reinterpret_cast<const std::uint32_t*>(table + at);
}

template <class T>
__device__ __forceinline__ void multiply(float (&c)[4], const std::uint32_t (&a)[4],
                                         std::uint32_t b0, std::uint32_t b1) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Adds a block of 64 columns of 16 rows: `high` and `low` are the lane's bytes of rows g and g + 8,
// x its 16 columns of token g of each tile of eight.
template <class T, int kTokenTiles>
__device__ __forceinline__ void add_block(float (&total)[kTokenTiles][4], const char* table,
                                          std::uint32_t lane4, uint2 high, uint2 low,
                                          const uint4 (&x)[kTokenTiles][2], float upper,
                                          float lower) {
  float part[kTokenTiles][4] = {};
  const auto product = [&]<int kFirst>(std::uint32_t word, std::uint32_t word_below, int half) {
    const std::uint32_t a[4] = {
        look_up<kFirst>(table, word, lane4), look_up<kFirst>(table, word_below, lane4),
        look_up<kFirst + 1>(table, word, lane4), look_up<kFirst + 1>(table, word_below, lane4)};
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
      const uint4& b = x[j][half];
      multiply<T>(part[j], a, kFirst == 0 ? b.x : b.z, kFirst == 0 ? b.y : b.w);
    }
  };
  product.template operator()<0>(high.x, low.x, 0);
  product.template operator()<2>(high.x, low.x, 0);
  product.template operator()<0>(high.y, low.y, 1);
  product.template operator()<2>(high.y, low.y, 1);
#pragma unroll
  for (int j = 0; j < kTokenTiles; ++j) {
    total[j][0] += upper * part[j][0], total[j][1] += upper * part[j][1];
    total[j][2] += lower * part[j][2], total[j][3] += lower * part[j][3];
  }
}

// Of the four blocks of a chunk.
__device__ __forceinline__ float of_block(const float4& scales, int block) {
  return block == 0 ? scales.x : block == 1 ? scales.y : block == 2 ? scales.z : scales.w;
}

// Stores a tile's sums at [token][row] of shared memory, rows g and g + 8 from `to` on.
template <int kTokenTiles>
__device__ __forceinline__ void store_sums(const float (&total)[kTokenTiles][4], float* to,
                                           int pitch) {
#pragma unroll
  for (int i = 0; i < kTokenTiles * 4; ++i) {
    const int token = i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
    to[token * pitch + i % 4 / 2 * 8] = total[i / 4][i % 4];
  }
}

// Adds up the groups of k in order and stores the rows [row, row + rows) of y.
template <class T, int kWarps, int kTokens>
__device__ __forceinline__ void store_rows(const FewRowsParams& args, const float* sums, int pitch,
                                           int groups_k, int row, int rows) {
  for (int token = static_cast<int>(threadIdx.x / 32); token < args.m; token += kWarps) {
    T* to = static_cast<T*>(args.y) + token * args.pitch_y + row;
    for (int at = static_cast<int>(threadIdx.x % 32); at < rows; at += 32) {
      float sum = 0;
      for (int group = 0; group < groups_k; ++group) {
        sum += sums[(group * kTokens + token) * pitch + at];
      }
      if (args.bias != nullptr) sum += widen(static_cast<const T*>(args.bias)[row + at]);
      narrow(sum, to + at);
    }
  }
}

// Scales of four blocks of a row from `first` on, as stored, and the floats they stand for. In rows
// of a multiple of four blocks they are one aligned load.
template <bool kNested>
struct RawScales;

template <>
struct RawScales<false> {
  float4 values = {0, 0, 0, 0};
  __device__ __forceinline__ void load(const FewRowsParams& args, std::int64_t first) {
    values = __ldg(reinterpret_cast<const float4*>(static_cast<const float*>(args.absmax) + first));
  }
  __device__ __forceinline__ void load_some(const FewRowsParams& args, std::int64_t first,
                                            int count) {
    const float* from = static_cast<const float*>(args.absmax) + first;
    values.x = __ldg(from);
    values.y = count > 1 ? __ldg(from + 1) : 0.0F;
    values.z = count > 2 ? __ldg(from + 2) : 0.0F;
    values.w = count > 3 ? __ldg(from + 3) : 0.0F;
  }
  __device__ __forceinline__ float4 resolve(const float*, float) const { return values; }
  __device__ __forceinline__ float4 resolve(const char*, std::uint32_t, float) const {
    return values;
  }
};

template <>
struct RawScales<true> {
  std::uint32_t codes = 0;
  float group = 0, next_group = 0;
  int in_first = 4;
  __device__ __forceinline__ void load(const FewRowsParams& args, std::int64_t first) {
    codes = __ldg(reinterpret_cast<const std::uint32_t*>(
        static_cast<const std::uint8_t*>(args.absmax) + first));
    group = __ldg(args.nested_absmax + first / kNestedBlocksize);
  }
  __device__ __forceinline__ void load_some(const FewRowsParams& args, std::int64_t first,
                                            int count) {
    const auto* from = static_cast<const std::uint8_t*>(args.absmax) + first;
    codes = 0;
    for (int i = 0; i < count; ++i) codes |= static_cast<std::uint32_t>(__ldg(from + i)) << 8 * i;
    in_first = kNestedBlocksize - static_cast<int>(first % kNestedBlocksize);
    group = __ldg(args.nested_absmax + first / kNestedBlocksize);
    next_group = in_first < count ? __ldg(args.nested_absmax + first / kNestedBlocksize + 1) : 0.0F;
  }
  // Rounded twice, as bitsandbytes does: never a fused multiply-add.
  __device__ __forceinline__ float one(const float* map, float offset, int i) const {
    return __fadd_rn(__fmul_rn(map[codes >> 8 * i & 255], i < in_first ? group : next_group),
                     offset);
  }
  template <int kByte>
  __device__ __forceinline__ float one_beside(const char* table, std::uint32_t lane4,
                                              float offset) const {
    const float code = __uint_as_float(look_up<kByte>(table + 128, codes, lane4));
    return __fadd_rn(__fmul_rn(code, kByte < in_first ? group : next_group), offset);
  }
  __device__ __forceinline__ float4 resolve(const char* table, std::uint32_t lane4,
                                            float offset) const {
    return make_float4(one_beside<0>(table, lane4, offset), one_beside<1>(table, lane4, offset),
                       one_beside<2>(table, lane4, offset), one_beside<3>(table, lane4, offset));
  }
  __device__ __forceinline__ float4 resolve(const float* map, float offset) const {
    return make_float4(one(map, offset, 0), one(map, offset, 1), one(map, offset, 2),
                       one(map, offset, 3));
  }
};

// The scales of the chunk of four blocks at `block` of a row.
template <bool kNested>
__device__ __forceinline__ void load_chunk(RawScales<kNested>& raw, const FewRowsParams& args,
                                           int row, int block, int row_blocks) {
  const std::int64_t first = static_cast<std::int64_t>(row) * row_blocks + block;
  if (row_blocks % 4 == 0) {
    raw.load(args, first);
  } else {
    raw.load_some(args, first, min(row_blocks - block, 4));
  }
}

// 16 bytes to shared memory, of which `bytes` come from global memory and the rest are zero.
__device__ __forceinline__ void copy16(std::uint32_t to, const void* from, int bytes,
                                       std::uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(to),
               "l"(from), "r"(bytes), "l"(policy)
               : "memory");
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
__device__ __forceinline__ std::uint64_t evict_first() {
  std::uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ std::uint64_t evict_last() {
  std::uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

}  // namespace pyfast::nf4::few
