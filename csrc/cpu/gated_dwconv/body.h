// What both directions of the fused op share, written once for every instruction set. Needs a vec_*.h, activations.h
// and conv_rows.h before it, and `VecOf<Element>`.
//
// A task walks down the rows of its block. It keeps the rows of conv channels that the filter covers as a ring of
// accumulators, [vector][rows][width + K - 1][lanes]: converted once, contiguous per channel vector, zero outside the
// image; so the ring stays in L2, and the rows under the filter in L1.
#pragma once

#include "kernels.h"

namespace mambaout_kernels::cpu {
namespace {

inline std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

template <typename Element>
inline const Element* pixel(const NhwcView& view, std::int64_t n, std::int64_t h, std::int64_t w) {
  return static_cast<const Element*>(view.data) + n * view.stride_n + h * view.stride_h + w * view.stride_w;
}

// Calls body(offset, lanes_in_use) for count channels, a vector at a time; the last may be partial.
template <int kLanes, typename Body>
inline void for_each_vector(std::int64_t count, Body body) {
  std::int64_t offset = 0;
  for (; offset + kLanes <= count; offset += kLanes) body(offset, kLanes);
  if (offset < count) body(offset, static_cast<int>(count - offset));
}
// Calls body(offset, Several-making count, lanes_in_use of the last vector) likewise, V::kTogether vectors at a time.
template <typename V, typename Body>
inline void for_each_vectors(std::int64_t count, Body body) {
  constexpr int kLanes = V::kLanes, kMost = V::kTogether;
  std::int64_t offset = 0;
  for (; offset + kMost * kLanes <= count; offset += kMost * kLanes) body(offset, Constant<kMost>{}, kLanes);
  if constexpr (kMost > 2) {
    for (; offset + 2 * kLanes <= count; offset += 2 * kLanes) body(offset, Constant<2>{}, kLanes);
  }
  if constexpr (kMost > 1) {
    for (; offset + kLanes <= count; offset += kLanes) body(offset, Constant<1>{}, kLanes);
  }
  if (offset < count) body(offset, Constant<1>{}, static_cast<int>(count - offset));
}
template <typename V, typename Element>
inline V load_lanes(const Element* p, int lanes) {
  return lanes == V::kLanes ? load(p) : load_first(p, lanes);
}
template <typename Element, typename V>
inline void store_lanes(Element* p, V value, int lanes) {
  if (lanes == V::kLanes) {
    store(p, value);
  } else {
    store_first(p, value, lanes);
  }
}

// kCount vectors, of which the last may be partial.
template <int kCount, typename V, typename Element>
inline Several<V, kCount> load_several(const Element* p, int lanes) {
  return each<kCount>([&](int i) { return load_lanes<V>(p + i * V::kLanes, lanes); });
}
template <int kCount, typename V, typename Element>
inline void store_several(Element* p, const Several<V, kCount>& values, int lanes) {
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) store_lanes(p + i * V::kLanes, values.part[i], lanes);
}

template <typename V, int kCount, typename Element>
inline void stream_several(Element* p, const Several<V, kCount>& values) {
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) stream(p + i * V::kLanes, values.part[i]);
}

// The latest rows of a block's conv channels, with R pixels of halo on each side.
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

// A block's geometry, the same for both directions.
template <typename V>
struct Geometry {
  const GatedDwconvShape& shape;
  const Block& block;
  std::int64_t R = shape.K / 2, width = block.w1 - block.w0;
  std::int64_t channels = block.conv1 - block.conv0, vectors = (channels + V::kLanes - 1) / V::kLanes;
  std::int64_t first_vector = block.conv0 / V::kLanes;
  std::int64_t gate = shape.D - shape.C + block.conv0, conv = shape.D + gate;  // of u's channels
  std::int64_t halo0 = block.w0 > R ? block.w0 - R : 0;                        // columns inside the image
  std::int64_t halo1 = block.w1 + R < shape.W ? block.w1 + R : shape.W;
  std::int64_t ring_column0 = halo0 - (block.w0 - R);

  Ring<V> ring(typename V::Scalar* data, std::int64_t rows) const { return {data, width + shape.K - 1, rows}; }
  void clear_outside(const Ring<V>& ring) const {
    ring.clear_outside(vectors, ring_column0, ring_column0 + halo1 - halo0);
  }
  // The first row that the filter covers at h, and the row after the last.
  std::int64_t row_begin(std::int64_t h) const { return h > R ? h - R : 0; }
  std::int64_t row_end(std::int64_t h) const { return h + R + 1 < shape.H ? h + R + 1 : shape.H; }
};

// The rows of `ring` under the filter centred at h, or at h and h + 1 where `outputs` is 2; `transposed` turns the
// filter by 180 degrees. x has room for K + outputs - 1 rows.
template <typename V>
inline void select_rows(const Geometry<V>& geometry, const Ring<V>& ring, std::int64_t vector, std::int64_t h,
                        int outputs, const void* packed_weight, bool transposed, const typename V::Scalar** x,
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
  rows->weight = transposed ? weight + (taps - 1) * V::kLanes : weight;
  rows->tap_step = transposed ? -V::kLanes : V::kLanes;
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
// For filters that pairs_of_rows().
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
