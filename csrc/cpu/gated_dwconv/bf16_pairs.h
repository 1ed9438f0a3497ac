// The 7 x 7 forward convolution of bf16 by bf16 in dot products of pairs: 4 instructions for 7 taps.
//
// A pixel of the ring is [16 lanes][x[w], x[w + 1]], so the taps 0 .. 5 of a filter row are three pairs; the last is a
// multiplication in fp32, so that x[w + 7], which the filter does not cover, is not touched. Products of bf16 are exact
// in fp32; sums are fp32. Needs vec_avx512.h and body.h before it.
#pragma once

#include "packed_pairs.h"

namespace mambaout_kernels::cpu {
namespace {

struct Bf16PairConvolution {
  static_assert(kPairLanes == Vec::kLanes);

  static void store_pairs(float* to, const BFloat16* left, const BFloat16* right, int lanes) {
    const __m512i none = _mm512_setzero_si512();
    const __mmask16 use = first_lanes(lanes);
    const __m512i low = left == nullptr ? none : _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(use, left));
    const __m512i high = right == nullptr ? none : _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(use, right));
    _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }

  static void fill_row(const Geometry<Vec>& geometry, const Ring<Vec>& ring, const NhwcView& u, std::int64_t h) {
    const std::int64_t step = ring.elements(1) / kPairLanes;
    // The column before the image is the left half of a pair, too.
    for (std::int64_t w = geometry.halo0 - (geometry.ring_column0 > 0); w < geometry.halo1; ++w) {
      const bool has_left = w >= geometry.halo0, has_right = w + 1 < geometry.halo1;
      const BFloat16* left = pixel<BFloat16>(u, geometry.tile.n, h, w < 0 ? 0 : w) + geometry.conv;
      const BFloat16* right = pixel<BFloat16>(u, geometry.tile.n, h, has_right ? w + 1 : 0) + geometry.conv;
      float* to = ring.row(0, h) + (w - geometry.halo0 + geometry.ring_column0) * kPairLanes;
      for_each_vector<kPairLanes>(geometry.channels, [&](std::int64_t offset, int lanes) {
        store_pairs(to + offset * step, has_left ? left + offset : nullptr, has_right ? right + offset : nullptr,
                    lanes);
      });
    }
  }

  static bool pairs(int) { return true; }

  // One row of the filter.
  struct Taps {
    __m512bh pairs[kPairFilter / 2];
    Vec last;
    explicit Taps(const PackedPairRow& row) : last(load(row.last)) {
#pragma GCC unroll 4
      for (int p = 0; p < kPairFilter / 2; ++p) pairs[p] = (__m512bh)_mm512_loadu_si512(row.pairs[p]);
    }
    // The taps that cover pixel i of a row, for each output of the tile.
    template <int kTile>
    [[gnu::always_inline]] void add_pixel(Vec (&sums)[kTile], int i, __m512i pixels) const {
#pragma GCC unroll 4
      for (int p = 0; p < kPairFilter / 2; ++p) {
        const int t = i - 2 * p;
        if (t >= 0 && t < kTile) sums[t].v = _mm512_dpbf16_ps(sums[t].v, (__m512bh)pixels, pairs[p]);
      }
      const int t = i - (kPairFilter - 1);
      if (t >= 0 && t < kTile) {
        sums[t] = fma({_mm512_castsi512_ps(_mm512_slli_epi32(pixels, 16))}, last, sums[t]);
      }
    }
  };

  // kOutputs rows of outputs, from h on: out [kOutputs][kTile][lanes]
  template <int kOutputs, int kTile, typename Fetch>
  [[gnu::noinline]] static void convolve(const Geometry<Vec>& geometry, const Ring<Vec>& ring, const void* packed,
                                         std::int64_t vector, std::int64_t h, std::int64_t w, Vec bias, float* out,
                                         Fetch& fetch) {
    constexpr int kFilter = kPairFilter, kPixels = kTile + kFilter - 1;
    const auto* weight =
        static_cast<const PackedPairRow*>(packed) + (geometry.first_vector + vector) * kFilter + (geometry.R - h);
    Vec sums[kOutputs][kTile];
#pragma GCC unroll 2
    for (int o = 0; o < kOutputs; ++o)
#pragma GCC unroll 16
      for (int t = 0; t < kTile; ++t) sums[o][t] = bias;

    const std::int64_t begin = geometry.row_begin(h), end = geometry.row_end(h + kOutputs - 1);
    const float* x = ring.row(vector, begin) + w * kPairLanes;
    const float* const last = ring.row(vector, ring.rows - 1) + w * kPairLanes;
    for (std::int64_t row = begin; row < end; ++row) {
      fetch();
      // Of two outputs, the upper does not see the last row, nor the lower the first.
      const bool upper = kOutputs == 1 || row <= h + geometry.R, lower = kOutputs == 2 && row > h - geometry.R;
      if (upper && lower) {
        const Taps upper_taps(weight[row]), lower_taps(weight[row - 1]);
#pragma GCC unroll 32
        for (int i = 0; i < kPixels; ++i) {
          const __m512i pixels = _mm512_loadu_si512(x + i * kPairLanes);
          upper_taps.add_pixel(sums[0], i, pixels);
          lower_taps.add_pixel(sums[kOutputs - 1], i, pixels);
        }
      } else if (upper) {
        const Taps taps(weight[row]);
#pragma GCC unroll 32
        for (int i = 0; i < kPixels; ++i) taps.add_pixel(sums[0], i, _mm512_loadu_si512(x + i * kPairLanes));
      } else {
        const Taps taps(weight[row - 1]);
#pragma GCC unroll 32
        for (int i = 0; i < kPixels; ++i) taps.add_pixel(sums[kOutputs - 1], i, _mm512_loadu_si512(x + i * kPairLanes));
      }
      x = x == last ? ring.row(vector, 0) + w * kPairLanes : x + ring.row_elements();
    }
#pragma GCC unroll 2
    for (int o = 0; o < kOutputs; ++o)
#pragma GCC unroll 16
      for (int t = 0; t < kTile; ++t) store(out + (o * kTile + t) * kPairLanes, sums[o][t]);
  }
};

}  // namespace
}  // namespace mambaout_kernels::cpu
