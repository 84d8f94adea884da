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
  // Four apart.
  PYFAST_INLINE static Int counters_from(std::uint32_t first) {
    return _mm256_add_epi64(broadcast(first), _mm256_set_epi64x(12, 8, 4, 0));
  }
  PYFAST_INLINE static Int multiply(Int a, Int b) { return _mm256_mul_epu32(a, b); }
  PYFAST_INLINE static Int high_half(Int a) { return _mm256_srli_epi64(a, 32); }
  PYFAST_INLINE static Int exclusive_or(Int a, Int b, Int c) {
    return _mm256_xor_si256(_mm256_xor_si256(a, b), c);
  }
  PYFAST_INLINE static Int majority(Int a, Int b, Int c) {
    return _mm256_or_si256(_mm256_and_si256(a, b), _mm256_and_si256(_mm256_or_si256(a, b), c));
  }
  PYFAST_INLINE static void store_low_halves(Int a, std::uint32_t (&words)[kGroups]) {
    const __m256i first = _mm256_permutevar8x32_epi32(a, _mm256_set_epi32(0, 0, 0, 0, 6, 4, 2, 0));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(words), _mm256_castsi256_si128(first));
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

// Sets the lanes of 16 bits whose bit is set.
PYFAST_INLINE __m256i kept_lanes(std::uint32_t word) {
  const __m256i bits = _mm256_set_epi16(-0x8000, 0x4000, 0x2000, 0x1000, 0x800, 0x400, 0x200, 0x100,
                                        0x80, 0x40, 0x20, 0x10, 8, 4, 2, 1);
  const __m256i all = _mm256_set1_epi16(static_cast<short>(word));
  return _mm256_cmpeq_epi16(_mm256_and_si256(all, bits), bits);
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
  const MaskSource<Avx2> source(MaskSeed(params.seed), params.threshold);
  const float factor = keep_scale(params.threshold);
  const __m256 scale = _mm256_set1_ps(factor);
  visit_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    for_each_row<T>(params, begin, end, [&](const Run<T>& run, std::int64_t columns) {
      std::uint32_t group = run.group;
      for (std::int64_t first = 0; first < columns; first += kStep, group += Avx2::kGroups) {
        std::uint32_t words[Avx2::kGroups];
        source.draw(run.row, group, words);
        for (int i = 0; i < Avx2::kGroups; ++i) {
          const std::int64_t at = first + i * kMaskColumns, left = columns - at;
          if (left >= kMaskColumns) {
            drop16(run.x + at, run.out + at, kept_lanes(words[i]), scale);
            drop16(run.x + at + 16, run.out + at + 16, kept_lanes(words[i] >> 16), scale);
          } else {
            drop_scalar(run, at, left, words[i], factor);
          }
        }
      }
    });
  });
}

}  // namespace pyfast::dropout
