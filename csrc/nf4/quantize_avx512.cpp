// SPDX-License-Identifier: Apache-2.0
// Needs AVX-512 F, BW, DQ, VL. Includes nothing whose code could be shared with other files.
#include <immintrin.h>

#include "nf4/blocks.h"
#include "nf4/kernels.h"

namespace pyfast::nf4 {
namespace {

struct Tables {
  __m512 threshold[2];
  __m512i base[2];
  Tables() {
    for (int i = 0; i < 2; ++i) {
      threshold[i] = _mm512_loadu_ps(kBuckets.threshold + 16 * i);
      base[i] = _mm512_loadu_si512(kBuckets.base + 16 * i);
    }
  }
};

// Codes of 16 values: the bucket from the low bits of 15 x + 16 + 2^23, then one comparison.
PYFAST_INLINE __m512i encode16(const Tables& tables, __m512 x) {
  const __m512 bucket = _mm512_fmadd_ps(x, _mm512_set1_ps(15.0F), _mm512_set1_ps(0x1p23F + 16.0F));
  const __m512i index = _mm512_castps_si512(bucket);
  const __m512 threshold = _mm512_permutex2var_ps(tables.threshold[0], index, tables.threshold[1]);
  const __m512i base = _mm512_permutex2var_epi32(tables.base[0], index, tables.base[1]);
  const __mmask16 above = _mm512_cmp_ps_mask(x, threshold, _CMP_GT_OQ);
  return _mm512_mask_add_epi32(base, above, base, _mm512_set1_epi32(1));
}

// Bytes of 32 values, even and odd ones apart.
PYFAST_INLINE __m128i pack_split(__m512i even, __m512i odd) {
  return _mm512_cvtepi32_epi8(_mm512_or_si512(_mm512_slli_epi32(even, 4), odd));
}

// Bytes of 16 values in order: a 64-bit lane holds the even code below the odd one.
PYFAST_INLINE __m128i pack_ordered(__m512i codes) {
  return _mm512_cvtepi64_epi8(
      _mm512_or_si512(_mm512_slli_epi32(codes, 4), _mm512_srli_epi64(codes, 32)));
}

// The largest of 32 unsigned words: minpos of the complement.
PYFAST_INLINE std::uint32_t max_word(__m512i words) {
  const __m256i half =
      _mm256_max_epu16(_mm512_castsi512_si256(words), _mm512_extracti64x4_epi64(words, 1));
  const __m128i quarter =
      _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  const __m128i flipped = _mm_xor_si128(quarter, _mm_set1_epi16(-1));
  return ~static_cast<std::uint32_t>(_mm_cvtsi128_si32(_mm_minpos_epu16(flipped))) & 0xFFFFU;
}

PYFAST_INLINE float absmax_of(const BFloat16* src, int blocksize) {
  __m512i most = _mm512_setzero_si512();
  for (int i = 0; i < blocksize; i += 32) {
    most = _mm512_max_epu16(
        most, _mm512_and_si512(_mm512_loadu_si512(src + i), _mm512_set1_epi16(0x7FFF)));
  }
  return float_from_bits(max_word(most) << 16);
}

PYFAST_INLINE float absmax_of(const Float16* src, int blocksize) {
  __m512i most = _mm512_setzero_si512();
  for (int i = 0; i < blocksize; i += 32) {
    most = _mm512_max_epu16(
        most, _mm512_and_si512(_mm512_loadu_si512(src + i), _mm512_set1_epi16(0x7FFF)));
  }
  return to_float(Float16{static_cast<std::uint16_t>(max_word(most))});
}

PYFAST_INLINE float absmax_of(const float* src, int blocksize) {
  __m512i most = _mm512_setzero_si512();
  for (int i = 0; i < blocksize; i += 16) {
    most = _mm512_max_epi32(
        most, _mm512_and_si512(_mm512_loadu_si512(src + i), _mm512_set1_epi32(0x7FFFFFFF)));
  }
  return float_from_bits(static_cast<std::uint32_t>(_mm512_reduce_max_epi32(most)));
}

// 32 scaled values to 16 bytes.
PYFAST_INLINE __m128i encode32(const Tables& tables, const BFloat16* src, __m512 factor) {
  const __m512i words = _mm512_loadu_si512(src);
  const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
  const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(-65536)));
  return pack_split(encode16(tables, _mm512_mul_ps(even, factor)),
                    encode16(tables, _mm512_mul_ps(odd, factor)));
}

PYFAST_INLINE __m512 load16(const float* src) { return _mm512_loadu_ps(src); }

PYFAST_INLINE __m512 load16(const Float16* src) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(src)));
}

template <class T>
PYFAST_INLINE __m128i encode32(const Tables& tables, const T* src, __m512 factor) {
  const __m512i low = encode16(tables, _mm512_mul_ps(load16(src), factor));
  const __m512i high = encode16(tables, _mm512_mul_ps(load16(src + 16), factor));
  return _mm_unpacklo_epi64(pack_ordered(low), pack_ordered(high));
}

}  // namespace

void quantize_avx512(const QuantizeParams& params, std::int64_t begin, std::int64_t end) {
  const Tables tables;
  const int blocksize = params.blocksize;
  visit_dtype(params.dtype, [&](auto zero) {
    quantize_blocks<decltype(zero)>(
        params, begin, end, [](const auto* src, int count) { return absmax_of(src, count); },
        [&](const auto* src, float factor, std::uint8_t* packed) {
          const __m512 factors = _mm512_set1_ps(factor);
          for (int i = 0; i < blocksize; i += 32) {
            _mm_storeu_si128(reinterpret_cast<__m128i*>(packed + i / 2),
                             encode32(tables, src + i, factors));
          }
        });
  });
}

}  // namespace pyfast::nf4
