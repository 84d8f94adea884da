// SPDX-License-Identifier: Apache-2.0
// Needs AVX2 and F16C. As dequantize_avx512.cpp: a table of rounded products per block; here the
// table of 16-bit values is two byte tables, and the 32-bit one two registers of 8.
#include <immintrin.h>

#include "nf4/blocks.h"
#include "nf4/kernels.h"

namespace pyfast::nf4 {
namespace {

struct Table16 {
  __m256i low, high;  // the low and high bytes of 16 values, in both 128-bit lanes
};

struct Table32 {
  __m256 low, high;  // values 0 to 7, 8 to 15
};

PYFAST_INLINE __m256 scaled_codes(float scale, int first) {
  return _mm256_mul_ps(_mm256_loadu_ps(kCodes + first), _mm256_set1_ps(scale));
}

// 16 words in order to byte tables.
PYFAST_INLINE Table16 split_bytes(__m128i words0, __m128i words1) {
  const __m128i mask = _mm_set1_epi16(0xFF);
  const __m128i low = _mm_packus_epi16(_mm_and_si128(words0, mask), _mm_and_si128(words1, mask));
  const __m128i high = _mm_packus_epi16(_mm_srli_epi16(words0, 8), _mm_srli_epi16(words1, 8));
  return {_mm256_broadcastsi128_si256(low), _mm256_broadcastsi128_si256(high)};
}

// Round to nearest even into the low words of the lanes.
PYFAST_INLINE __m128i to_bf16(__m256 exact) {
  const __m256i bits = _mm256_castps_si256(exact);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(exact, exact, _CMP_UNORD_Q));
  const __m256i kept = _mm256_blendv_epi8(sum, _mm256_set1_epi32(0x7FC00000), nan);
  const __m256i words = _mm256_srli_epi32(kept, 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

PYFAST_INLINE Table16 table_of(float scale, const BFloat16*) {
  return split_bytes(to_bf16(scaled_codes(scale, 0)), to_bf16(scaled_codes(scale, 8)));
}

PYFAST_INLINE Table16 table_of(float scale, const Float16*) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return split_bytes(_mm256_cvtps_ph(scaled_codes(scale, 0), kNearest),
                     _mm256_cvtps_ph(scaled_codes(scale, 8), kNearest));
}

PYFAST_INLINE Table32 table_of(float scale, const float*) {
  return {scaled_codes(scale, 0), scaled_codes(scale, 8)};
}

// 32 elements of 16 bits from 16 bytes.
template <class T>
PYFAST_INLINE void decode32(const std::uint8_t* packed, const Table16& table, T* out) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed));
  const __m128i mask = _mm_set1_epi8(15);
  const __m128i even = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
  const __m128i odd = _mm_and_si128(bytes, mask);
  // Elements 0 to 15 in the lower lane, 16 to 31 in the upper one.
  const __m256i index =
      _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
  const __m256i low = _mm256_shuffle_epi8(table.low, index);
  const __m256i high = _mm256_shuffle_epi8(table.high, index);
  const __m256i a = _mm256_unpacklo_epi8(low, high);  // elements 0 to 7, 16 to 23
  const __m256i b = _mm256_unpackhi_epi8(low, high);  // elements 8 to 15, 24 to 31
  __m128i* target = reinterpret_cast<__m128i*>(out);
  _mm_storeu_si128(target, _mm256_castsi256_si128(a));
  _mm_storeu_si128(target + 1, _mm256_castsi256_si128(b));
  _mm_storeu_si128(target + 2, _mm256_extracti128_si256(a, 1));
  _mm_storeu_si128(target + 3, _mm256_extracti128_si256(b, 1));
}

// 32 elements of 32 bits from 16 bytes.
PYFAST_INLINE void decode32(const std::uint8_t* packed, const Table32& table, float* out) {
  for (int i = 0; i < 4; ++i) {
    std::int32_t bytes;
    std::memcpy(&bytes, packed + 4 * i, sizeof bytes);
    const __m256i doubles = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(bytes));
    const __m256i index =
        _mm256_or_si256(_mm256_srli_epi64(doubles, 4), _mm256_slli_epi64(doubles, 32));
    const __m256 low = _mm256_permutevar8x32_ps(table.low, index);
    const __m256 high = _mm256_permutevar8x32_ps(table.high, index);
    const __m256 upper_half =
        _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));  // bit 3 to the sign
    _mm256_storeu_ps(out + 8 * i, _mm256_blendv_ps(low, high, upper_half));
  }
}

}  // namespace

void dequantize_avx2(const DequantizeParams& params, std::int64_t begin, std::int64_t end) {
  visit_dtype(params.dtype, [&](auto zero) {
    dequantize_blocks<decltype(zero)>(
        params, begin, end, [](float scale, auto* out) { return table_of(scale, out); },
        [](const std::uint8_t* packed, const auto& table, auto* out) {
          decode32(packed, table, out);
        });
  });
}

}  // namespace pyfast::nf4
