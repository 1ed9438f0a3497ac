// The 3x3 convolution of stride 2: packing of its parameters, and the partition of a call into tasks.
#include <algorithm>
#include <cstring>

#include "../gemm/packing.h"
#include "../select_kernels.h"
#include "../tasks.h"
#include "arguments.h"
#include "kernels.h"

namespace mambaout_kernels::cpu {
namespace {

// Pixels of a task, at most: enough that streaming the panels of weights from L2 or L3 once per task costs little.
constexpr std::int64_t kTaskPixels = 112;
// Up to so many input channels, the nine pixels under the filter are gathered into patches (im2col).
constexpr std::int64_t kFewChannels = 8;
// Bytes of the rows of x in one task, at most.
constexpr std::int64_t kScratchBytes = 448 * 1024;

const Conv3x3s2Kernels* kernels_of(const Conv3x3s2Shape& shape) {
  return select_kernels<Conv3x3s2Kernels>(shape.compute_dtype, DType::kFloat32, DType::kFloat32);
}

Conv3x3s2Layout make_layout(const Conv3x3s2Shape& shape, PackedFormat format) {
  Conv3x3s2Layout at;
  at.columns = 2 * format.lanes;
  // Patches are padded as a whole, else every pixel is.
  const auto padded = [](std::int64_t count, std::int64_t unit) { return ceil_div(count, unit) * unit; };
  at.few = shape.in_channels <= kFewChannels;
  at.channels = padded(shape.in_channels, at.few ? std::min(2, format.step) : format.step);
  at.depth = padded(9 * at.channels, format.step);
  at.out = ceil_div(shape.out_channels, at.columns) * at.columns;
  at.panel = at.depth * at.columns * format.element_bytes();
  at.panels = 0;
  at.bias = at.panels + at.out / at.columns * at.panel;
  at.norm_weight = at.bias + at.out * 4;
  at.norm_bias = at.norm_weight + at.out * 4;
  at.total = at.norm_bias + at.out * 4;
  return at;
}

// Where every parameter lies. PackedParameters decides the direction.
template <typename Float>
void move_parameters(const Conv3x3s2Shape& shape, const Conv3x3s2Layout& at, const PackedParameters<Float>& packed,
                     const Conv3x3s2ParametersOf<Float>& parameters) {
  packed.panels(at.panels, at.panel, shape.out_channels, 9 * at.channels, [&](std::int64_t row, std::int64_t k) {
    const std::int64_t tap = k / at.channels, c = k % at.channels;
    return c < shape.in_channels ? parameters.weight + (row * shape.in_channels + c) * 9 + tap : nullptr;
  });
  packed.vector(at.bias, parameters.bias, shape.out_channels, 0.0f);
  packed.vector(at.norm_weight, parameters.norm_weight, shape.out_channels, 1.0f);
  packed.vector(at.norm_bias, parameters.norm_bias, shape.out_channels, 0.0f);
}

// The number of strips of rows into which an image is partitioned.
std::int64_t strips_of(const Conv3x3s2Call& call, const Conv3x3s2Layout& at, PackedFormat format, int num_threads) {
  const std::int64_t height = call.out_height(), row_bytes = (call.W + 3) * at.channels * format.element_bytes();
  const std::int64_t fitting = std::max<std::int64_t>(1, (kScratchBytes / row_bytes - 1) / 2);
  const std::int64_t most = std::max<std::int64_t>(1, kTaskPixels / std::max<std::int64_t>(1, call.out_width()));
  // In rows, until the last thread is done.
  const auto time = [&](std::int64_t strips) {
    return ceil_div(call.N * strips, num_threads) * ceil_div(height, strips);
  };
  std::int64_t best = ceil_div(height, std::min({fitting, most, height}));
  const std::int64_t last = std::min<std::int64_t>(height, best + 2 * num_threads);
  for (std::int64_t strips = best + 1; strips <= last; ++strips) {
    if (time(strips) < time(best)) best = strips;
  }
  return best;
}

}  // namespace

Conv3x3s2Scratch conv3x3s2_scratch(const Conv3x3s2Call& call, const Conv3x3s2Layout& at, PackedFormat format,
                                   std::int64_t rows) noexcept {
  Conv3x3s2Scratch w;
  const std::int64_t pixels = rows * call.out_width(), beyond = rows_read_beyond(format);
  // The last output of an odd row reads one pixel beyond the zero padding on the right.
  w.row = (call.W + 3) * at.channels;
  w.plane = at.few ? (pixels + beyond) * at.depth : (2 * rows + 1) * w.row + beyond * 2 * at.channels;
  w.left = 0;
  w.sums = align_up(w.plane * format.element_bytes());
  w.tile = w.sums + align_up(pixels * at.out * 4);
  w.total = w.tile + align_up(kMaxMr * at.columns * 4);
  return w;
}

bool conv3x3s2_supports(DType compute_dtype) {
  return select_kernels<Conv3x3s2Kernels>(compute_dtype, DType::kFloat32, DType::kFloat32) != nullptr;
}
PackedFormat conv3x3s2_packed_format(const Conv3x3s2Shape& shape) { return kernels_of(shape)->format; }
std::int64_t conv3x3s2_packed_bytes(const Conv3x3s2Shape& shape, PackedFormat format) {
  return make_layout(shape, format).total;
}

void pack_conv3x3s2(const Conv3x3s2Shape& shape, const Conv3x3s2Parameters& parameters, void* packed) {
  pack_conv3x3s2(shape, conv3x3s2_packed_format(shape), parameters, packed);
}

void pack_conv3x3s2(const Conv3x3s2Shape& shape, PackedFormat format, const Conv3x3s2Parameters& parameters,
                    void* packed) {
  const Conv3x3s2Layout at = make_layout(shape, format);
  std::memset(packed, 0, at.total);
  move_parameters(shape, at, PackedParameters<const float>(format, static_cast<char*>(packed)), parameters);
}

void unpack_conv3x3s2(const Conv3x3s2Shape& shape, PackedFormat format, const void* packed,
                      const MutableConv3x3s2Parameters& parameters) {
  const PackedParameters<float> from(format, static_cast<const char*>(packed));
  move_parameters(shape, make_layout(shape, format), from, parameters);
}

std::int64_t conv3x3s2_workspace_bytes(const Conv3x3s2Call& call, int num_threads) {
  if (call.N * call.H * call.W == 0) return kLine;
  const Conv3x3s2Kernels& kernels = *kernels_of(call.shape);
  const Conv3x3s2Layout at = make_layout(call.shape, kernels.format);
  const std::int64_t rows = ceil_div(call.out_height(), strips_of(call, at, kernels.format, num_threads));
  return num_threads * conv3x3s2_scratch(call, at, kernels.format, rows).total + kLine;
}

void conv3x3s2_forward(const Conv3x3s2Call& call, int num_threads, void* workspace, ParallelFor parallel_for) {
  if (call.N * call.H * call.W == 0) return;
  const Conv3x3s2Kernels& kernels =
      *select_kernels<Conv3x3s2Kernels>(call.shape.compute_dtype, call.in_dtype, call.out_dtype);
  const Conv3x3s2Layout at = make_layout(call.shape, kernels.format);
  const std::int64_t height = call.out_height(), strips = strips_of(call, at, kernels.format, num_threads);
  const std::int64_t bytes = conv3x3s2_scratch(call, at, kernels.format, ceil_div(height, strips)).total;
  char* base = align_up(workspace);
  run_tasks(call.N * strips, num_threads, parallel_for, [&](std::int64_t slot, std::int64_t task) {
    const std::int64_t strip = task % strips;
    kernels.run({&call, &at, task / strips, part_begin(height, strips, strip), part_begin(height, strips, strip + 1),
                 base + slot * bytes});
  });
}

}  // namespace mambaout_kernels::cpu
