// What both directions of the fused op share, written once for every instruction set. Needs loops.h, activations.h,
// conv_rows.h and `VecOf<Element>` before it.
//
// A task walks down the rows of its tile. The rows of conv channels that the filter covers are kept in a ring of
// accumulators, [vector][rows][width + K - 1][lanes]: converted once, contiguous per channel vector, zero outside the
// image. The ring stays in L2, the rows under the filter in L1.
#pragma once

#include "kernels.h"

namespace mambaout_kernels::cpu {
namespace {

// The latest rows of a tile's conv channels, with R pixels of halo on each side.
template <typename V>
struct Ring {
  using Scalar = typename V::Scalar;
  Scalar* data;
  std::int64_t padded_width;  // width + K - 1
  std::int64_t rows;

  std::int64_t row_elements() const { return padded_width * V::kLanes; }
  Scalar* row(std::int64_t vector, std::int64_t h) const { return data + (vector * rows + h % rows) * row_elements(); }
  // Columns [0, first) and [last, padded_width) lie outside the image: zero in every row.
  void clear_outside(std::int64_t vectors, std::int64_t first, std::int64_t last) const {
    const V zero = broadcast(static_cast<Scalar>(0));
    for (std::int64_t r = 0; r < vectors * rows; ++r) {
      Scalar* start = data + r * row_elements();
      for (std::int64_t w = 0; w < first; ++w) store(start + w * V::kLanes, zero);
      for (std::int64_t w = last; w < padded_width; ++w) store(start + w * V::kLanes, zero);
    }
  }
  std::int64_t elements(std::int64_t vectors) const { return vectors * rows * row_elements(); }
};

// A tile's geometry, the same for both directions.
template <typename V>
struct Geometry {
  const GatedDwconvShape& shape;
  const Tile& tile;
  std::int64_t R = shape.K / 2, width = tile.w1 - tile.w0;
  std::int64_t channels = tile.conv1 - tile.conv0, vectors = (channels + V::kLanes - 1) / V::kLanes;
  std::int64_t first_vector = tile.conv0 / V::kLanes;
  std::int64_t gate = shape.D - shape.C + tile.conv0, conv = shape.D + gate;  // of u's channels
  std::int64_t halo0 = tile.w0 > R ? tile.w0 - R : 0;                         // columns inside the image
  std::int64_t halo1 = tile.w1 + R < shape.W ? tile.w1 + R : shape.W;
  std::int64_t ring_column0 = halo0 - (tile.w0 - R);

  Ring<V> ring(typename V::Scalar* data, std::int64_t rows) const { return {data, width + shape.K - 1, rows}; }
  void clear_outside(const Ring<V>& ring) const {
    ring.clear_outside(vectors, ring_column0, ring_column0 + halo1 - halo0);
  }
  // The first row that the filter covers at h, and the row after the last.
  std::int64_t row_begin(std::int64_t h) const { return h > R ? h - R : 0; }
  std::int64_t row_end(std::int64_t h) const { return h + R + 1 < shape.H ? h + R + 1 : shape.H; }
};

// The rows of `ring` under the filter centred at h, or at h and h + 1 where `outputs` is 2; `flipped`: rotate the
// filter by 180 degrees. x has room for K + outputs - 1 rows.
template <typename V>
inline void select_rows(const Geometry<V>& geometry, const Ring<V>& ring, std::int64_t vector, std::int64_t h,
                        int outputs, const void* packed_weight, bool flipped, const typename V::Scalar** x,
                        FilterRows<V>* rows) {
  const int K = geometry.shape.K;
  rows->x = x;
  rows->K = K;
  const std::int64_t first = geometry.row_begin(h), end = geometry.row_end(h + outputs - 1);
  rows->kh0 = static_cast<int>(first - (h - geometry.R));
  rows->kh1 = static_cast<int>(end - (h - geometry.R));
  const typename V::Scalar* next = ring.row(vector, first);
  const typename V::Scalar* const last = ring.row(vector, ring.rows - 1);
  for (int kh = rows->kh0; kh < rows->kh1; ++kh) {
    x[kh] = next;
    next = next == last ? ring.row(vector, 0) : next + ring.row_elements();
  }
  const std::int64_t taps = static_cast<std::int64_t>(K) * K;
  const auto* weight =
      static_cast<const typename V::Scalar*>(packed_weight) + (geometry.first_vector + vector) * taps * V::kLanes;
  rows->weight = flipped ? weight + (taps - 1) * V::kLanes : weight;
  rows->tap_step = flipped ? -V::kLanes : V::kLanes;
  rows->row_step = K * rows->tap_step;
}

template <int kTile, typename V, typename Fetch>
inline void conv_tile_any(const FilterRows<V>& rows, std::int64_t w, V bias, typename V::Scalar* out, Fetch& fetch) {
  switch (rows.K) {
    case 7: return conv_tile<7, kTile>(rows, w, bias, out, fetch);
    case 5: return conv_tile<5, kTile>(rows, w, bias, out, fetch);
    case 3: return conv_tile<3, kTile>(rows, w, bias, out, fetch);
    default: return conv_tile<0, kTile>(rows, w, bias, out, fetch);
  }
}
// Only where pairs_of_rows(K).
template <int kTile, typename V, typename Fetch>
inline void conv_tile_pair_any(const FilterRows<V>& rows, std::int64_t w, V bias, typename V::Scalar* out,
                               Fetch& fetch) {
  switch (rows.K) {
    case 7: return conv_tile_pair<7, kTile>(rows, w, bias, out, fetch);
    case 5: return conv_tile_pair<5, kTile>(rows, w, bias, out, fetch);
    default: return conv_tile_pair<3, kTile>(rows, w, bias, out, fetch);
  }
}
template <typename V>
inline bool pairs_of_rows(int K) {
  return V::kPairW > 0 && (K == 3 || K == 5 || K == 7);
}
template <typename V>
inline void conv_row_any(const FilterRows<V>& rows, std::int64_t width, V bias, typename V::Scalar* out) {
  switch (rows.K) {
    case 7: return conv_row<7>(rows, width, bias, out);
    case 5: return conv_row<5>(rows, width, bias, out);
    case 3: return conv_row<3>(rows, width, bias, out);
    default: return conv_row<0>(rows, width, bias, out);
  }
}
}  // namespace
}  // namespace mambaout_kernels::cpu
