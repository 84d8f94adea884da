// SPDX-License-Identifier: Apache-2.0
// Needs AVX2 and F16C. Includes nothing whose code could be shared with other files.
#include <immintrin.h>

#include "nf4/blocks.h"
#include "nf4/kernels.h"

namespace pyfast::nf4 {
namespace {

// The thresholds as a search tree: level l has 2^l of them, found by the l bits known so far.
struct Tree {
  __m256 level[4];
  Tree() {
    float sorted[4][8];
    for (int l = 0; l < 4; ++l) {
      for (int i = 0; i < 8; ++i) {
        const int node = i & ((1 << l) - 1);
        sorted[l][i] = kThresholds[((2 * node + 1) << (3 - l)) - 1];
      }
      level[l] = _mm256_loadu_ps(sorted[l]);
    }
  }
};

PYFAST_INLINE __m256i encode8(const Tree& tree, __m256 x) {
  __m256i code =
      _mm256_srli_epi32(_mm256_castps_si256(_mm256_cmp_ps(x, tree.level[0], _CMP_GT_OQ)), 31);
  for (int l = 1; l < 4; ++l) {
    const __m256 threshold = _mm256_permutevar8x32_ps(tree.level[l], code);
    const __m256i above = _mm256_castps_si256(_mm256_cmp_ps(x, threshold, _CMP_GT_OQ));
    code = _mm256_sub_epi32(_mm256_add_epi32(code, code), above);  // `above` is 0 or -1
  }
  return code;
}

// The low bytes of 8 lanes of 32 bits, in order.
PYFAST_INLINE void store_bytes8(std::uint8_t* out, __m256i lanes) {
  const __m128i words =
      _mm_packus_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_packus_epi16(words, words));
}

// Codes in order to bytes in the low ends of the 64-bit lanes.
PYFAST_INLINE __m256i pair_up(__m256i codes) {
  return _mm256_or_si256(_mm256_slli_epi32(codes, 4), _mm256_srli_epi64(codes, 32));
}

PYFAST_INLINE __m256i magnitudes(const BFloat16* src) {
  return _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(src)),
                          _mm256_set1_epi16(0x7FFF));
}

PYFAST_INLINE __m256i magnitudes(const Float16* src) {
  return magnitudes(reinterpret_cast<const BFloat16*>(src));
}

// The largest of 16 unsigned words: minpos of the complement.
PYFAST_INLINE std::uint32_t max_word(__m256i words) {
  const __m128i half =
      _mm_max_epu16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  const __m128i flipped = _mm_xor_si128(half, _mm_set1_epi16(-1));
  return ~static_cast<std::uint32_t>(_mm_cvtsi128_si32(_mm_minpos_epu16(flipped))) & 0xFFFFU;
}

PYFAST_INLINE float as_float(std::uint32_t word, const BFloat16*) {
  return to_float(BFloat16{static_cast<std::uint16_t>(word)});
}

PYFAST_INLINE float as_float(std::uint32_t word, const Float16*) {
  return to_float(Float16{static_cast<std::uint16_t>(word)});
}

template <class T>
PYFAST_INLINE float absmax_of(const T* src, int blocksize) {
  __m256i most = magnitudes(src);
  for (int i = 16; i < blocksize; i += 16) most = _mm256_max_epu16(most, magnitudes(src + i));
  return as_float(max_word(most), src);
}

PYFAST_INLINE float absmax_of(const float* src, int blocksize) {
  __m256i most = _mm256_setzero_si256();
  for (int i = 0; i < blocksize; i += 8) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + i));
    most = _mm256_max_epi32(most, _mm256_and_si256(bits, _mm256_set1_epi32(0x7FFFFFFF)));
  }
  __m128i half = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
  half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4E));
  half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0xB1));
  return float_from_bits(static_cast<std::uint32_t>(_mm_cvtsi128_si32(half)));
}

// 16 elements to 8 bytes. Two bf16 share a 32-bit lane, so even and odd ones come apart for free.
PYFAST_INLINE void encode16(const Tree& tree, const BFloat16* src, __m256 factor,
                            std::uint8_t* out) {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src));
  const __m256 even = _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
  const __m256 odd = _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(-65536)));
  const __m256i high = encode8(tree, _mm256_mul_ps(even, factor));
  const __m256i low = encode8(tree, _mm256_mul_ps(odd, factor));
  store_bytes8(out, _mm256_or_si256(_mm256_slli_epi32(high, 4), low));
}

PYFAST_INLINE __m256 load8(const float* src) { return _mm256_loadu_ps(src); }

PYFAST_INLINE __m256 load8(const Float16* src) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src)));
}

template <class T>
PYFAST_INLINE void encode16(const Tree& tree, const T* src, __m256 factor, std::uint8_t* out) {
  const __m256i a = pair_up(encode8(tree, _mm256_mul_ps(load8(src), factor)));
  const __m256i b = pair_up(encode8(tree, _mm256_mul_ps(load8(src + 8), factor)));
  // Lanes of 64 bits: a0 a1 a2 a3, b0 b1 b2 b3; their low halves in order.
  const __m256 mixed =
      _mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), 0x88);  // a0a1b0b1 a2a3b2b3
  const __m256i ordered = _mm256_permute4x64_epi64(_mm256_castps_si256(mixed), 0xD8);
  store_bytes8(out, _mm256_and_si256(ordered, _mm256_set1_epi32(0xFF)));
}

}  // namespace

void quantize_avx2(const QuantizeParams& params, std::int64_t begin, std::int64_t end) {
  const Tree tree;
  const int blocksize = params.blocksize;
  visit_dtype(params.dtype, [&](auto zero) {
    quantize_blocks<decltype(zero)>(
        params, begin, end, [](const auto* src, int count) { return absmax_of(src, count); },
        [&](const auto* src, float factor, std::uint8_t* packed) {
          const __m256 factors = _mm256_set1_ps(factor);
          for (int i = 0; i < blocksize; i += 16) encode16(tree, src + i, factors, packed + i / 2);
        });
  });
}

}  // namespace pyfast::nf4
