// SPDX-License-Identifier: Apache-2.0
// Needs AVX2 and F16C. Includes nothing whose code could be shared with other files.
#include <immintrin.h>

#include "dropout/kernels.h"
#include "dropout/mask.h"
#include "dropout/rows.h"

namespace pyfast::dropout {
namespace {

struct Avx2 {
  using Int = __m256i;
  static constexpr int kGroups = 4;

  PYFAST_INLINE static Int broadcast(std::uint32_t word) { return _mm256_set1_epi64x(word); }
  // In the order that `interleave` undoes.
  PYFAST_INLINE static Int groups_from(std::uint32_t first) {
    return _mm256_add_epi64(broadcast(first), _mm256_set_epi64x(3, 1, 2, 0));
  }
  PYFAST_INLINE static Int multiply(Int a, Int b) { return _mm256_mul_epu32(a, b); }
  PYFAST_INLINE static Int high_half(Int a) { return _mm256_srli_epi64(a, 32); }
  PYFAST_INLINE static Int exclusive_or(Int a, Int b, Int c) {
    return _mm256_xor_si256(_mm256_xor_si256(a, b), c);
  }
  // The low halves of a lane of each.
  PYFAST_INLINE static Int join(Int low, Int high) {
    return _mm256_blend_epi32(low, _mm256_slli_epi64(high, 32), 0xAA);
  }
  PYFAST_INLINE static void interleave(Int a, Int b, Int* low, Int* high) {
    *low = _mm256_unpacklo_epi64(a, b);
    *high = _mm256_unpackhi_epi64(a, b);
  }
};

PYFAST_INLINE __m256i load(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}

// Lanes of 32 bits, round to nearest even into the high words. A NaN from bf16 has no low word that
// could carry into it.
PYFAST_INLINE __m256i round_to_bf16(__m256 exact) {
  const __m256i bits = _mm256_castps_si256(exact);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
}

// 16 scaled elements of 16 bits.
PYFAST_INLINE __m256i scaled(__m256i words, __m256 scale, BFloat16) {
  const __m256 even = _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
  const __m256 odd = _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(-65536)));
  const __m256i low = _mm256_srli_epi32(round_to_bf16(_mm256_mul_ps(even, scale)), 16);
  return _mm256_blend_epi16(low, round_to_bf16(_mm256_mul_ps(odd, scale)), 0xAA);
}

PYFAST_INLINE __m256i scaled(__m256i words, __m256 scale, Float16) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const __m256 low = _mm256_cvtph_ps(_mm256_castsi256_si128(words));
  const __m256 high = _mm256_cvtph_ps(_mm256_extracti128_si256(words, 1));
  return _mm256_set_m128i(_mm256_cvtps_ph(_mm256_mul_ps(high, scale), kNearest),
                          _mm256_cvtps_ph(_mm256_mul_ps(low, scale), kNearest));
}

// 16 elements; `keep` has lanes of 16 bits.
template <class T>
PYFAST_INLINE void drop16(const T* x, T* out, __m256i keep, __m256 scale) {
  const __m256i kept = _mm256_and_si256(keep, scaled(load(x), scale, T{}));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), kept);
}

PYFAST_INLINE void drop16(const float* x, float* out, __m256i keep, __m256 scale) {
  const __m256i wide[2] = {_mm256_cvtepi16_epi32(_mm256_castsi256_si128(keep)),
                           _mm256_cvtepi16_epi32(_mm256_extracti128_si256(keep, 1))};
  for (int half = 0; half < 2; ++half) {
    const __m256 product = _mm256_mul_ps(_mm256_loadu_ps(x + 8 * half), scale);
    _mm256_storeu_ps(out + 8 * half, _mm256_and_ps(product, _mm256_castsi256_ps(wide[half])));
  }
}

}  // namespace

void dropout_avx2(const DropoutParams& params, std::int64_t begin, std::int64_t end) {
  constexpr int kStep = Avx2::kGroups * kMaskColumns;
  const MaskSeed seed(params.seed);
  const MaskSource<Avx2> source(seed);
  const float factor = keep_scale(params.threshold);
  const __m256 scale = _mm256_set1_ps(factor);
  const __m256i threshold = _mm256_set1_epi16(static_cast<short>(params.threshold));
  const __m256i some = _mm256_set1_epi16(params.threshold < kMaskLevels ? -1 : 0);
  const auto keep = [&](__m256i draws) {  // draws >= threshold, unsigned
    const __m256i not_below = _mm256_cmpeq_epi16(_mm256_max_epu16(draws, threshold), draws);
    return _mm256_and_si256(not_below, some);
  };
  visit_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    for_each_row<T>(params, begin, end, [&](const Run<T>& run, std::int64_t columns) {
      const std::int64_t whole = columns / kStep * kStep;
      std::uint32_t group = run.group;
      for (std::int64_t at = 0; at < whole; at += kStep, group += Avx2::kGroups) {
        __m256i low, high;
        source.draw(run.row, group, &low, &high);
        drop16(run.x + at, run.out + at, keep(low), scale);
        drop16(run.x + at + 16, run.out + at + 16, keep(high), scale);
      }
      drop_scalar(run, whole, columns, seed, params.threshold, factor);
    });
  });
}

}  // namespace pyfast::dropout
