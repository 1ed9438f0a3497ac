// The inner loops: convolution along a row, of one row or of two, and the weight gradient along a row, over one vector
// of channels. Needs a vec_*.h and loops.h before it.
//
// A row is [width + K - 1][lanes] of accumulators: W with its halo, zero outside the image. A tile of outputs is kept
// in registers along W, so that each loaded pixel serves up to K taps.
#pragma once

#include <cstdint>

namespace mambaout_kernels::cpu {
namespace {

// accumulator[t] += sum_k x[t + k] * weight[k]
template <int kTaps, int kTile, typename V>
inline void add_taps(V (&accumulator)[kTile], const typename V::Scalar* x, const typename V::Scalar* weight,
                     std::ptrdiff_t weight_step) {
  V w[kTaps];
#pragma GCC unroll 16
  for (int k = 0; k < kTaps; ++k) w[k] = load(weight + k * weight_step);
#pragma GCC unroll 32
  for (int i = 0; i < kTile + kTaps - 1; ++i) {
    const V pixel = load(x + i * V::kLanes);
#pragma GCC unroll 16
    for (int k = 0; k < kTaps; ++k) {
      const int t = i - k;
      if (t >= 0 && t < kTile) accumulator[t] = fma(pixel, w[k], accumulator[t]);
    }
  }
}

// The same for two rows of outputs that see x under neighbouring rows of the filter: each loaded pixel serves 2 * kTaps
// taps.
template <int kTaps, int kTile, typename V>
inline void add_taps_pair(V (&upper)[kTile], V (&lower)[kTile], const typename V::Scalar* x,
                          const typename V::Scalar* upper_weight, const typename V::Scalar* lower_weight,
                          std::ptrdiff_t weight_step) {
  V u[kTaps], l[kTaps];
#pragma GCC unroll 16
  for (int k = 0; k < kTaps; ++k) {
    u[k] = load(upper_weight + k * weight_step);
    l[k] = load(lower_weight + k * weight_step);
  }
#pragma GCC unroll 32
  for (int i = 0; i < kTile + kTaps - 1; ++i) {
    const V pixel = load(x + i * V::kLanes);
#pragma GCC unroll 16
    for (int k = 0; k < kTaps; ++k) {
      const int t = i - k;
      if (t < 0 || t >= kTile) continue;
      upper[t] = fma(pixel, u[k], upper[t]);
      lower[t] = fma(pixel, l[k], lower[t]);
    }
  }
}

// gradient[k] += sum_t dy[t] * x[t + k]
template <int kTaps, int kTile, typename V>
inline void add_tap_gradients(V (&gradient)[kTaps], const typename V::Scalar* dy, const typename V::Scalar* x) {
  V g[kTile];
#pragma GCC unroll 16
  for (int t = 0; t < kTile; ++t) g[t] = load(dy + t * V::kLanes);
#pragma GCC unroll 32
  for (int i = 0; i < kTile + kTaps - 1; ++i) {
    const V pixel = load(x + i * V::kLanes);
#pragma GCC unroll 16
    for (int k = 0; k < kTaps; ++k) {
      const int t = i - k;
      if (t >= 0 && t < kTile) gradient[k] = fma(pixel, g[t], gradient[k]);
    }
  }
}

// The rows kh0 <= kh < kh1 of the filter lie inside the image. For a pair of rows of outputs there are K + 1 such rows:
// the upper sees the first K of them, the lower the last K.
template <typename V>
struct FilterRows {
  const typename V::Scalar* const* x;  // [K] or [K + 1] rows, at the left end of the halo
  const typename V::Scalar* weight;    // [K][K][lanes]
  std::ptrdiff_t row_step, tap_step;   // through weight; negative where the filter is flipped
  int kh0, kh1, K;
};

// For a convolution that prefetches nothing.
struct NoFetch {
  void operator()() {}
};

// out[0 .. kTile) = sum_{kh,kw} x * weight + bias, at columns w .. w + kTile. kFilter: K where it is known, else 0.
// The bias comes last: first, it would enlarge every partial sum, and their rounding errors by a fifth.
// fetch() is called between the rows of the filter.
template <int kFilter, int kTile, typename V, typename Fetch>
[[gnu::noinline]] void conv_tile(const FilterRows<V>& rows, std::int64_t w, V bias, typename V::Scalar* out,
                                 Fetch& fetch) {
  V accumulator[kTile];
#pragma GCC unroll 16
  for (int t = 0; t < kTile; ++t) accumulator[t] = broadcast(static_cast<typename V::Scalar>(0));
  for (int kh = rows.kh0; kh < rows.kh1; ++kh) {
    const typename V::Scalar* x = rows.x[kh] + w * V::kLanes;
    const typename V::Scalar* weight = rows.weight + kh * rows.row_step;
    fetch();
    if constexpr (kFilter != 0) {
      add_taps<kFilter>(accumulator, x, weight, rows.tap_step);
    } else {  // row by row: shorter sums, smaller error
      V row[kTile];
#pragma GCC unroll 16
      for (int t = 0; t < kTile; ++t) row[t] = broadcast(static_cast<typename V::Scalar>(0));
      int kw = 0;
      for (; kw + 7 <= rows.K; kw += 7) {
        add_taps<7>(row, x + kw * V::kLanes, weight + kw * rows.tap_step, rows.tap_step);
      }
      for (; kw < rows.K; ++kw) add_taps<1>(row, x + kw * V::kLanes, weight + kw * rows.tap_step, rows.tap_step);
#pragma GCC unroll 16
      for (int t = 0; t < kTile; ++t) accumulator[t] = accumulator[t] + row[t];
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < kTile; ++t) store(out + t * V::kLanes, accumulator[t] + bias);
}

// out[0 .. kTile) and out[kTile .. 2 kTile): the same for two rows of outputs, the upper first.
template <int kFilter, int kTile, typename V, typename Fetch>
[[gnu::noinline]] void conv_tile_pair(const FilterRows<V>& rows, std::int64_t w, V bias, typename V::Scalar* out,
                                      Fetch& fetch) {
  V upper[kTile], lower[kTile];
#pragma GCC unroll 16
  for (int t = 0; t < kTile; ++t) upper[t] = lower[t] = broadcast(static_cast<typename V::Scalar>(0));
  const std::ptrdiff_t offset = w * V::kLanes;
  int kh = rows.kh0;
  if (kh == 0) add_taps<kFilter>(upper, rows.x[kh++] + offset, rows.weight, rows.tap_step);
  const int both = rows.kh1 < kFilter ? rows.kh1 : kFilter;
  for (; kh < both; ++kh) {
    fetch();
    const typename V::Scalar* weight = rows.weight + kh * rows.row_step;
    add_taps_pair<kFilter>(upper, lower, rows.x[kh] + offset, weight, weight - rows.row_step, rows.tap_step);
  }
  if (rows.kh1 > kFilter) {
    add_taps<kFilter>(lower, rows.x[kFilter] + offset, rows.weight + (kFilter - 1) * rows.row_step, rows.tap_step);
  }
#pragma GCC unroll 16
  for (int t = 0; t < kTile; ++t) {
    store(out + t * V::kLanes, upper[t] + bias);
    store(out + (kTile + t) * V::kLanes, lower[t] + bias);
  }
}

// Calls body(Constant<tile>, w) for the tiles, of kMost at the most, that cover [0, width).
template <int kMost, typename Body>
inline void for_each_tile(std::int64_t width, const Body& body) {
  std::int64_t w = 0;
  for (; w + kMost <= width; w += kMost) body(Constant<kMost>{}, w);
  if constexpr (kMost > 7) {
    for (; w + 7 <= width; w += 7) body(Constant<7>{}, w);
  }
  for (; w + 4 <= width; w += 4) body(Constant<4>{}, w);
  for (; w < width; ++w) body(Constant<1>{}, w);
}

template <int kFilter, typename V>
void conv_row(const FilterRows<V>& rows, std::int64_t width, V bias, typename V::Scalar* out) {
  NoFetch none;
  for_each_tile<V::kTileW>(width, [&](auto tile, std::int64_t w) {
    conv_tile<kFilter, decltype(tile)::value>(rows, w, bias, out + w * V::kLanes, none);
  });
}

template <int kTaps, typename V>
inline void tap_gradient_row(const typename V::Scalar* dy, const typename V::Scalar* x, std::int64_t width,
                             typename V::Scalar* partial) {
  V gradient[kTaps];
#pragma GCC unroll 16
  for (int k = 0; k < kTaps; ++k) gradient[k] = broadcast(static_cast<typename V::Scalar>(0));
  std::int64_t w = 0;
  for (; w + 7 <= width; w += 7) add_tap_gradients<kTaps, 7>(gradient, dy + w * V::kLanes, x + w * V::kLanes);
  for (; w < width; ++w) add_tap_gradients<kTaps, 1>(gradient, dy + w * V::kLanes, x + w * V::kLanes);
#pragma GCC unroll 16
  for (int k = 0; k < kTaps; ++k) store(partial + k * V::kLanes, load(partial + k * V::kLanes) + gradient[k]);
}

// partial[kh][kw] += sum_w dy[w] * x[kh][w + kw]; partial[K * K] += sum_w dy[w]
template <int kFilter, typename V>
void weight_gradient_row(const FilterRows<V>& rows, const typename V::Scalar* dy, std::int64_t width,
                         typename V::Scalar* partial) {
  for (int kh = rows.kh0; kh < rows.kh1; ++kh) {
    typename V::Scalar* row = partial + kh * rows.K * V::kLanes;
    if constexpr (kFilter != 0) {
      tap_gradient_row<kFilter, V>(dy, rows.x[kh], width, row);
    } else {
      int kw = 0;
      for (; kw + 7 <= rows.K; kw += 7) {
        tap_gradient_row<7, V>(dy, rows.x[kh] + kw * V::kLanes, width, row + kw * V::kLanes);
      }
      for (; kw < rows.K; ++kw) {
        tap_gradient_row<1, V>(dy, rows.x[kh] + kw * V::kLanes, width, row + kw * V::kLanes);
      }
    }
  }
  V sum = broadcast(static_cast<typename V::Scalar>(0));
  for (std::int64_t w = 0; w < width; ++w) sum = sum + load(dy + w * V::kLanes);
  typename V::Scalar* bias = partial + rows.K * rows.K * V::kLanes;
  store(bias, load(bias) + sum);
}

}  // namespace
}  // namespace mambaout_kernels::cpu
