// The 3x3 convolution of stride 2 over one task. Needs layer_norm.h and a micro-kernel of gemm/ before it.
//
// The three pixels of x under a row of the filter are contiguous, and those of the next output begin two pixels further
// on: each of the filter's three rows is a matrix product of depth 3 * channels, with lda = 2 * channels, without
// im2col.
#pragma once

#include "kernels.h"

namespace mambaout_kernels::cpu {
namespace {

inline float as_float(float x) { return x; }
inline float as_float(BFloat16 x) { return float_of(x); }

template <typename In, typename Out, typename Gemm>
class Conv3x3s2Runner {
  using Left = typename Gemm::Left;
  static constexpr int L = Vec::kLanes, kNr = 2 * L;

 public:
  explicit Conv3x3s2Runner(const Conv3x3s2Task& task)
      : task_(task),
        call_(*task.call),
        at_(*task.at),
        width_(call_.out_width()),
        scratch_(conv3x3s2_scratch(call_, at_, Gemm::kFormat, task.h1 - task.h0)),
        left_(LeftFactor<Left>::at(part(scratch_.left), scratch_.plane)),
        sums_(static_cast<float*>(part(scratch_.sums))),
        tile_(static_cast<float*>(part(scratch_.tile))) {}

  void run() const {
    if (at_.few) {
      for (std::int64_t h = task_.h0; h < task_.h1; ++h) gather_patches(h);
    } else {
      const std::int64_t first = 2 * task_.h0 - 1, last = 2 * task_.h1;  // rows of x
      for (std::int64_t h = first; h < last; ++h) {
        if (h >= 0 && h < call_.H) copy_row(h, left_ + (h - first) * scratch_.row);
      }
    }
    for (std::int64_t j = 0; j < at_.out; j += kNr) {
      for (std::int64_t h = task_.h0; h < task_.h1; ++h) multiply_row(h, j);
    }
    finish();
  }

 private:
  void* part(std::int64_t offset) const { return static_cast<char*>(task_.scratch) + offset; }
  template <typename T>
  const T* packed(std::int64_t offset) const {
    return reinterpret_cast<const T*>(static_cast<const char*>(call_.packed) + offset);
  }

  // Row h of x in the compute dtype, with a pixel of zeros on each side.
  void copy_row(std::int64_t h, Left to) const {
    const std::int64_t channels = call_.shape.in_channels;
    const auto* from = static_cast<const In*>(call_.x.data) + task_.n * call_.x.stride_n + h * call_.x.stride_h;
    clear(to, at_.channels);
    to = to + at_.channels;
    for (std::int64_t w = 0; w < call_.W; ++w, to = to + at_.channels, from += call_.x.stride_w) {
      if (call_.x_stride_c == 1) {
        for_each_vector<L>(
            channels, [&](std::int64_t c, int lanes) { store_lanes(to + c, load_lanes<Vec>(from + c, lanes), lanes); });
      } else {
        for (std::int64_t c = 0; c < channels; ++c) put(to + c, as_float(from[c * call_.x_stride_c]));
      }
      clear(to + channels, at_.channels - channels);
    }
    clear(to, scratch_.row - (call_.W + 1) * at_.channels);
  }

  // Row h of the sums, columns [j, j + kNr).
  void multiply_row(std::int64_t h, std::int64_t j) const {
    const char* panel = packed<char>(at_.panels) + j / kNr * at_.panel;
    const float* bias = packed<float>(at_.bias) + j;
    const Vec bias0 = load(bias), bias1 = load(bias + L);
    Gemm::for_each_tile(width_, [&](auto rows, std::int64_t w) {
      if (at_.few) {
        const Prefetch prefetch = {panel + at_.panel, at_.panel / (at_.depth / Gemm::kFormat.step)};
        const Left patches = left_ + ((h - task_.h0) * width_ + w) * at_.depth;
        Gemm::template tile<false>(rows, patches, at_.depth, panel, at_.depth, tile_, prefetch);
      } else {
        multiply_filter_rows(rows, h, w, panel);
      }
      float* to = sums_ + ((h - task_.h0) * width_ + w) * at_.out + j;
      for (int r = 0; r < rows; ++r, to += at_.out) {
        store(to, load(tile_ + r * kNr) + bias0);
        store(to + L, load(tile_ + r * kNr + L) + bias1);
      }
    });
  }

  template <typename Rows>
  void multiply_filter_rows(Rows rows, std::int64_t h, std::int64_t w, const char* panel) const {
    const std::int64_t depth = 3 * at_.channels, row_bytes = at_.panel / 3;
    bool first = true;
    for (int kh = 0; kh < 3; ++kh) {
      const std::int64_t from = 2 * h + kh - 1;
      if (from < 0 || from >= call_.H) continue;
      const Left a = left_ + ((from - (2 * task_.h0 - 1)) * scratch_.row + 2 * w * at_.channels);
      const Prefetch prefetch = {panel + at_.panel + kh * row_bytes, row_bytes / (depth / Gemm::kFormat.step)};
      const auto multiply = [&](auto add) {
        Gemm::template tile<decltype(add)::value>(rows, a, 2 * at_.channels, panel + kh * row_bytes, depth, tile_,
                                                  prefetch);
      };
      first ? multiply(Constant<false>{}) : multiply(Constant<true>{});
      first = false;
    }
  }

  // The nine pixels under the filter at each output of row h, in the compute dtype (im2col): for few channels, three
  // short products cost more than this copy.
  void gather_patches(std::int64_t h) const {
    const std::int64_t channels = at_.channels, step = 2 * call_.x.stride_w;
    const auto* image = static_cast<const In*>(call_.x.data) + task_.n * call_.x.stride_n;
    const Left patches = left_ + (h - task_.h0) * width_ * at_.depth;
    for (std::int64_t w = 0; w < width_ && 9 * channels < at_.depth; ++w) {
      clear(patches + (w * at_.depth + 9 * channels), at_.depth - 9 * channels);
    }
    for (std::int64_t k = 0; k < 9 * channels; ++k) {
      const std::int64_t c = k % channels, column = k / channels % 3 - 1, row = 2 * h + k / channels / 3 - 1;
      const bool inside = c < call_.shape.in_channels && row >= 0 && row < call_.H;
      // The outputs w with 2 * w + column a column of x.
      const std::int64_t begin = column < 0 ? 1 : 0, end = inside ? min(width_, (call_.W + 1 - column) / 2) : 0;
      const std::int64_t from = row * call_.x.stride_h + column * call_.x.stride_w + c * call_.x_stride_c;
      gather(image + (begin < end ? from + begin * step : 0), step, begin, end, patches + k);
    }
  }

  // to[w * depth] for every output w: from `from` on for w in [begin, end), zero for the others.
  [[gnu::noinline]] void gather(const In* from, std::int64_t step, std::int64_t begin, std::int64_t end,
                                Left to) const {
    std::int64_t w = 0;
    for (; w < begin; ++w, to = to + at_.depth) put(to, 0.0f);
    for (; w < end; ++w, to = to + at_.depth, from += step) put(to, as_float(*from));
    for (; w < width_; ++w, to = to + at_.depth) put(to, 0.0f);
  }

  void finish() const {
    const std::int64_t pixels = (task_.h1 - task_.h0) * width_, channels = call_.shape.out_channels;
    if (call_.shape.normed) {
      for_each_unrolled(pixels, [&](auto count, std::int64_t p) {
        float* sums = sums_ + p * at_.out;
        norm_pixels<decltype(count)::value>(sums, at_.out, channels, channels, call_.shape.eps,
                                            packed<float>(at_.norm_weight), packed<float>(at_.norm_bias), sums,
                                            at_.out);
      });
    }
    Out* out = static_cast<Out*>(call_.out) + (task_.n * call_.out_height() + task_.h0) * width_ * channels;
    switch (call_.shape.act) {
      case Act::kGelu: return store_activated<Act::kGelu>(pixels, out);
      case Act::kGeluTanh: return store_activated<Act::kGeluTanh>(pixels, out);
      case Act::kSilu: return store_activated<Act::kSilu>(pixels, out);
      case Act::kIdentity: return store_activated<Act::kIdentity>(pixels, out);
    }
  }
  template <Act act>
  void store_activated(std::int64_t pixels, Out* out) const {
    const std::int64_t channels = call_.shape.out_channels;
    for (std::int64_t p = 0; p < pixels; ++p, out += channels) {
      const float* sums = sums_ + p * at_.out;
      for_each_vectors<Vec>(channels, [&](std::int64_t c, auto count, int lanes) {
        constexpr int kCount = decltype(count)::value;
        store_array(out + c, GateOf<act, Out>::value(load_array<kCount, Vec>(sums + c, lanes)), lanes);
      });
    }
  }

  const Conv3x3s2Task& task_;
  const Conv3x3s2Call& call_;
  const Conv3x3s2Layout& at_;
  const std::int64_t width_;
  const Conv3x3s2Scratch scratch_;
  const Left left_;
  float *sums_, *tile_;
};

template <typename In, typename Out, typename Gemm>
void run_conv3x3s2(const Conv3x3s2Task& task) {
  const typename Gemm::TaskScope scope;
  Conv3x3s2Runner<In, Out, Gemm>(task).run();
}

template <typename Gemm>
const Conv3x3s2Kernels* conv3x3s2_kernels_for(DType in, DType out) {
  constexpr PackedFormat kFormat = Gemm::kFormat;
  static constexpr Conv3x3s2Kernels kKernels[2][2] = {
      {{kFormat, run_conv3x3s2<float, float, Gemm>}, {kFormat, run_conv3x3s2<float, BFloat16, Gemm>}},
      {{kFormat, run_conv3x3s2<BFloat16, float, Gemm>}, {kFormat, run_conv3x3s2<BFloat16, BFloat16, Gemm>}}};
  return &kKernels[in == DType::kBFloat16][out == DType::kBFloat16];
}

}  // namespace
}  // namespace mambaout_kernels::cpu
