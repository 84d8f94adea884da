// SPDX-License-Identifier: Apache-2.0
// Products of a warpgroup by wgmma, of tiles that cp.async has filled. Of D[64, kColumns] a thread
// has, of 16 rows that its warp has, what it would have of mma.sync's: for each 8 columns 4 sums.
#pragma once

#include <cuda_runtime.h>
#include <cutlass/arch/barrier.h>
#include <cutlass/cutlass.h>

#include <cute/arch/mma_sm90.hpp>
#include <cute/arch/mma_sm90_desc.hpp>
#include <type_traits>
#include <utility>

#include "adapter/rows.cuh"

namespace pyfast::adapter {

constexpr int kWarpgroup = 128;  // threads

// A tile in blocks of 64 columns, one after another, each of rows of 128 bytes whose units are
// permuted as wgmma's swizzle of 128 bytes has them, if the tile lies on 1024 bytes.
template <int kTileRows, int kUnits>
struct BlockTile {
  static_assert(kTileRows % 8 == 0 && kUnits % 8 == 0);
  static constexpr int kRowBytes = 128, kBlock = kTileRows * kRowBytes;
  static constexpr int kBytes = kUnits / 8 * kBlock;
  static __device__ __forceinline__ std::uint32_t offset(int row, int unit) {
    return static_cast<std::uint32_t>(unit / 8 * kBlock) +
           Tile<kTileRows, 8>::offset(row, unit % 8);
  }
};

// Of an operand in such a tile, from a row that is a multiple of 8 on.
template <class TileOf>
__device__ __forceinline__ std::uint64_t descriptor(std::uint32_t at) {
  cute::GmmaDescriptor made;
  made.bitfield.start_address_ = at >> 4;
  // Between blocks, where an operand's rows are the product's columns; else it is not looked at.
  made.bitfield.leading_byte_offset_ = TileOf::kBlock >> 4;
  made.bitfield.stride_byte_offset_ = 8 * 128 >> 4;  // between groups of 8 rows
  made.bitfield.layout_type_ = static_cast<std::uint8_t>(cute::SM90::GMMA::LayoutType::B128);
  return made;
}

template <int kCount>
__device__ __forceinline__ void fence_sums(float (&sums)[kCount]) {
#pragma unroll
  for (float& sum : sums) cute::warpgroup_fence_operand(sum);
}
__device__ __forceinline__ void fence_words(std::uint32_t (&words)[4]) {
#pragma unroll
  for (std::uint32_t& word : words) cute::warpgroup_fence_operand(word);
}

template <class T>
using ElementOf =
    std::conditional_t<std::is_same_v<T, __nv_bfloat16>, cutlass::bfloat16_t, cutlass::half_t>;
template <int kColumns>
using Shape = cute::Shape<cute::Int<64>, cute::Int<kColumns>, cute::Int<16>>;
constexpr auto kK = cute::SM90::GMMA::Major::K, kMn = cute::SM90::GMMA::Major::MN;

// sums += A B over one step of 16, A by rows in shared memory. With kByColumn a row of B's tile is
// a column of the product, else one of the 16.
template <class T, bool kByColumn, int kCount>
__device__ __forceinline__ void multiply_step(float (&sums)[kCount], std::uint64_t a,
                                              std::uint64_t b) {
  using E = ElementOf<T>;
  using Product = decltype(cute::SM90::GMMA::ss_op_selector<E, E, float, Shape<kCount * 2>, kK,
                                                            kByColumn ? kK : kMn>());
  [&]<std::size_t... i>(std::index_sequence<i...>) {
    Product::fma(a, b, sums[i]...);
  }(std::make_index_sequence<kCount>{});
}

// The same with A in registers, and a row of B's tile for each of the 16.
template <class T, int kCount>
__device__ __forceinline__ void multiply_step(float (&sums)[kCount], const std::uint32_t (&a)[4],
                                              std::uint64_t b) {
  using E = ElementOf<T>;
  using Product =
      decltype(cute::SM90::GMMA::rs_op_selector<E, E, float, Shape<kCount * 2>, kK, kMn>());
  [&]<std::size_t... i>(std::index_sequence<i...>) {
    Product::fma(a[0], a[1], a[2], a[3], b, sums[i]...);
  }(std::make_index_sequence<kCount>{});
}

// Step `step` of an operand whose 16 are columns of its tile, or rows of it.
template <class TileOf>
__device__ __forceinline__ std::uint64_t of_columns(std::uint32_t tile, int step) {
  return descriptor<TileOf>(tile + step / 4 * TileOf::kBlock + step % 4 * 32);
}
template <class TileOf>
__device__ __forceinline__ std::uint64_t of_rows(std::uint32_t tile, int step) {
  return descriptor<TileOf>(tile + step * 16 * 128);
}

// Makes what cp.async of this thread has written visible to wgmma; a barrier is to follow.
__device__ __forceinline__ void show_copies() { cutlass::arch::fence_view_async_shared(); }

}  // namespace pyfast::adapter
