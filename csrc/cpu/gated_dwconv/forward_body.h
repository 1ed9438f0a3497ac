// The forward over one task. Needs body.h before it.
#pragma once

#include "kernels.h"

namespace mambaout_kernels::cpu {
namespace {

// Prefetches what a tile will read into L2, a few lines at each call, so that prefetches do not delay the loads of the
// convolution: the pointwise channels of its rows, and the conv channels of the rows that come next into the ring. The
// pixels of a row lie up to pages apart, where no hardware prefetcher follows.
class TileFetch {
 public:
  struct Span {
    std::int64_t offset, bytes;  // of a pixel
  };

  TileFetch(const NhwcView& view, int element_bytes, std::int64_t n)
      : data_(static_cast<const char*>(view.data) + n * view.stride_n * element_bytes),
        stride_h_(view.stride_h * element_bytes),
        stride_w_(view.stride_w * element_bytes),
        element_bytes_(element_bytes) {}

  void add_pointwise(std::int64_t channel, std::int64_t count) {
    if (count > 0) pointwise_[pointwise_count_++] = {channel * element_bytes_, count * element_bytes_};
  }
  void set_conv(std::int64_t channel, std::int64_t count) {
    conv_ = {channel * element_bytes_, count * element_bytes_};
  }

  // Pixels [w0, w1) of rows [h0, h1), and of rows [next0, next1) their conv channels, in about `calls` calls.
  void begin(std::int64_t w0, std::int64_t w1, std::int64_t h0, std::int64_t h1, std::int64_t next0, std::int64_t next1,
             std::int64_t calls) {
    w0_ = w0, w1_ = w1, h_ = h0, h1_ = h1, next0_ = next0, next1_ = next1, w_ = w0, span_ = 0;
    at_ = end_ = nullptr;
    std::int64_t lines = (conv_.bytes / kLineBytes + 1) * (next1 > next0 ? next1 - next0 : 0);
    for (int i = 0; i < pointwise_count_; ++i) lines += (pointwise_[i].bytes / kLineBytes + 1) * (h1 - h0);
    lines_ = static_cast<int>(lines * (w1 - w0) / (calls > 0 ? calls : 1)) + 1;
  }
  void nothing() { lines_ = 0; }

  // Always inlined: GCC drops calls of functions that do nothing but prefetch.
  [[gnu::always_inline]] void operator()() {
    for (std::int64_t left = lines_ * kLineBytes; left > 0;) {
      if (at_ >= end_ && !next_span()) return;
      const char* const stop = at_ + min(left, end_ - at_);
      left -= stop - at_;
      const char* at = at_;
      for (; at < stop; at += kLineBytes) __builtin_prefetch(at, 0, 2);
      at_ = at;
    }
  }

 private:
  static constexpr std::int64_t kLineBytes = 64;

  [[gnu::noinline]] bool next_span() {
    for (;;) {
      const bool pointwise = h_ < h1_;
      if (span_ == (pointwise ? pointwise_count_ : 1)) {
        span_ = 0;
        if (++w_ == w1_) {
          w_ = w0_;
          ++h_;
        }
        continue;
      }
      const std::int64_t row = pointwise ? h_ : next0_ + (h_ - h1_);
      if (!pointwise && row >= next1_) {
        lines_ = 0;
        return false;
      }
      const Span span = pointwise ? pointwise_[span_] : conv_;
      ++span_;
      at_ = data_ + row * stride_h_ + w_ * stride_w_ + span.offset;
      end_ = at_ + span.bytes;
      return true;
    }
  }

  const char* data_;
  std::int64_t stride_h_, stride_w_;
  int element_bytes_, pointwise_count_ = 0, span_ = 0, lines_ = 0;
  Span pointwise_[3], conv_{0, 0};
  std::int64_t w0_ = 0, w1_ = 0, h_ = 0, h1_ = 0, next0_ = 0, next1_ = 0, w_ = 0;
  const char *at_ = nullptr, *end_ = nullptr;
};

// How the forward keeps and convolves the conv channels: in fp32.
template <typename Element>
struct Fp32Convolution {
  using V = typename VecOf<Element>::type;
  using Scalar = typename V::Scalar;

  static void fill_row(const Geometry<V>& geometry, const Ring<V>& ring, const NhwcView& u, std::int64_t h) {
    const std::int64_t step = ring.elements(1);  // from vector to vector
    Scalar* to = ring.row(0, h) + geometry.ring_column0 * V::kLanes;
    for (std::int64_t w = geometry.halo0; w < geometry.halo1; ++w, to += V::kLanes) {
      const Element* c = pixel<Element>(u, geometry.tile.n, h, w) + geometry.conv;
      Scalar* at = to;
      for_each_vector<V::kLanes>(geometry.channels, [&](std::int64_t offset, int lanes) {
        store(at, load_lanes<V>(c + offset, lanes));
        at += step;
      });
    }
  }
  static bool pairs(int K) { return pairs_of_rows<V>(K); }
  // kOutputs rows of outputs, from h on: out [kOutputs][kTile][lanes]
  template <int kOutputs, int kTile, typename Fetch>
  static void convolve(const Geometry<V>& geometry, const Ring<V>& ring, const void* weight, std::int64_t vector,
                       std::int64_t h, std::int64_t w, V bias, Scalar* out, Fetch& fetch) {
    const Scalar* x[kMaxKernelSize + 1];
    FilterRows<V> rows;
    select_rows(geometry, ring, vector, h, kOutputs, weight, false, x, &rows);
    if constexpr (kOutputs == 2) {
      conv_tile_pair_any<kTile>(rows, w, bias, out, fetch);
    } else {
      conv_tile_any<kTile>(rows, w, bias, out, fetch);
    }
  }
};

// y = act(g) * s
//
// A chunk of rows is computed in tiles along W: convolve all vectors of the tile, then apply the gate. The part of the
// ring under a tile is read into L1 once for all rows of the chunk. Meanwhile the tile's gate and identity channels and
// the conv channels of the next chunk are prefetched.
template <Act act, typename Element, typename Convolution>
void forward_tile(const ForwardTask& task) {
  using V = typename VecOf<Element>::type;
  using Scalar = typename V::Scalar;
  constexpr int L = V::kLanes, kMostTile = V::kPairW > 0 ? V::kPairW : V::kTileW;
  const GatedDwconvForward& args = *task.args;
  const Tile& tile = task.tile;
  const Geometry<V> geometry{args.shape, tile};
  const std::int64_t D = args.shape.D, vectors = geometry.vectors;
  const Ring<V> ring = geometry.ring(static_cast<Scalar*>(task.scratch), args.shape.K + kForwardRows - 1);
  Scalar* s = ring.data + ring.elements(vectors);  // [vectors][rows][tile][lanes]
  if (!task.cleared) geometry.clear_outside(ring);
  const Scalar* bias = static_cast<const Scalar*>(task.bias) + geometry.first_vector * L;
  TileFetch fetch(args.u, sizeof(Element), tile.n);
  fetch.add_pointwise(tile.identity0, tile.identity1 - tile.identity0);
  fetch.add_pointwise(D + tile.identity0, tile.identity1 - tile.identity0);
  fetch.add_pointwise(geometry.gate, geometry.channels);
  fetch.set_conv(geometry.conv, geometry.channels);

  // Full cache lines of an output larger than the caches are stored past them, without being read first.
  const bool past_caches = task.streaming && reinterpret_cast<std::uintptr_t>(args.y) % 64 == 0 &&
                           D % (64 / static_cast<std::int64_t>(sizeof(Element))) == 0 && tile.identity0 % L == 0 &&
                           geometry.gate % L == 0;
  const auto put = [&](Element* y, const auto& values, int lanes) {
    if (past_caches && lanes == L) {
      stream_array(y, values);
    } else {
      store_array(y, values, lanes);
    }
  };

  std::int64_t filled = geometry.row_begin(tile.h0);
  for (std::int64_t h = tile.h0; h < tile.h1; h += kForwardRows) {
    const std::int64_t rows = min(kForwardRows, tile.h1 - h);
    for (; filled < geometry.row_end(h + rows - 1); ++filled) Convolution::fill_row(geometry, ring, args.u, filled);
    const std::int64_t next_end = geometry.row_end(min(h + rows + kForwardRows, tile.h1) - 1);
    for_each_tile<kMostTile>(geometry.width, [&](auto columns, std::int64_t begin) {
      constexpr int kTile = decltype(columns)::value;
      if (task.streaming) {
        const std::int64_t w = tile.w0 + begin;
        fetch.begin(w, w + kTile, h, h + rows, filled, next_end, vectors * ((rows + 1) / 2) * (args.shape.K - 1));
      }
      for (std::int64_t v = 0; v < vectors; ++v) {
        Scalar* to = s + v * rows * kTile * L;
        std::int64_t r = 0;
        if constexpr (V::kPairW > 0) {
          if (Convolution::pairs(args.shape.K)) {
            for (; r + 2 <= rows; r += 2, to += 2 * kTile * L) {
              Convolution::template convolve<2, kTile>(geometry, ring, task.weight, v, h + r, begin, load(bias + v * L),
                                                       to, fetch);
            }
          }
        }
        for (; r < rows; ++r, to += kTile * L) {
          Convolution::template convolve<1, kTile>(geometry, ring, task.weight, v, h + r, begin, load(bias + v * L), to,
                                                   fetch);
        }
      }
      for (std::int64_t r = 0; r < rows; ++r) {
        for (int t = 0; t < kTile; ++t) {
          const std::int64_t w = tile.w0 + begin + t;
          const Element* u = pixel<Element>(args.u, tile.n, h + r, w);
          Element* y = static_cast<Element*>(args.y) + ((tile.n * args.shape.H + h + r) * args.shape.W + w) * D;
          for_each_vectors<V>(tile.identity1 - tile.identity0, [&](std::int64_t offset, auto count, int lanes) {
            constexpr int kCount = decltype(count)::value;
            const std::int64_t d = tile.identity0 + offset;
            const auto i = load_array<kCount, V>(u + D + d, lanes);
            put(y + d, GateOf<act, Element>::value(load_array<kCount, V>(u + d, lanes)) * i, lanes);
          });
          const Scalar* from = s + (r * kTile + t) * L;
          for_each_vectors<V>(geometry.channels, [&](std::int64_t offset, auto count, int lanes) {
            constexpr int kCount = decltype(count)::value;
            const auto g = load_array<kCount, V>(u + geometry.gate + offset, lanes);
            const auto x = map<kCount>([&](int i) { return load(from + (offset + i * L) * rows * kTile); });
            put(y + geometry.gate + offset, GateOf<act, Element>::value(g) * x, lanes);
          });
        }
      }
    });
  }
}

template <typename Element, typename Convolution>
void forward_any(const ForwardTask& task) {
  switch (task.args->shape.act) {
    case Act::kGelu: return forward_tile<Act::kGelu, Element, Convolution>(task);
    case Act::kGeluTanh: return forward_tile<Act::kGeluTanh, Element, Convolution>(task);
    case Act::kSilu: return forward_tile<Act::kSilu, Element, Convolution>(task);
    case Act::kIdentity: return forward_tile<Act::kIdentity, Element, Convolution>(task);
  }
}

}  // namespace
}  // namespace mambaout_kernels::cpu
