// The bf16 micro-kernel: dot products of pairs, exact products, fp32 sums. Needs vec_avx512.h and fp32_gemm.h
// before it.
#pragma once

namespace mambaout_kernels::cpu {
namespace {

struct Bf16Gemm {
  using Element = BFloat16;
  using Left = BFloat16*;
  using TaskScope = NoScope;
  static constexpr PackedFormat kFormat = {16, 1, 2};
  static constexpr int kMr = 14;

  template <typename Body>
  static void for_each_tile(std::int64_t rows, const Body& body) {
    for_each_gemm_tile<kMr>(rows, body);
  }

  // out[r][0 .. 32) = sum_k a[r * lda + k] * panel[k / 2][0 .. 32)[k % 2], likewise; depth is even
  template <bool kAdd, int kTileRows>
  [[gnu::noinline]] static void tile(Constant<kTileRows>, const BFloat16* a, std::int64_t lda, const void* panel,
                                     std::int64_t depth, float* out, Prefetch prefetch) {
    const auto* b = static_cast<const BFloat16*>(panel);
    __m512 left[kTileRows], right[kTileRows];
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) left[r] = right[r] = _mm512_setzero_ps();
    for (std::int64_t k = 0; k < depth; k += 2) {
      prefetch.fetch(k / 2);
      const auto b0 = (__m512bh)_mm512_loadu_si512(b + k * 32), b1 = (__m512bh)_mm512_loadu_si512(b + k * 32 + 32);
#pragma GCC unroll 16
      for (int r = 0; r < kTileRows; ++r) {
        int pair;
        __builtin_memcpy(&pair, a + r * lda + k, sizeof(pair));
        const auto value = (__m512bh)_mm512_set1_epi32(pair);
        left[r] = _mm512_dpbf16_ps(left[r], value, b0);
        right[r] = _mm512_dpbf16_ps(right[r], value, b1);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      float* to = out + r * 32;
      _mm512_storeu_ps(to, kAdd ? _mm512_add_ps(_mm512_loadu_ps(to), left[r]) : left[r]);
      _mm512_storeu_ps(to + 16, kAdd ? _mm512_add_ps(_mm512_loadu_ps(to + 16), right[r]) : right[r]);
    }
  }
};

}  // namespace
}  // namespace mambaout_kernels::cpu
