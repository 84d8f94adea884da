// SPDX-License-Identifier: Apache-2.0
// Products of the columns of a tile with 16 ranks: D[64, 16] += T^T V with T[rows, 64] and
// V[rows, 16], both stored by rows in shared memory as TMA leaves them. A thread of the warpgroup
// has eight sums: of column 16 (thread / 32) + lane / 4 + 8 (i % 4 / 2) and rank
// 8 (i / 4) + lane % 4 * 2 + i % 2.
#pragma once

#include <cuda_runtime.h>
#include <cutlass/cutlass.h>

#include <cstdint>
#include <cute/arch/mma_sm90_desc.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <type_traits>

namespace pyfast::lora {

constexpr int kNarrowRanks = 16, kNarrowColumns = 64, kNarrowSums = 8, kNarrowThreads = 128;

// Of rows of 128 or 32 bytes, swizzled as wide; eight of them follow one another.
template <int kRowBytes>
CUTLASS_DEVICE std::uint64_t narrow_descriptor(const void* rows) {
  static_assert(kRowBytes == 128 || kRowBytes == 32);
  cute::GmmaDescriptor descriptor;
  descriptor.bitfield.start_address_ = cute::cast_smem_ptr_to_uint(rows) >> 4;
  descriptor.bitfield.leading_byte_offset_ = 1;  // there is one swizzle's width of columns
  descriptor.bitfield.stride_byte_offset_ = 8 * kRowBytes >> 4;
  descriptor.bitfield.layout_type_ = static_cast<std::uint8_t>(
      kRowBytes == 128 ? cute::GMMA::LayoutType::B128 : cute::GMMA::LayoutType::B32);
  return descriptor;
}

CUTLASS_DEVICE void narrow_fence(float (&sums)[kNarrowSums]) {
  CUTLASS_PRAGMA_UNROLL
  for (float& sum : sums) cute::warpgroup_fence_operand(sum);
}

// Starts the product over kRows rows; what the sums held before is lost. V's rows have kRowBytesV.
template <class Element, int kRows, int kRowBytesV>
CUTLASS_DEVICE void narrow_multiply(const void* t, const void* v, float (&d)[kNarrowSums]) {
  constexpr auto kMn = cute::GMMA::Major::MN;
  using Product = std::conditional_t<std::is_same_v<Element, cutlass::bfloat16_t>,
                                     cute::SM90::GMMA::MMA_64x16x16_F32BF16BF16_SS<kMn, kMn>,
                                     cute::SM90::GMMA::MMA_64x16x16_F32F16F16_SS<kMn, kMn>>;
  constexpr int kStep = 16;  // rows of one instruction
  const std::uint64_t from_t = narrow_descriptor<128>(t);
  const std::uint64_t from_v = narrow_descriptor<kRowBytesV>(v);
  CUTLASS_PRAGMA_UNROLL
  for (int step = 0; step < kRows / kStep; ++step) {
    Product::fma(from_t + step * (kStep * 128 >> 4), from_v + step * (kStep * kRowBytesV >> 4),
                 d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7],
                 step == 0 ? cute::GMMA::ScaleOut::Zero : cute::GMMA::ScaleOut::One);
  }
}

// Starts D[64, 16] += X Q^T over one step of 16 columns, with X in registers as wgmma takes it and
// Q a tile of rows of 128 bytes by rank, or of 32 bytes by column.
template <class Element, bool kByRank>
CUTLASS_DEVICE void narrow_multiply_rows(const std::uint32_t (&x)[4], const void* q, int step,
                                         float (&d)[kNarrowSums]) {
  constexpr auto kK = cute::GMMA::Major::K;
  constexpr auto kMajor = kByRank ? kK : cute::GMMA::Major::MN;
  using Product = std::conditional_t<std::is_same_v<Element, cutlass::bfloat16_t>,
                                     cute::SM90::GMMA::MMA_64x16x16_F32BF16BF16_RS<kK, kMajor>,
                                     cute::SM90::GMMA::MMA_64x16x16_F32F16F16_RS<kK, kMajor>>;
  const std::uint64_t from = narrow_descriptor<kByRank ? 128 : 32>(q);
  Product::fma(x[0], x[1], x[2], x[3], from + step * ((kByRank ? 32 : 16 * 32) >> 4), d[0], d[1],
               d[2], d[3], d[4], d[5], d[6], d[7]);
}

// Stores the sums of a warpgroup for 64 columns, or adds them to what this block has stored there:
// float4 [2][kNarrowThreads]. Nobody else adds to them, so the order is that of the program.
CUTLASS_DEVICE void narrow_store(float* tile, const float (&d)[kNarrowSums], int thread,
                                 bool first) {
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < kNarrowSums; i += 4) {
    float* to = tile + i * kNarrowThreads + thread * 4;
    if (first) {
      *reinterpret_cast<float4*>(to) = make_float4(d[i], d[i + 1], d[i + 2], d[i + 3]);
    } else {
      asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(d[i]),
                   "f"(d[i + 1]), "f"(d[i + 2]), "f"(d[i + 3])
                   : "memory");
    }
  }
}

}  // namespace pyfast::lora
