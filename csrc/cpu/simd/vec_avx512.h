// 16 fp32 lanes of AVX-512 (F, BW, VL, DQ). Included by one translation unit only.
#pragma once

#include <immintrin.h>

#include "element_types.h"

namespace mambaout_kernels::cpu {
namespace {

struct Vec {
  using Scalar = float;
  static constexpr int kLanes = 16;
  static constexpr int kTileW = 14;  // of one row: 14 sums, 7 weights, 1 pixel of 32 registers
  static constexpr int kPairW = 7;   // of two rows at once: 14 sums, 14 weights, 1 pixel
  static constexpr int kUnroll = 4;  // vectors of gates side by side
  __m512 v;
};

inline __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

inline Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec fnma(Vec a, Vec b, Vec c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a * b
inline Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
// b where either is NaN.
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec select_less(Vec a, Vec b, Vec if_less, Vec otherwise) {
  return {_mm512_mask_mov_ps(otherwise.v, _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), if_less.v)};
}
// Not where one is NaN.
inline bool all_below(Vec a, float limit) {
  return _mm512_cmp_ps_mask(a.v, _mm512_set1_ps(limit), _CMP_LT_OQ) == 0xffff;
}
// a * b rounded to an integer: as fp32, and in the low bits of a lane. |a * b| < 2^22: the addition of 1.5 * 2^23
// rounds to nearest even.
struct Rounded {
  Vec value;
  __m512i index;
};
inline Rounded round_product(Vec a, Vec b) {
  const Vec magic = broadcast(12582912.0f), sum = fma(a, b, magic);
  return {sum - magic, _mm512_castps_si512(sum.v)};
}
inline Vec to_float(Rounded rounded) { return rounded.value; }
// 2^n for n in [-127, 127]; 2^-127 gives 0.
inline Vec power_of_two(Rounded n) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n.index, _mm512_set1_epi32(127)), 23))};
}

// a * 2^n where that is a normal number.
inline Vec times_power_of_two(Vec a, Rounded n) {
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a.v), _mm512_slli_epi32(n.index, 23)))};
}

// 16 pieces, one permutation per coefficient; it reads the low bits of the index only.
constexpr int kPieces = 16;
inline Vec lookup(const float (&table)[16], Rounded piece) {
  return {_mm512_permutexvar_ps(piece.index, _mm512_load_ps(table))};
}

inline float sum_of_lanes(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load_first(const float* p, int n) { return {_mm512_maskz_loadu_ps(first_lanes(n), p)}; }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void store_first(float* p, Vec a, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), a.v); }

inline Vec widen(__m256i bits, BFloat16) {  // word i to the high half of lane i
  const __m512i source = _mm512_cvtepu16_epi32(_mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  return {_mm512_castsi512_ps(
      _mm512_maskz_permutexvar_epi16(0xaaaaaaaau, _mm512_slli_epi32(source, 16), _mm512_castsi256_si512(bits)))};
}
inline Vec widen(__m256i bits, Float16) { return {_mm512_cvtph_ps(bits)}; }
#ifdef __AVX512BF16__
inline __m256i narrow(Vec a, BFloat16) { return (__m256i)_mm512_cvtneps_pbh(a.v); }  // subnormal numbers to zero
#else
inline __m256i narrow(Vec a, BFloat16) {  // to nearest even; NaN stays NaN
  const __m512i bits = _mm512_castps_si512(a.v), one = _mm512_set1_epi32(1);
  __m512i rounded = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  rounded = _mm512_mask_add_epi32(rounded, _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000)), rounded, one);
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
  const __m512i high_words =
      _mm512_castsi256_si512(_mm256_setr_epi16(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31));
  return _mm512_castsi512_si256(_mm512_permutexvar_epi16(high_words, rounded));
}
#endif
inline Vec rounded(Vec a, BFloat16 to) { return widen(narrow(a, to), to); }
// Numbers that bf16 holds: to[2 i] = even[i], to[2 i + 1] = odd[i]
inline void store_interleaved(BFloat16* to, Vec even, Vec odd) {
  const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(even.v), 16);
  _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_castps_si512(odd.v)));
}
inline __m256i narrow(Vec a, Float16) { return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT); }

// to[i * to_step + j] = from[j * from_step + i], i and j below 16
inline void transpose(const float* from, std::int64_t from_step, float* to, std::int64_t to_step) {
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int j = 0; j < 16; ++j) a[j] = _mm512_loadu_si512(from + j * from_step);
  // Twos, then fours of a row's neighbours within each 128 bits; then the 128 bits of four rows, twice.
#pragma GCC unroll 8
  for (int j = 0; j < 16; j += 2) {
    b[j] = _mm512_unpacklo_epi32(a[j], a[j + 1]);
    b[j + 1] = _mm512_unpackhi_epi32(a[j], a[j + 1]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 16; j += 4) {
    a[j] = _mm512_unpacklo_epi64(b[j], b[j + 2]);
    a[j + 1] = _mm512_unpackhi_epi64(b[j], b[j + 2]);
    a[j + 2] = _mm512_unpacklo_epi64(b[j + 1], b[j + 3]);
    a[j + 3] = _mm512_unpackhi_epi64(b[j + 1], b[j + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i low0 = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88), high0 = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
    const __m512i low1 = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
    const __m512i high1 = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    _mm512_storeu_si512(to + i * to_step, _mm512_shuffle_i32x4(low0, low1, 0x88));
    _mm512_storeu_si512(to + (i + 4) * to_step, _mm512_shuffle_i32x4(high0, high1, 0x88));
    _mm512_storeu_si512(to + (i + 8) * to_step, _mm512_shuffle_i32x4(low0, low1, 0xdd));
    _mm512_storeu_si512(to + (i + 12) * to_step, _mm512_shuffle_i32x4(high0, high1, 0xdd));
  }
}

// Past the caches; p is aligned to the size of what is stored.
inline void stream(float* p, Vec a) { _mm512_stream_ps(p, a.v); }
template <typename Half>
inline void stream(Half* p, Vec a) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow(a, Half{}));
}

template <typename Half>
inline Vec load(const Half* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), Half{});
}
template <typename Half>
inline Vec load_first(const Half* p, int n) {
  return widen(_mm256_maskz_loadu_epi16(first_lanes(n), p), Half{});
}
template <typename Half>
inline void store(Half* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a, Half{}));
}
template <typename Half>
inline void store_first(Half* p, Vec a, int n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), narrow(a, Half{}));
}

}  // namespace
}  // namespace mambaout_kernels::cpu
