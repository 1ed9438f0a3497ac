// 8 fp32 lanes of AVX2 with FMA and F16C. Included by one translation unit only.
#pragma once

#include <immintrin.h>

#include "element_types.h"

namespace mambaout_kernels::cpu {
namespace {

struct Vec {
  using Scalar = float;
  static constexpr int kLanes = 8;
  static constexpr int kTileW = 7;   // 7 sums, 7 weights, 1 pixel of 16 registers
  static constexpr int kPairW = 0;   // two rows at once do not fit
  static constexpr int kUnroll = 2;  // vectors of gates side by side
  __m256 v;
};

inline __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec fnma(Vec a, Vec b, Vec c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a * b
inline Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
// b where either is NaN.
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec select_less(Vec a, Vec b, Vec if_less, Vec otherwise) {
  return {_mm256_blendv_ps(otherwise.v, if_less.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}
// a * b rounded to an integer: as fp32, and in the low bits of a lane. |a * b| < 2^22: the addition of 1.5 * 2^23
// rounds to nearest even.
struct Rounded {
  Vec value;
  __m256i index;
};
inline Rounded round_product(Vec a, Vec b) {
  const Vec magic = broadcast(12582912.0f), sum = fma(a, b, magic);
  return {sum - magic, _mm256_castps_si256(sum.v)};
}

inline Vec to_float(Rounded rounded) { return rounded.value; }
// 2^n for n in [-127, 127]; 2^-127 gives 0.
inline Vec power_of_two(Rounded n) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n.index, _mm256_set1_epi32(127)), 23))};
}

// a * 2^n where that is a normal number.
inline Vec times_power_of_two(Vec a, Rounded n) {
  return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a.v), _mm256_slli_epi32(n.index, 23)))};
}

// 8 pieces, one permutation per coefficient; it reads the low bits of the index only.
constexpr int kPieces = 8;
inline Vec lookup(const float (&table)[8], Rounded piece) {
  return {_mm256_permutevar8x32_ps(_mm256_load_ps(table), piece.index)};
}

inline float sum_of_lanes(Vec a) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec load_first(const float* p, int n) { return {_mm256_maskload_ps(p, first_lanes(n))}; }
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline void store_first(float* p, Vec a, int n) { _mm256_maskstore_ps(p, first_lanes(n), a.v); }

inline Vec widen(__m128i bits, BFloat16) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}
inline Vec widen(__m128i bits, Float16) { return {_mm256_cvtph_ps(bits)}; }
inline __m128i narrow(Vec a, BFloat16) {  // to nearest even; NaN stays NaN
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), is_nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}
inline __m128i narrow(Vec a, Float16) { return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT); }

// to[i * to_step + j] = from[j * from_step + i], i and j below 8
inline void transpose(const float* from, std::int64_t from_step, float* to, std::int64_t to_step) {
  __m256 a[8], b[8];
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) a[j] = _mm256_loadu_ps(from + j * from_step);
  const auto twos = [](__m256 x) { return _mm256_castps_pd(x); };
#pragma GCC unroll 4
  for (int j = 0; j < 8; j += 2) {
    b[j] = _mm256_unpacklo_ps(a[j], a[j + 1]);
    b[j + 1] = _mm256_unpackhi_ps(a[j], a[j + 1]);
  }
#pragma GCC unroll 2
  for (int j = 0; j < 8; j += 4) {
    a[j] = _mm256_castpd_ps(_mm256_unpacklo_pd(twos(b[j]), twos(b[j + 2])));
    a[j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(twos(b[j]), twos(b[j + 2])));
    a[j + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(twos(b[j + 1]), twos(b[j + 3])));
    a[j + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(twos(b[j + 1]), twos(b[j + 3])));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to + i * to_step, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * to_step, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
  }
}

// Past the caches; p is aligned to the size of what is stored.
inline void stream(float* p, Vec a) { _mm256_stream_ps(p, a.v); }
template <typename Half>
inline void stream(Half* p, Vec a) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow(a, Half{}));
}

template <typename Half>
inline Vec load(const Half* p) {
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), Half{});
}
template <typename Half>
inline Vec load_first(const Half* p, int n) {
  alignas(16) Half lanes[8] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}
template <typename Half>
inline void store(Half* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(a, Half{}));
}
template <typename Half>
inline void store_first(Half* p, Vec a, int n) {
  alignas(16) Half lanes[8];
  store(lanes, a);
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
}

}  // namespace
}  // namespace mambaout_kernels::cpu
