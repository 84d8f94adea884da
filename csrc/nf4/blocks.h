// SPDX-License-Identifier: Apache-2.0
// The walk over blocks that the CPU kernels share. Always inlined, as dtype.h explains.
#pragma once

#include "nf4/block_scalar.h"
#include "nf4/nf4.h"

namespace pyfast::nf4 {

// Calls block(src, count, packed, absmax) for the blocks [begin, end).
template <class T, class Block>
PYFAST_INLINE void for_each_block(const QuantizeParams& params, std::int64_t begin,
                                  std::int64_t end, const Block& block) {
  for (std::int64_t index = begin; index < end; ++index) {
    const std::int64_t at = index * params.blocksize;
    const std::int64_t left = params.numel - at;
    block(static_cast<const T*>(params.src) + at,
          static_cast<int>(left < params.blocksize ? left : params.blocksize),
          params.packed + at / 2, params.absmax + index);
  }
}

// Calls block(packed, scale, out, count) for the blocks [begin, end) of the requested part.
template <class T, class Block>
PYFAST_INLINE void for_each_block(const DequantizeParams& params, std::int64_t begin,
                                  std::int64_t end, const Block& block) {
  for (std::int64_t index = begin; index < end; ++index) {
    const std::int64_t source = params.first_block + index;
    const std::int64_t at = index * params.blocksize;
    const std::int64_t left = params.numel - at;
    block(params.packed + source * params.blocksize / 2, block_scale(params, source),
          static_cast<T*>(params.out) + at, left < params.blocksize ? left : params.blocksize);
  }
}

// Blocks of vectors: absmax_of(src, blocksize), and encode(src, factor, packed) for a full block of
// finite numbers. Short blocks, and those with a NaN or an infinity, are done in plain C++.
template <class T, class AbsmaxOf, class Encode>
PYFAST_INLINE void quantize_blocks(const QuantizeParams& params, std::int64_t begin,
                                   std::int64_t end, const AbsmaxOf& absmax_of,
                                   const Encode& encode) {
  const int blocksize = params.blocksize;
  for_each_block<T>(params, begin, end,
                    [&](const T* src, int count, std::uint8_t* packed, float* absmax) {
                      const float most = count < blocksize ? 0.0F : absmax_of(src, blocksize);
                      if (count < blocksize || !(most <= 3.4028234664e38F)) {
                        quantize_block_scalar(src, count, blocksize, packed, absmax);
                        return;
                      }
                      *absmax = most;
                      encode(src, 1.0F / (most < kLeastAbsmax ? kLeastAbsmax : most), packed);
                    });
}

// Blocks of vectors: table_of(scale, out) once a block, decode32(packed, table, out) for every 32
// elements. What is left of a short block is done in plain C++.
template <class T, class TableOf, class Decode32>
PYFAST_INLINE void dequantize_blocks(const DequantizeParams& params, std::int64_t begin,
                                     std::int64_t end, const TableOf& table_of,
                                     const Decode32& decode32) {
  for_each_block<T>(
      params, begin, end, [&](const std::uint8_t* packed, float scale, T* out, std::int64_t count) {
        const auto table = table_of(scale, out);
        if (count == 64) {  // the usual block, without a loop: a third faster in cache
          decode32(packed, table, out);
          decode32(packed + 16, table, out + 32);
          return;
        }
        const std::int64_t whole = count / 32 * 32;
        for (std::int64_t i = 0; i < whole; i += 32) decode32(packed + i / 2, table, out + i);
        dequantize_block_scalar(packed + whole / 2, scale, out + whole, count - whole);
      });
}

}  // namespace pyfast::nf4
