// SPDX-License-Identifier: Apache-2.0
// Needs AVX-512 F, BW, DQ, VL. Per block, the 16 codes times the scale are rounded once into a
// table; an element is then a table look-up, and exact because one rounding is all that the format
// has.
#include <immintrin.h>

#include "nf4/blocks.h"
#include "nf4/kernels.h"

namespace pyfast::nf4 {
namespace {

struct Patterns {
  alignas(64) std::uint16_t upper_words[32];  // the odd words, twice over
  alignas(64) std::uint16_t spread[32];  // 128-bit lane l: bytes 4l to 4l + 3, each as two words
};

constexpr Patterns make_patterns() {
  Patterns patterns{};
  for (int i = 0; i < 32; ++i) {
    patterns.upper_words[i] = static_cast<std::uint16_t>(2 * (i % 16) + 1);
    patterns.spread[i] = static_cast<std::uint16_t>(0x8000 | i / 2);  // 0x80 makes a zero byte
  }
  return patterns;
}

constexpr Patterns kPatterns = make_patterns();

PYFAST_INLINE __m512 scaled_codes(float scale) {
  return _mm512_mul_ps(_mm512_loadu_ps(kCodes), _mm512_set1_ps(scale));
}

// The table twice over: an index's fifth bit is the neighbour nibble's, and does not matter.
PYFAST_INLINE __m512i table_of(float scale, const BFloat16*) {
  const __m512 exact = scaled_codes(scale);
  const __m512i bits = _mm512_castps_si512(exact);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(exact, exact, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC00000));
  return _mm512_permutexvar_epi16(_mm512_load_si512(kPatterns.upper_words), kept);
}

PYFAST_INLINE __m512i table_of(float scale, const Float16*) {
  return _mm512_broadcast_i64x4(
      _mm512_cvtps_ph(scaled_codes(scale), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

PYFAST_INLINE __m512i table_of(float scale, const float*) {
  return _mm512_castps_si512(scaled_codes(scale));
}

// 32 elements of 16 bits from 16 bytes: every word gets its byte, shifted by 4 in the even ones.
template <class T>
PYFAST_INLINE void decode32(const std::uint8_t* packed, __m512i table, T* out) {
  const __m512i bytes =
      _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
  const __m512i words = _mm512_shuffle_epi8(bytes, _mm512_load_si512(kPatterns.spread));
  const __m512i index = _mm512_srlv_epi16(words, _mm512_set1_epi32(4));
  _mm512_storeu_si512(out, _mm512_permutexvar_epi16(index, table));
}

// 32 elements of 32 bits from 16 bytes.
PYFAST_INLINE void decode32(const std::uint8_t* packed, __m512i table, float* out) {
  for (int half = 0; half < 2; ++half) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed + 8 * half));
    const __m512i doubles = _mm512_cvtepu8_epi64(bytes);
    const __m512i pairs =
        _mm512_or_si512(_mm512_srli_epi64(doubles, 4), _mm512_slli_epi64(doubles, 32));
    _mm512_storeu_ps(out + 16 * half, _mm512_permutexvar_ps(pairs, _mm512_castsi512_ps(table)));
  }
}

}  // namespace

void dequantize_avx512(const DequantizeParams& params, std::int64_t begin, std::int64_t end) {
  visit_dtype(params.dtype, [&](auto zero) {
    dequantize_blocks<decltype(zero)>(
        params, begin, end, [](float scale, auto* out) { return table_of(scale, out); },
        [](const std::uint8_t* packed, const auto& table, auto* out) {
          decode32(packed, table, out);
        });
  });
}

}  // namespace pyfast::nf4
