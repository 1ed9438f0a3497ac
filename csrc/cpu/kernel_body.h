// The fused op over one task, written once for every instruction set. Needs a vec_*.h, activations.h and conv_rows.h
// before it, and `VecOf<Element>`.
//
// A task walks down the rows of its block. It keeps the K rows of conv channels that the filter covers as a ring of
// accumulators, [vector][K][width + K - 1][lanes]: converted once, contiguous per channel vector, zero outside the
// image; so the ring stays in L2, and the row under the filter in L1.
#pragma once

#include "kernels.h"

namespace mambaout_kernels::cpu {
namespace {

constexpr int kMaxFilter = 31;

template <typename Element>
inline const Element* pixel(const NhwcView& view, std::int64_t n, std::int64_t h, std::int64_t w) {
  return static_cast<const Element*>(view.data) + n * view.stride_n + h * view.stride_h + w * view.stride_w;
}

// Fetches `count` channels into L2. The pixels of a row lie up to pages apart, where no hardware prefetcher follows.
template <typename Element>  // always inlined: GCC drops calls of functions that do nothing but prefetch
[[gnu::always_inline]] inline void prefetch(const Element* p, std::int64_t count) {
  for (std::int64_t c = 0; c < count; c += 64 / static_cast<std::int64_t>(sizeof(Element))) {
    __builtin_prefetch(p + c, 0, 2);
  }
}

// A part of the pixels [w0, w1) of row h.
template <typename Element>
[[gnu::always_inline]] inline void prefetch_row(const NhwcView& view, std::int64_t n, std::int64_t h, std::int64_t w0,
                                                std::int64_t w1, std::int64_t channel0, std::int64_t channel1,
                                                std::int64_t part, std::int64_t parts) {
  const std::int64_t end = w0 + (w1 - w0) * (part + 1) / parts;
  for (std::int64_t w = w0 + (w1 - w0) * part / parts; w < end; ++w) {
    prefetch(pixel<Element>(view, n, h, w) + channel0, channel1 - channel0);
  }
}

// Calls body(offset, lanes_in_use) for count channels, a vector at a time; the last may be partial.
template <int kLanes, typename Body>
inline void for_each_vector(std::int64_t count, Body body) {
  std::int64_t offset = 0;
  for (; offset + kLanes <= count; offset += kLanes) body(offset, kLanes);
  if (offset < count) body(offset, static_cast<int>(count - offset));
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

// K rows of a block's conv channels, with R pixels of halo on each side.
template <typename V>
struct Ring {
  using Scalar = typename V::Scalar;
  Scalar* data;
  std::int64_t padded_width;  // width + K - 1
  int K;

  Scalar* row(std::int64_t vector, std::int64_t h) const {
    return data + (vector * K + h % K) * padded_width * V::kLanes;
  }
  // Columns [0, first) and [last, padded_width) lie outside the image: zero in every row.
  void clear_outside(std::int64_t vectors, std::int64_t first, std::int64_t last) const {
    const V zero = broadcast(static_cast<Scalar>(0));
    for (std::int64_t r = 0; r < vectors * K; ++r) {
      Scalar* start = data + r * padded_width * V::kLanes;
      for (std::int64_t w = 0; w < first; ++w) store(start + w * V::kLanes, zero);
      for (std::int64_t w = last; w < padded_width; ++w) store(start + w * V::kLanes, zero);
    }
  }
  std::int64_t elements(std::int64_t vectors) const { return vectors * K * padded_width * V::kLanes; }
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

  Ring<V> ring(typename V::Scalar* data) const { return {data, width + shape.K - 1, shape.K}; }
  void clear_outside(const Ring<V>& ring) const {
    ring.clear_outside(vectors, ring_column0, ring_column0 + halo1 - halo0);
  }
  // What row h will read, of the identity channels (at 0 and at `branch`) and of the gate of the conv channels ...
  template <typename Element>
  [[gnu::always_inline]] void prefetch_pointwise(const NhwcView& view, std::int64_t h, std::int64_t branch,
                                                 std::int64_t part) const {
    prefetch_row<Element>(view, block.n, h, block.w0, block.w1, block.identity0, block.identity1, part, vectors);
    if (branch != 0) {
      prefetch_row<Element>(view, block.n, h, block.w0, block.w1, branch + block.identity0, branch + block.identity1,
                            part, vectors);
    }
    prefetch_row<Element>(view, block.n, h, block.w0, block.w1, gate, gate + channels, part, vectors);
  }
  // ... and of the conv channels that start at `first`, halo included.
  template <typename Element>
  [[gnu::always_inline]] void prefetch_conv(const NhwcView& view, std::int64_t h, std::int64_t first,
                                            std::int64_t part) const {
    if (h < shape.H) prefetch_row<Element>(view, block.n, h, halo0, halo1, first, first + channels, part, vectors);
  }
  // The first row that the filter covers at h, and the row after the last.
  std::int64_t row_begin(std::int64_t h) const { return h > R ? h - R : 0; }
  std::int64_t row_end(std::int64_t h) const { return h + R + 1 < shape.H ? h + R + 1 : shape.H; }
};

// The rows of `ring` under the filter centred at h; `transposed` turns the filter by 180 degrees.
template <typename V>
inline void select_rows(const Geometry<V>& geometry, const Ring<V>& ring, std::int64_t vector, std::int64_t h,
                        const void* packed_weight, bool transposed, const typename V::Scalar** x, FilterRows<V>* rows) {
  const int K = geometry.shape.K;
  rows->x = x;
  rows->K = K;
  rows->kh0 = static_cast<int>(geometry.row_begin(h) - (h - geometry.R));
  rows->kh1 = static_cast<int>(geometry.row_end(h) - (h - geometry.R));
  for (int kh = rows->kh0; kh < rows->kh1; ++kh) x[kh] = ring.row(vector, h - geometry.R + kh);
  const std::int64_t taps = static_cast<std::int64_t>(K) * K;
  const auto* weight =
      static_cast<const typename V::Scalar*>(packed_weight) + (geometry.first_vector + vector) * taps * V::kLanes;
  rows->weight = transposed ? weight + (taps - 1) * V::kLanes : weight;
  rows->tap_step = transposed ? -V::kLanes : V::kLanes;
  rows->row_step = K * rows->tap_step;
}

template <int kTile, typename V>
inline void conv_tile_any(const FilterRows<V>& rows, std::int64_t w, V bias, typename V::Scalar* out) {
  switch (rows.K) {
    case 7: return conv_tile<7, kTile>(rows, w, bias, out);
    case 5: return conv_tile<5, kTile>(rows, w, bias, out);
    case 3: return conv_tile<3, kTile>(rows, w, bias, out);
    default: return conv_tile<0, kTile>(rows, w, bias, out);
  }
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
template <typename V>
inline void weight_gradient_row_any(const FilterRows<V>& rows, const typename V::Scalar* dy, std::int64_t width,
                                    typename V::Scalar* partial) {
  switch (rows.K) {
    case 7: return weight_gradient_row<7>(rows, dy, width, partial);
    case 5: return weight_gradient_row<5>(rows, dy, width, partial);
    case 3: return weight_gradient_row<3>(rows, dy, width, partial);
    default: return weight_gradient_row<0>(rows, dy, width, partial);
  }
}

// How the forward keeps and convolves the conv channels: in fp32.
template <typename Element>
struct Fp32Convolution {
  using V = typename VecOf<Element>::type;
  using Scalar = typename V::Scalar;

  static void fill_row(const Geometry<V>& geometry, const Ring<V>& ring, const NhwcView& u, std::int64_t h) {
    const std::int64_t step = geometry.shape.K * ring.padded_width;  // from vector to vector, over lanes
    for (std::int64_t w = geometry.halo0; w < geometry.halo1; ++w) {
      const Element* c = pixel<Element>(u, geometry.block.n, h, w) + geometry.conv;
      Scalar* to = ring.row(0, h) + (w - geometry.halo0 + geometry.ring_column0) * V::kLanes;
      for_each_vector<V::kLanes>(geometry.channels, [&](std::int64_t offset, int lanes) {
        store(to + offset * step, load_lanes<V>(c + offset, lanes));
      });
    }
  }
  template <int kTile>
  static void convolve(const Geometry<V>& geometry, const Ring<V>& ring, const void* weight, std::int64_t vector,
                       std::int64_t h, std::int64_t w, V bias, Scalar* out) {
    const Scalar* x[kMaxFilter];
    FilterRows<V> rows;
    select_rows(geometry, ring, vector, h, weight, false, x, &rows);
    conv_tile_any<kTile>(rows, w, bias, out);
  }
};

// y = act(g) * s
//
// A row is worked off in tiles along W: convolve all vectors of the tile, then gate it. While the convolution computes
// in L1, the tile's gate and identity channels and the conv channels of the row to come are on their way.
template <Act act, typename Element, typename Convolution>
void forward_block(const ForwardTask& task) {
  using V = typename VecOf<Element>::type;
  using Scalar = typename V::Scalar;
  constexpr int L = V::kLanes;
  const GatedDwconvForward& args = *task.args;
  const Block& block = task.block;
  const Geometry<V> geometry{args.shape, block};
  const std::int64_t D = args.shape.D, vectors = geometry.vectors;
  const Ring<V> ring = geometry.ring(static_cast<Scalar*>(task.window));
  Scalar* s = ring.data + ring.elements(vectors);  // [vectors][kTileW][lanes]
  geometry.clear_outside(ring);
  const Scalar* bias = static_cast<const Scalar*>(task.bias) + geometry.first_vector * L;
  const auto y_pixel = [&](std::int64_t h, std::int64_t w) {
    return static_cast<Element*>(args.y) + ((block.n * args.shape.H + h) * args.shape.W + w) * D;
  };

  std::int64_t filled = geometry.row_begin(block.h0);
  for (std::int64_t h = block.h0; h < block.h1; ++h) {
    for (; filled < geometry.row_end(h); ++filled) Convolution::fill_row(geometry, ring, args.u, filled);
    for_each_tile<V>(geometry.width, [&](auto tile, std::int64_t begin) {
      constexpr int kTile = decltype(tile)::value;
      for (std::int64_t v = 0; v < vectors; ++v) {
        Convolution::template convolve<kTile>(geometry, ring, task.weight, v, h, begin, load(bias + v * L),
                                              s + v * kTile * L);
        if (!task.prefetch) continue;
        for (std::int64_t t = kTile * v / vectors; t < kTile * (v + 1) / vectors; ++t) {
          const std::int64_t w = block.w0 + begin + t;
          const Element* u = pixel<Element>(args.u, block.n, h, w);
          prefetch(u + block.identity0, block.identity1 - block.identity0);
          prefetch(u + D + block.identity0, block.identity1 - block.identity0);
          prefetch(u + geometry.gate, geometry.channels);
          if (filled < args.shape.H) {
            prefetch(pixel<Element>(args.u, block.n, filled, w) + geometry.conv, geometry.channels);
          }
        }
      }
      for (int t = 0; t < kTile; ++t) {
        const Element* u = pixel<Element>(args.u, block.n, h, block.w0 + begin + t);
        Element* y = y_pixel(h, block.w0 + begin + t);
        for_each_vector<L>(block.identity1 - block.identity0, [&](std::int64_t offset, int lanes) {
          const std::int64_t d = block.identity0 + offset;
          const V i = load_lanes<V>(u + D + d, lanes);
          store_lanes(y + d, GateOf<act, Element>::value(load_lanes<V>(u + d, lanes)) * i, lanes);
        });
        for_each_vector<L>(geometry.channels, [&](std::int64_t offset, int lanes) {
          const V g = load_lanes<V>(u + geometry.gate + offset, lanes);
          const V value = GateOf<act, Element>::value(g) * load(s + offset * kTile + t * L);
          store_lanes(y + geometry.gate + offset, value, lanes);
        });
      }
    });
  }
}

// dg = dy * s * act'(g);  di = dy * act(g);  with e = dy * act(g) on the conv channels:
// dc = transposed dwconv(e);  dweight[kh,kw] = sum e[h,w] * c[h+kh-R,w+kw-R];  dbias = sum e
template <Act act, typename Element>
void backward_block(const BackwardTask& task) {
  using V = typename VecOf<Element>::type;
  using Scalar = typename V::Scalar;
  constexpr int L = V::kLanes;
  const GatedDwconvBackward& args = *task.args;
  const Block& block = task.block;
  const Geometry<V> geometry{args.shape, block};
  const std::int64_t D = args.shape.D, width = geometry.width, R = geometry.R, vectors = geometry.vectors;
  const std::int64_t partial_step = (static_cast<std::int64_t>(args.shape.K) * args.shape.K + 1) * L;
  const Ring<V> ring_c = geometry.ring(static_cast<Scalar*>(task.window));
  const Ring<V> ring_e = geometry.ring(ring_c.data + ring_c.elements(vectors));
  Scalar* out = ring_e.data + ring_e.elements(vectors);  // [vectors][width][lanes]: s, then dc
  geometry.clear_outside(ring_c);
  geometry.clear_outside(ring_e);
  const Scalar* bias = static_cast<const Scalar*>(task.bias) + geometry.first_vector * L;
  Scalar* partial = static_cast<Scalar*>(task.partial) + geometry.first_vector * partial_step;
  const V zero = broadcast(static_cast<Scalar>(0));
  for (std::int64_t i = 0; i < vectors * partial_step; i += L) store(partial + i, zero);

  const auto du_pixel = [&](std::int64_t h, std::int64_t w) {
    return static_cast<Element*>(args.du) + ((block.n * args.shape.H + h) * args.shape.W + w) * 2 * D;
  };
  std::int64_t filled = geometry.row_begin(block.h0);
  for (std::int64_t h = block.h0; h < block.h1; ++h) {
    for (; filled < geometry.row_end(h); ++filled) {
      for (std::int64_t w = geometry.halo0; w < geometry.halo1; ++w) {
        const Element* u = pixel<Element>(args.u, block.n, filled, w);
        const Element* dy = pixel<Element>(args.dy, block.n, filled, w);
        const std::int64_t column = (w - geometry.halo0 + geometry.ring_column0) * L;
        Scalar *to_c = ring_c.row(0, filled) + column, *to_e = ring_e.row(0, filled) + column;
        const std::int64_t step = args.shape.K * ring_c.padded_width;
        for_each_vector<L>(geometry.channels, [&](std::int64_t offset, int lanes) {
          const V g = load_lanes<V>(u + geometry.gate + offset, lanes);
          store(to_c + offset * step, load_lanes<V>(u + geometry.conv + offset, lanes));
          store(to_e + offset * step,
                load_lanes<V>(dy + geometry.gate + offset, lanes) * GateOf<act, Element>::value(g));
        });
      }
    }
    const Scalar* x[kMaxFilter];
    FilterRows<V> rows;
    for (std::int64_t v = 0; v < vectors; ++v) {
      select_rows(geometry, ring_c, v, h, task.weight, false, x, &rows);
      conv_row_any(rows, width, load(bias + v * L), out + v * width * L);
      if (task.prefetch) {
        geometry.template prefetch_pointwise<Element>(args.u, h, D, v);
        geometry.template prefetch_pointwise<Element>(args.dy, h, 0, v);
      }
      weight_gradient_row_any(rows, ring_e.row(v, h) + R * L, width, partial + v * partial_step);
    }
    for (std::int64_t w = block.w0; w < block.w1; ++w) {
      const Element* u = pixel<Element>(args.u, block.n, h, w);
      const Element* dy = pixel<Element>(args.dy, block.n, h, w);
      Element* du = du_pixel(h, w);
      for_each_vector<L>(block.identity1 - block.identity0, [&](std::int64_t offset, int lanes) {
        const std::int64_t d = block.identity0 + offset;
        const V g = load_lanes<V>(u + d, lanes), upstream = load_lanes<V>(dy + d, lanes);
        store_lanes(du + d, upstream * load_lanes<V>(u + D + d, lanes) * GateOf<act, Element>::slope(g), lanes);
        store_lanes(du + D + d, upstream * GateOf<act, Element>::value(g), lanes);
      });
      const Scalar* s = out + (w - block.w0) * L;
      for_each_vector<L>(geometry.channels, [&](std::int64_t offset, int lanes) {
        const V g = load_lanes<V>(u + geometry.gate + offset, lanes);
        const V ds = load_lanes<V>(dy + geometry.gate + offset, lanes) * load(s + offset * width);
        store_lanes(du + geometry.gate + offset, ds * GateOf<act, Element>::slope(g), lanes);
      });
    }
    for (std::int64_t v = 0; v < vectors; ++v) {
      select_rows(geometry, ring_e, v, h, task.weight, true, x, &rows);
      conv_row_any(rows, width, zero, out + v * width * L);
      if (task.prefetch) {
        geometry.template prefetch_conv<Element>(args.u, filled, geometry.conv, v);
        geometry.template prefetch_conv<Element>(args.u, filled, geometry.gate, v);
        geometry.template prefetch_conv<Element>(args.dy, filled, geometry.gate, v);
      }
    }
    for (std::int64_t w = block.w0; w < block.w1; ++w) {
      Element* dc = du_pixel(h, w) + geometry.conv;
      const Scalar* from = out + (w - block.w0) * L;
      for_each_vector<L>(geometry.channels, [&](std::int64_t offset, int lanes) {
        store_lanes(dc + offset, load(from + offset * width), lanes);
      });
    }
  }
}

template <typename Element, typename Convolution>
void forward_any(const ForwardTask& task) {
  switch (task.args->shape.act) {
    case Act::kGelu: return forward_block<Act::kGelu, Element, Convolution>(task);
    case Act::kGeluTanh: return forward_block<Act::kGeluTanh, Element, Convolution>(task);
    case Act::kSilu: return forward_block<Act::kSilu, Element, Convolution>(task);
    case Act::kIdentity: return forward_block<Act::kIdentity, Element, Convolution>(task);
  }
}
template <typename Element>
void backward_any(const BackwardTask& task) {
  switch (task.args->shape.act) {
    case Act::kGelu: return backward_block<Act::kGelu, Element>(task);
    case Act::kGeluTanh: return backward_block<Act::kGeluTanh, Element>(task);
    case Act::kSilu: return backward_block<Act::kSilu, Element>(task);
    case Act::kIdentity: return backward_block<Act::kIdentity, Element>(task);
  }
}

template <typename Element>
constexpr Kernels kernels_for() {
  using V = typename VecOf<Element>::type;
  return {V::kLanes, sizeof(typename V::Scalar), forward_any<Element, Fp32Convolution<Element>>, nullptr,
          backward_any<Element>};
}

}  // namespace
}  // namespace mambaout_kernels::cpu
