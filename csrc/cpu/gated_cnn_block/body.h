// The whole block over one task, written once for every instruction set. Needs gated_dwconv/body.h, layer_norm.h and a
// micro-kernel of gemm/ before it.
//
// A task walks down the rows of its tile, a chunk of about a hundred pixels at a time, which stays in L2. It normalizes
// the new rows and multiplies them by fc1's conv columns into a ring of rows, each row once although the filter reads
// it K times. Then it goes through fc1's other columns a panel at a time, applies the gate, and multiplies the gated
// chunk by fc2. The 2 * hidden channels of u are never written to memory.
#pragma once

#include "kernels.h"

namespace mambaout_kernels::cpu {
namespace {

template <Act act, typename Io, typename Gemm>
class BlockRunner {
  using Element = typename Gemm::Element;
  using Left = typename Gemm::Left;
  static constexpr int L = Vec::kLanes, kNr = 2 * L, kMr = Gemm::kMr;

 public:
  explicit BlockRunner(const BlockTask& task)
      : task_(task),
        call_(*task.call),
        shape_(task.call->shape),
        at_(*task.at),
        width_(task.w1 - task.w0),
        R_(shape_.K / 2),
        halo0_(task.w0 > R_ ? task.w0 - R_ : 0),
        halo1_(task.w1 + R_ < call_.W ? task.w1 + R_ : call_.W),
        identity_(panel_range(task, at_.identity)),
        conv_(panel_range(task, at_.conv)),
        out_(panel_range(task, at_.dim)),
        scratch_(block_scratch(at_, shape_, Gemm::kFormat, width_, task.chunk_rows, conv_.end - conv_.begin)),
        normed_(LeftFactor<Left>::at(part<void>(scratch_.normed), scratch_.normed_plane)),
        ring_(part<float>(scratch_.ring)),
        y_(LeftFactor<Left>::at(part<void>(scratch_.y), scratch_.y_plane)),
        s_(part<float>(scratch_.s)),
        tiles_(part<float>(scratch_.tiles)) {}

  void run() {
    if (task_.step == BlockStep::kHalo) return share_rows();
    if (task_.step != BlockStep::kProject) return gate();
    for (std::int64_t h = task_.h0; h < task_.h1; h += task_.chunk_rows) {
      take_y(h);
      multiply_fc2(h, min(h + task_.chunk_rows, task_.h1));
    }
  }

 private:
  void gate() {
    clear_ring();
    // The rows above the tile that its filter covers.
    std::int64_t first = task_.h0 > R_ ? task_.h0 - R_ : 0;
    if (shape_.C > 0 && first < task_.h0) {
      if (task_.above == nullptr) norm_rows(first, task_.h0, 0);
      fill_ring(first, task_.h0, 0);
    }
    std::int64_t ready = task_.h0;  // rows before it are normalized, and in the ring
    for (std::int64_t h = task_.h0; h < task_.h1; h += task_.chunk_rows) {
      const std::int64_t end = min(h + task_.chunk_rows, task_.h1);
      const std::int64_t wanted = shape_.C > 0 ? min(end + R_, call_.H) : end;
      const std::int64_t row = halo_width() * scratch_.lda1;
      if (h > task_.h0 && ready > h) {  // normed_ held rows from h - chunk_rows on
        move(normed_, normed_ + task_.chunk_rows * row, (ready - h) * row);
      }
      if (ready < h) ready = h;
      if (ready < wanted) {
        norm_rows(ready, task_.below == nullptr ? wanted : min(wanted, task_.h1), ready - h);
        if (shape_.C > 0) fill_ring(ready, wanted, ready - h);
        ready = wanted;
      }
      take_y(h);
      gate_identity(end - h);
      gate_conv(h, end);
      if (task_.step == BlockStep::kAll) multiply_fc2(h, end);
    }
  }

  // c of the rows that a neighbour's filter covers, to the memory that both share.
  void share_rows() const {
    const auto share = [&](std::int64_t h0, std::int64_t h1, float* rows, std::int64_t first) {
      norm_rows(h0, h1, 0);
      multiply_conv(h0, h1, 0, [&](std::int64_t v, std::int64_t h) { return shared_row(rows, v, h - first); });
    };
    if (task_.above != nullptr) share(task_.h0, task_.h0 + R_, task_.above, task_.h0 - R_);
    if (task_.below != nullptr) share(task_.h1 - R_, task_.h1, task_.below, task_.h1 - R_);
  }

  float* shared_row(float* rows, std::int64_t vector, std::int64_t row) const {
    return rows + (vector * 2 * R_ + row) * halo_width() * L;
  }
  // Row h of c where it is shared, else null.
  const float* shared(std::int64_t vector, std::int64_t h) const {
    if (task_.above != nullptr && h < task_.h0 + R_) return shared_row(task_.above, vector, h - (task_.h0 - R_));
    if (task_.below != nullptr && h >= task_.h1 - R_) return shared_row(task_.below, vector, h - (task_.h1 - R_));
    return nullptr;
  }

  // Where a chunk's y is: in the task's scratch memory, or in y of the whole image.
  void take_y(std::int64_t h) {
    if (task_.y != nullptr) y_ = LeftFactor<Left>::at(task_.y, task_.y_plane) + h * call_.W * scratch_.lda2;
  }

  template <typename T>
  T* part(std::int64_t offset) const {
    return reinterpret_cast<T*>(static_cast<char*>(task_.scratch) + offset);
  }
  template <typename T>
  const T* packed(std::int64_t offset) const {
    return reinterpret_cast<const T*>(static_cast<const char*>(call_.packed) + offset);
  }
  std::int64_t halo_width() const { return halo1_ - halo0_; }
  float* ring_row(std::int64_t vector, std::int64_t h) const {
    return ring_ +
           ((vector - conv_.begin / L) * scratch_.ring_rows + h % scratch_.ring_rows) * scratch_.padded_width * L;
  }

  // The share of `bytes` at `begin` that the tile at pixel p of `pixels` prefetches.
  static Prefetch prefetch_share(const char* begin, std::int64_t bytes, std::int64_t depth, std::int64_t p,
                                 std::int64_t pixels) {
    const std::int64_t tiles = (pixels + kMr - 1) / kMr, steps = depth / Gemm::kFormat.step;
    const std::int64_t step = bytes / steps / tiles + 1;
    return {begin + p / kMr * steps * step, step};
  }

  // Columns outside the image are zero in every row.
  void clear_ring() const {
    const std::int64_t first = halo0_ - (task_.w0 - R_), last = first + halo_width();
    for (std::int64_t r = 0; r < (conv_.end - conv_.begin) / L * scratch_.ring_rows; ++r) {
      float* row = ring_ + r * scratch_.padded_width * L;
      __builtin_memset(row, 0, sizeof(float) * first * L);
      __builtin_memset(row + last * L, 0, sizeof(float) * (scratch_.padded_width - last) * L);
    }
  }

  // Rows [h0, h1) of the image to rows `at` and on of normed_.
  void norm_rows(std::int64_t h0, std::int64_t h1, std::int64_t at) const {
    Left to = normed_ + at * halo_width() * scratch_.lda1;
    for (std::int64_t h = h0; h < h1; ++h) {
      const Io* from = pixel<Io>(call_.x, task_.n, h, halo0_);
      for_each_unrolled(halo_width(), [&](auto count, std::int64_t w) {
        norm_pixels<decltype(count)::value>(from + w * call_.x.stride_w, call_.x.stride_w, shape_.dim, at_.depth1,
                                            shape_.eps, packed<float>(at_.norm_weight), packed<float>(at_.norm_bias),
                                            to + w * scratch_.lda1, scratch_.lda1);
      });
      to = to + halo_width() * scratch_.lda1;
    }
  }

  // c of rows [h0, h1) to the ring; what is not shared is computed from rows `at` and on of normed_.
  void fill_ring(std::int64_t h0, std::int64_t h1, std::int64_t at) const {
    const std::int64_t offset = halo0_ - (task_.w0 - R_);
    const auto to = [&](std::int64_t vector, std::int64_t h) { return ring_row(vector, h) + offset * L; };
    for (std::int64_t h = h0; h < h1;) {
      for (; h < h1 && shared(0, h) != nullptr; ++h) {
        for (std::int64_t v = conv_.begin / L; v < conv_.end / L; ++v) {
          __builtin_memcpy(to(v, h), shared(v, h), sizeof(float) * halo_width() * L);
        }
      }
      const std::int64_t first = h;
      while (h < h1 && shared(0, h) == nullptr) ++h;
      if (first < h) multiply_conv(first, h, at + first - h0, to);
    }
  }

  // c = fc1's conv columns on rows [h0, h1), which are rows `at` and on of normed_; to(vector, h) is where a row of c
  // goes.
  template <typename To>
  void multiply_conv(std::int64_t h0, std::int64_t h1, std::int64_t at, const To& to) const {
    const std::int64_t pixels = (h1 - h0) * halo_width();
    const Left a = normed_ + at * halo_width() * scratch_.lda1;
    for (std::int64_t v = conv_.begin / L; v < conv_.end / L; v += 2) {
      const char* panel = packed<char>(at_.conv_panels) + v / 2 * at_.panel1;
      const float* bias = packed<float>(at_.conv_bias1) + v * L;
      const Vec bias0 = load(bias), bias1 = load(bias + L);
      Gemm::for_each_tile(pixels, [&](auto rows, std::int64_t p) {
        Gemm::template tile<false>(rows, a + p * scratch_.lda1, scratch_.lda1, panel, at_.depth1, tiles_,
                                   prefetch_share(panel + at_.panel1, at_.panel1, at_.depth1, p, pixels));
        std::int64_t h = h0 + p / halo_width(), w = p % halo_width();
        for (int r = 0; r < rows; ++r) {
          store(to(v, h) + w * L, load(tiles_ + r * kNr) + bias0);
          store(to(v + 1, h) + w * L, load(tiles_ + r * kNr + L) + bias1);
          if (++w == halo_width()) w = 0, ++h;
        }
      });
    }
  }

  // Calls body(rows, a, p) for tiles of the chunk's pixels: `a` their normalized values, p their index.
  template <typename Body>
  void for_each_tile_of_chunk(std::int64_t rows, const Body& body) const {
    const auto segment = [&](Left a, std::int64_t first, std::int64_t pixels) {
      Gemm::for_each_tile(pixels, [&](auto tile, std::int64_t p) { body(tile, a + p * scratch_.lda1, first + p); });
    };
    if (halo_width() == width_) {
      segment(normed_, 0, rows * width_);
      return;
    }
    for (std::int64_t r = 0; r < rows; ++r) {
      segment(normed_ + (r * halo_width() + task_.w0 - halo0_) * scratch_.lda1, r * width_, width_);
    }
  }

  // y = act(g) * i
  void gate_identity(std::int64_t rows) const {
    for (std::int64_t d = identity_.begin; d < identity_.end; d += kNr) {
      const char* panels = packed<char>(at_.identity_panels) + d / kNr * 2 * at_.panel1;
      const float *gate_bias = packed<float>(at_.identity_gate_bias) + d, *bias = packed<float>(at_.identity_bias) + d;
      for_each_tile_of_chunk(rows, [&](auto tile, Left a, std::int64_t p) {
        float *g = tiles_, *i = tiles_ + kMaxMr * kNr;
        const Prefetch prefetch = prefetch_share(panels + 2 * at_.panel1, at_.panel1, at_.depth1, p, rows * width_);
        Gemm::template tile<false>(tile, a, scratch_.lda1, panels, at_.depth1, g, prefetch);
        Gemm::template tile<false>(tile, a, scratch_.lda1, panels + at_.panel1, at_.depth1, i,
                                   Prefetch{prefetch.at + at_.panel1, prefetch.step});
        store_gated(tile, g, gate_bias, y_ + (p * scratch_.lda2 + d),
                    [&](int r, int v) { return load(i + r * kNr + v * L) + load(bias + v * L); });
      });
    }
  }

  // y = act(g + bias) * other(r, v) for pixels r and vectors v of a tile
  template <typename Rows, typename Other>
  [[gnu::always_inline]] void store_gated(Rows rows, const float* g, const float* bias, Left y,
                                          const Other& other) const {
    const auto store_vectors = [&](auto count, int first) {
      constexpr int kCount = decltype(count)::value;
      const auto gates = GateOf<act, Element>::value(
          map<kCount>([&](int k) { return load(g + (first + k) * L) + load(bias + (first + k) % 2 * L); }));
#pragma GCC unroll 8
      for (int k = 0; k < kCount; ++k) {
        const int r = (first + k) / 2, v = (first + k) % 2;
        store(y + (r * scratch_.lda2 + v * L), gates.vec[k] * other(r, v));
      }
    };
    constexpr int kUnroll = Vec::kUnroll;
    int first = 0;
    for (; first + kUnroll <= 2 * rows; first += kUnroll) store_vectors(Constant<kUnroll>{}, first);
    if constexpr (kUnroll > 2) {
      if (first < 2 * rows) store_vectors(Constant<2>{}, first);
    }
  }

  // y = act(g) * dwconv(c) on rows [h0, h1)
  void gate_conv(std::int64_t h0, std::int64_t h1) const {
    const std::int64_t pixels = (h1 - h0) * width_;
    for (std::int64_t d = conv_.begin; d < conv_.end; d += kNr) {
      for (std::int64_t v = 0; v < 2; ++v) {
        for (std::int64_t h = h0; h < h1; ++h) convolve_row(d / L + v, h, s_ + (v * pixels + (h - h0) * width_) * L);
      }
      const char* panel = packed<char>(at_.gate_panels) + d / kNr * at_.panel1;
      const float* bias = packed<float>(at_.gate_bias) + d;
      for_each_tile_of_chunk(h1 - h0, [&](auto tile, Left a, std::int64_t p) {
        Gemm::template tile<false>(tile, a, scratch_.lda1, panel, at_.depth1, tiles_,
                                   prefetch_share(panel + at_.panel1, at_.panel1, at_.depth1, p, pixels));
        store_gated(tile, tiles_, bias, y_ + (p * scratch_.lda2 + at_.identity + d),
                    [&](int r, int v) { return load(s_ + (v * pixels + p + r) * L); });
      });
    }
  }

  void convolve_row(std::int64_t vector, std::int64_t h, float* out) const {
    const std::int64_t taps = static_cast<std::int64_t>(shape_.K) * shape_.K;
    const float* x[kMaxKernelSize];
    FilterRows<Vec> rows;
    rows.x = x;
    rows.K = shape_.K;
    rows.kh0 = static_cast<int>(h < R_ ? R_ - h : 0);
    rows.kh1 = static_cast<int>(h + R_ < call_.H ? shape_.K : call_.H - h + R_);
    for (int kh = rows.kh0; kh < rows.kh1; ++kh) x[kh] = ring_row(vector, h - R_ + kh);
    rows.weight = packed<float>(at_.filter) + vector * taps * L;
    rows.tap_step = L;
    rows.row_step = shape_.K * L;
    conv_row_any(rows, width_, load(packed<float>(at_.filter_bias) + vector * L), out);
  }

  // out = x + scale * fc2(y) on rows [h0, h1)
  void multiply_fc2(std::int64_t h0, std::int64_t h1) const {
    for (std::int64_t d = out_.begin; d < out_.end; d += kNr) {
      const char* panel = packed<char>(at_.fc2_panels) + d / kNr * at_.panel2;
      const float *bias = packed<float>(at_.fc2_bias) + d, *scale = packed<float>(at_.scale) + d;
      const std::int64_t columns = min(kNr, shape_.dim - d);
      Gemm::for_each_tile((h1 - h0) * width_, [&](auto tile, std::int64_t p) {
        Gemm::template tile<false>(tile, y_ + p * scratch_.lda2, scratch_.lda2, panel, at_.depth2, tiles_,
                                   prefetch_share(panel + at_.panel2, at_.panel2, at_.depth2, p, (h1 - h0) * width_));
        std::int64_t h = h0 + p / width_, w = task_.w0 + p % width_;
        for (int r = 0; r < tile; ++r) {
          const Io* x = pixel<Io>(call_.x, task_.n, h, w) + d;
          Io* out = static_cast<Io*>(call_.out) + ((task_.n * call_.H + h) * call_.W + w) * shape_.dim + d;
          for_each_vector<L>(columns, [&](std::int64_t v, int lanes) {
            const Vec sum = load(tiles_ + r * kNr + v) + load(bias + v);
            store_lanes(out + v, fma(sum, load(scale + v), load_lanes<Vec>(x + v, lanes)), lanes);
          });
          if (++w == task_.w1) w = task_.w0, ++h;
        }
      });
    }
  }

  const BlockTask& task_;
  const GatedCnnBlockCall& call_;
  const GatedCnnBlockShape& shape_;
  const BlockLayout& at_;
  const std::int64_t width_, R_, halo0_, halo1_;
  const PanelRange identity_, conv_, out_;
  const BlockScratch scratch_;
  Left normed_;
  float* ring_;
  Left y_;
  float *s_, *tiles_;
};

template <typename Io, typename Gemm>
void run_block(const BlockTask& task) {
  const typename Gemm::TaskScope scope;
  switch (task.call->shape.act) {
    case Act::kGelu: return BlockRunner<Act::kGelu, Io, Gemm>(task).run();
    case Act::kGeluTanh: return BlockRunner<Act::kGeluTanh, Io, Gemm>(task).run();
    case Act::kSilu: return BlockRunner<Act::kSilu, Io, Gemm>(task).run();
    case Act::kIdentity: return BlockRunner<Act::kIdentity, Io, Gemm>(task).run();
  }
}

template <typename Gemm>
const BlockKernels* block_kernels_for(DType io) {
  static constexpr BlockKernels kFloat32 = {Gemm::kFormat, run_block<float, Gemm>};
  static constexpr BlockKernels kBFloat16 = {Gemm::kFormat, run_block<BFloat16, Gemm>};
  return io == DType::kFloat32 ? &kFloat32 : io == DType::kBFloat16 ? &kBFloat16 : nullptr;
}

}  // namespace
}  // namespace mambaout_kernels::cpu
