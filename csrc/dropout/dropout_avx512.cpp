// SPDX-License-Identifier: Apache-2.0
// Needs AVX-512 F, BW, DQ, VL. Includes nothing whose code could be shared with other files.
#include <immintrin.h>

#include "dropout/kernels.h"
#include "dropout/mask.h"
#include "dropout/rows.h"

namespace pyfast::dropout {
namespace {

struct Avx512 {
  using Int = __m512i;
  static constexpr int kGroups = 8;

  PYFAST_INLINE static Int broadcast(std::uint32_t word) { return _mm512_set1_epi64(word); }
  // Four apart.
  PYFAST_INLINE static Int counters_from(std::uint32_t first) {
    return _mm512_add_epi64(broadcast(first), _mm512_set_epi64(28, 24, 20, 16, 12, 8, 4, 0));
  }
  PYFAST_INLINE static Int multiply(Int a, Int b) { return _mm512_mul_epu32(a, b); }
  PYFAST_INLINE static Int high_half(Int a) { return _mm512_srli_epi64(a, 32); }
  PYFAST_INLINE static Int exclusive_or(Int a, Int b, Int c) {
    return _mm512_ternarylogic_epi64(a, b, c, 0x96);
  }
  PYFAST_INLINE static Int majority(Int a, Int b, Int c) {
    return _mm512_ternarylogic_epi64(a, b, c, 0xE8);
  }
  PYFAST_INLINE static void store_low_halves(Int a, std::uint32_t (&words)[kGroups]) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(words), _mm512_cvtepi64_epi32(a));
  }
};

// Lanes of 32 bits, round to nearest even into the high words. A NaN from bf16 has no low word that
// could carry into it.
PYFAST_INLINE __m512i round_to_bf16(__m512 exact) {
  const __m512i bits = _mm512_castps_si512(exact);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
}

// 32 scaled elements of 16 bits.
PYFAST_INLINE __m512i scaled(__m512i words, __m512 scale, BFloat16) {
  const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
  const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(-65536)));
  const __m512i low = _mm512_srli_epi32(round_to_bf16(_mm512_mul_ps(even, scale)), 16);
  return _mm512_mask_mov_epi16(low, 0xAAAAAAAAU, round_to_bf16(_mm512_mul_ps(odd, scale)));
}

PYFAST_INLINE __m512i scaled(__m512i words, __m512 scale, Float16) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const __m512 low = _mm512_cvtph_ps(_mm512_castsi512_si256(words));
  const __m512 high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(words, 1));
  return _mm512_inserti64x4(
      _mm512_castsi256_si512(_mm512_cvtps_ph(_mm512_mul_ps(low, scale), kNearest)),
      _mm512_cvtps_ph(_mm512_mul_ps(high, scale), kNearest), 1);
}

// The elements of `valid`, of 32.
template <class T>
PYFAST_INLINE void drop32(const T* x, T* out, __mmask32 keep, __mmask32 valid, __m512 scale) {
  const __m512i words = _mm512_maskz_loadu_epi16(valid, x);
  _mm512_mask_storeu_epi16(out, valid, _mm512_maskz_mov_epi16(keep, scaled(words, scale, T{})));
}

PYFAST_INLINE void drop32(const float* x, float* out, __mmask32 keep, __mmask32 valid,
                          __m512 scale) {
  for (int half = 0; half < 32; half += 16) {
    const auto now = static_cast<__mmask16>(valid >> half);
    const __m512 values = _mm512_maskz_loadu_ps(now, x + half);
    const auto kept = static_cast<__mmask16>(keep >> half);
    _mm512_mask_storeu_ps(out + half, now, _mm512_maskz_mul_ps(kept, values, scale));
  }
}

PYFAST_INLINE __mmask32 first(std::int64_t count) {
  return count < 32 ? (1U << count) - 1U : 0xFFFFFFFFU;
}

}  // namespace

void dropout_avx512(const DropoutParams& params, std::int64_t begin, std::int64_t end) {
  const MaskSource<Avx512> source(MaskSeed(params.seed), params.threshold);
  const __m512 scale = _mm512_set1_ps(keep_scale(params.threshold));
  visit_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    for_each_row<T>(params, begin, end, [&](const Run<T>& run, std::int64_t columns) {
      std::uint32_t group = run.group;
      for (std::int64_t at = 0; at < columns; group += Avx512::kGroups) {
        std::uint32_t words[Avx512::kGroups];
        source.draw(run.row, group, words);
        for (int i = 0; i < Avx512::kGroups && at < columns; ++i, at += kMaskColumns) {
          drop32(run.x + at, run.out + at, words[i], first(columns - at), scale);
        }
      }
    });
  });
}

}  // namespace pyfast::dropout
