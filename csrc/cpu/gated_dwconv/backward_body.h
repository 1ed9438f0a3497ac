// The backward over one task. Needs body.h and forward_body.h before it.
#pragma once

#include "kernels.h"

namespace mambaout_kernels::cpu {
namespace {

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

// The pointwise channels that row h will read: those of the identity branch (at 0 and at `branch`) and the gate of the
// conv channels.
template <typename Element, typename V>
[[gnu::always_inline]] inline void prefetch_pointwise(const Geometry<V>& geometry, const NhwcView& view, std::int64_t h,
                                                      std::int64_t branch, std::int64_t part) {
  const Tile& tile = geometry.tile;
  prefetch_row<Element>(view, tile.n, h, tile.w0, tile.w1, tile.identity0, tile.identity1, part, geometry.vectors);
  if (branch != 0) {
    prefetch_row<Element>(view, tile.n, h, tile.w0, tile.w1, branch + tile.identity0, branch + tile.identity1, part,
                          geometry.vectors);
  }
  prefetch_row<Element>(view, tile.n, h, tile.w0, tile.w1, geometry.gate, geometry.gate + geometry.channels, part,
                        geometry.vectors);
}
// The conv channels of row h that start at `first`, halo included.
template <typename Element, typename V>
[[gnu::always_inline]] inline void prefetch_conv(const Geometry<V>& geometry, const NhwcView& view, std::int64_t h,
                                                 std::int64_t first, std::int64_t part) {
  if (h < geometry.shape.H)
    prefetch_row<Element>(view, geometry.tile.n, h, geometry.halo0, geometry.halo1, first, first + geometry.channels,
                          part, geometry.vectors);
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

// dg = dy * s * act'(g);  di = dy * act(g);  with e = dy * act(g) on the conv channels:
// dc = dwconv(e) with the flipped filter;  dweight[kh,kw] = sum e[h,w] * c[h+kh-R,w+kw-R];  dbias = sum e
template <Act act, typename Element>
void backward_tile(const BackwardTask& task) {
  using V = typename VecOf<Element>::type;
  using Scalar = typename V::Scalar;
  constexpr int L = V::kLanes;
  const GatedDwconvBackward& args = *task.args;
  const Tile& tile = task.tile;
  const Geometry<V> geometry{args.shape, tile};
  const std::int64_t D = args.shape.D, width = geometry.width, R = geometry.R, vectors = geometry.vectors;
  const std::int64_t partial_step = (static_cast<std::int64_t>(args.shape.K) * args.shape.K + 1) * L;
  const Ring<V> ring_c = geometry.ring(static_cast<Scalar*>(task.scratch), args.shape.K);
  const Ring<V> ring_e = geometry.ring(ring_c.data + ring_c.elements(vectors), args.shape.K);
  Scalar* out = ring_e.data + ring_e.elements(vectors);  // [vectors][width][lanes]: s, then dc
  geometry.clear_outside(ring_c);
  geometry.clear_outside(ring_e);
  const Scalar* bias = static_cast<const Scalar*>(task.bias) + geometry.first_vector * L;
  Scalar* partial = static_cast<Scalar*>(task.partial) + geometry.first_vector * partial_step;
  const V zero = broadcast(static_cast<Scalar>(0));
  for (std::int64_t i = 0; i < vectors * partial_step; i += L) store(partial + i, zero);

  const auto du_pixel = [&](std::int64_t h, std::int64_t w) {
    return static_cast<Element*>(args.du) + ((tile.n * args.shape.H + h) * args.shape.W + w) * 2 * D;
  };
  std::int64_t filled = geometry.row_begin(tile.h0);
  for (std::int64_t h = tile.h0; h < tile.h1; ++h) {
    for (; filled < geometry.row_end(h); ++filled) {
      for (std::int64_t w = geometry.halo0; w < geometry.halo1; ++w) {
        const Element* u = pixel<Element>(args.u, tile.n, filled, w);
        const Element* dy = pixel<Element>(args.dy, tile.n, filled, w);
        const std::int64_t column = (w - geometry.halo0 + geometry.ring_column0) * L;
        Scalar *to_c = ring_c.row(0, filled) + column, *to_e = ring_e.row(0, filled) + column;
        const std::int64_t step = args.shape.K * ring_c.padded_width;  // from vector to vector, over lanes
        for_each_vector<L>(geometry.channels, [&](std::int64_t offset, int lanes) {
          const V g = load_lanes<V>(u + geometry.gate + offset, lanes);
          store(to_c + offset * step, load_lanes<V>(u + geometry.conv + offset, lanes));
          store(to_e + offset * step,
                load_lanes<V>(dy + geometry.gate + offset, lanes) * GateOf<act, Element>::value(g));
        });
      }
    }
    const Scalar* x[kMaxKernelSize];
    FilterRows<V> rows;
    for (std::int64_t v = 0; v < vectors; ++v) {
      select_rows(geometry, ring_c, v, h, 1, task.weight, false, x, &rows);
      conv_row_any(rows, width, load(bias + v * L), out + v * width * L);
      if (task.prefetch) {
        prefetch_pointwise<Element>(geometry, args.u, h, D, v);
        prefetch_pointwise<Element>(geometry, args.dy, h, 0, v);
      }
      weight_gradient_row_any(rows, ring_e.row(v, h) + R * L, width, partial + v * partial_step);
    }
    for (std::int64_t w = tile.w0; w < tile.w1; ++w) {
      const Element* u = pixel<Element>(args.u, tile.n, h, w);
      const Element* dy = pixel<Element>(args.dy, tile.n, h, w);
      Element* du = du_pixel(h, w);
      for_each_vector<L>(tile.identity1 - tile.identity0, [&](std::int64_t offset, int lanes) {
        const std::int64_t d = tile.identity0 + offset;
        const V g = load_lanes<V>(u + d, lanes), upstream = load_lanes<V>(dy + d, lanes);
        store_lanes(du + d, upstream * load_lanes<V>(u + D + d, lanes) * GateOf<act, Element>::slope(g), lanes);
        store_lanes(du + D + d, upstream * GateOf<act, Element>::value(g), lanes);
      });
      const Scalar* s = out + (w - tile.w0) * L;
      for_each_vector<L>(geometry.channels, [&](std::int64_t offset, int lanes) {
        const V g = load_lanes<V>(u + geometry.gate + offset, lanes);
        const V ds = load_lanes<V>(dy + geometry.gate + offset, lanes) * load(s + offset * width);
        store_lanes(du + geometry.gate + offset, ds * GateOf<act, Element>::slope(g), lanes);
      });
    }
    for (std::int64_t v = 0; v < vectors; ++v) {
      select_rows(geometry, ring_e, v, h, 1, task.weight, true, x, &rows);
      conv_row_any(rows, width, zero, out + v * width * L);
      if (task.prefetch) {
        prefetch_conv<Element>(geometry, args.u, filled, geometry.conv, v);
        prefetch_conv<Element>(geometry, args.u, filled, geometry.gate, v);
        prefetch_conv<Element>(geometry, args.dy, filled, geometry.gate, v);
      }
    }
    for (std::int64_t w = tile.w0; w < tile.w1; ++w) {
      Element* dc = du_pixel(h, w) + geometry.conv;
      const Scalar* from = out + (w - tile.w0) * L;
      for_each_vector<L>(geometry.channels, [&](std::int64_t offset, int lanes) {
        store_lanes(dc + offset, load(from + offset * width), lanes);
      });
    }
  }
}

template <typename Element>
void backward_any(const BackwardTask& task) {
  switch (task.args->shape.act) {
    case Act::kGelu: return backward_tile<Act::kGelu, Element>(task);
    case Act::kGeluTanh: return backward_tile<Act::kGeluTanh, Element>(task);
    case Act::kSilu: return backward_tile<Act::kSilu, Element>(task);
    case Act::kIdentity: return backward_tile<Act::kIdentity, Element>(task);
  }
}

template <typename Element>
constexpr GatedDwconvKernels kernels_for() {
  using V = typename VecOf<Element>::type;
  return {V::kLanes, sizeof(typename V::Scalar), forward_any<Element, Fp32Convolution<Element>>, nullptr,
          backward_any<Element>};
}

}  // namespace
}  // namespace mambaout_kernels::cpu
