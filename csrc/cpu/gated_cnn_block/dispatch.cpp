// The whole block: packing of its parameters, and the partition of a call into tasks.
#include <algorithm>
#include <cstring>

#include "../gemm/packing.h"
#include "../select_kernels.h"
#include "../tasks.h"
#include "arguments.h"
#include "kernels.h"

namespace mambaout_kernels::cpu {
namespace {

// Pixels of a chunk: enough that the panels of weights, streamed from L2 or L3 once per chunk, cost little beside the
// arithmetic on them; few enough that the chunk stays in L2 (benchmarks/NOTES.md).
constexpr std::int64_t kChunkPixels = 112;
constexpr std::int64_t kMaxTileWidth = 160;  // columns of one task

std::int64_t padded(std::int64_t count, std::int64_t unit) { return ceil_div(count, unit) * unit; }

BlockLayout make_layout(const GatedCnnBlockShape& shape, PackedFormat format) {
  BlockLayout at;
  at.columns = 2 * format.lanes;
  at.dim = padded(shape.dim, at.columns);
  at.identity = padded(shape.D - shape.C, at.columns);
  at.conv = padded(shape.C, at.columns);
  at.depth1 = padded(shape.dim, format.step);
  at.depth2 = padded(at.identity + at.conv, format.step);
  at.panel1 = at.depth1 * at.columns * format.element_bytes();
  at.panel2 = at.depth2 * at.columns * format.element_bytes();
  std::int64_t next = 0;
  const auto take = [&](std::int64_t bytes) {
    const std::int64_t begin = next;
    next += align_up(bytes);
    return begin;
  };
  const auto floats = [&](std::int64_t count) { return take(count * 4); };
  at.norm_weight = floats(at.dim);
  at.norm_bias = floats(at.dim);
  at.conv_panels = take(at.conv / at.columns * at.panel1);
  at.conv_bias1 = floats(at.conv);
  at.identity_panels = take(at.identity / at.columns * 2 * at.panel1);
  at.identity_gate_bias = floats(at.identity);
  at.identity_bias = floats(at.identity);
  at.gate_panels = take(at.conv / at.columns * at.panel1);
  at.gate_bias = floats(at.conv);
  at.filter = floats(at.conv * shape.K * shape.K);
  at.filter_bias = floats(at.conv);
  at.fc2_panels = take(at.dim / at.columns * at.panel2);
  at.fc2_bias = floats(at.dim);
  at.scale = floats(at.dim);
  at.total = next;
  return at;
}

// Where every parameter lies. PackedParameters decides the direction.
template <typename Float>
void move_parameters(const GatedCnnBlockShape& shape, const BlockLayout& at, const PackedParameters<Float>& packed,
                     const GatedCnnBlockParametersOf<Float>& parameters) {
  const std::int64_t identity = shape.D - shape.C, dim = shape.dim;
  packed.vector(at.norm_weight, parameters.norm_weight, dim, 1.0f);
  packed.vector(at.norm_bias, parameters.norm_bias, dim, 0.0f);

  // fc1's rows: gate of the identity channels, gate of the conv channels, identity, conv.
  const auto fc1 = [&](std::int64_t offset, std::int64_t panel_step, std::int64_t first, std::int64_t count) {
    packed.panels(offset, panel_step, count, dim,
                  [&](std::int64_t row, std::int64_t k) { return parameters.fc1_weight + (first + row) * dim + k; });
  };
  const auto fc1_bias = [&](std::int64_t offset, std::int64_t first, std::int64_t count) {
    packed.vector(offset, parameters.fc1_bias == nullptr ? nullptr : parameters.fc1_bias + first, count, 0.0f);
  };
  fc1(at.identity_panels, 2 * at.panel1, 0, identity);
  fc1(at.identity_panels + at.panel1, 2 * at.panel1, shape.D, identity);
  fc1(at.gate_panels, at.panel1, identity, shape.C);
  fc1(at.conv_panels, at.panel1, shape.D + identity, shape.C);
  fc1_bias(at.identity_gate_bias, 0, identity);
  fc1_bias(at.identity_bias, shape.D, identity);
  fc1_bias(at.gate_bias, identity, shape.C);
  fc1_bias(at.conv_bias1, shape.D + identity, shape.C);

  packed.filters(at.filter, parameters.conv_weight, shape.C, static_cast<std::int64_t>(shape.K) * shape.K);
  packed.vector(at.filter_bias, parameters.conv_bias, shape.C, 0.0f);

  // The input of fc2 that is the k-th in depth, negative for a zero.
  const auto input = [&](std::int64_t k) -> std::int64_t {
    if (k < at.identity) return k < identity ? k : -1;
    return k - at.identity < shape.C ? k - at.identity + identity : -1;
  };
  packed.panels(at.fc2_panels, at.panel2, dim, at.depth2, [&](std::int64_t row, std::int64_t k) -> Float* {
    return input(k) < 0 ? nullptr : parameters.fc2_weight + row * shape.D + input(k);
  });
  packed.vector(at.fc2_bias, parameters.fc2_bias, dim, 0.0f);
  packed.vector(at.scale, parameters.scale, dim, 1.0f);
}

// Cost of LayerNorm, relative to one channel of fc1 and fc2.
constexpr double kNormShare = 3.0;

struct Partition {
  std::int64_t strips, columns, chunk_rows, width;
  std::int64_t parts;  // of the channels; if more than one, there is one strip and one column
  bool halo;           // whether strips share the rows on both sides of their ends
  std::int64_t conv;   // the most conv channels of a task
};
// Estimated time of a call, in units of one image: by strips, or by parts of the channels.
double time_of_strips(const GatedCnnBlockCall& call, const Partition& c, int num_threads) {
  const double rows = static_cast<double>(ceil_div(call.H, c.strips)) / (call.H * c.columns);
  return ceil_div(call.N * c.columns * c.strips, num_threads) * rows;
}
double time_of_parts(const GatedCnnBlockCall& call, std::int64_t parts, int num_threads) {
  const double part = 1.0 / parts + kNormShare / call.shape.dim;
  return ceil_div(call.N * parts, num_threads) * part;
}

Partition partition(const GatedCnnBlockCall& call, const BlockLayout& at, int num_threads) {
  Partition c;
  c.columns = ceil_div(call.W, kMaxTileWidth);
  c.width = ceil_div(call.W, c.columns);
  c.strips = 1;
  c.parts = 1;
  // Strips share R rows on both sides of each boundary: no more strips than the threads can use, none shorter than R.
  const std::int64_t R = call.shape.K / 2;
  const auto uneven = [&] {
    const std::int64_t tasks = call.N * c.columns * c.strips;
    return tasks < 4 * num_threads && tasks % num_threads != 0;
  };
  const bool shared = uneven();
  while (uneven() && call.H / (c.strips + 1) >= std::max<std::int64_t>(1, R)) ++c.strips;
  const std::int64_t parts = std::min<std::int64_t>(num_threads, (at.identity + at.conv) / at.columns);
  if (shared && c.columns == 1 && time_of_parts(call, parts, num_threads) < time_of_strips(call, c, num_threads)) {
    c.strips = 1;
    c.parts = parts;
  }
  c.halo = c.strips > 1 && c.columns == 1 && R > 0 && call.shape.C > 0;
  c.conv = ceil_div(at.conv / at.columns, c.parts) * at.columns;
  const std::int64_t rows = ceil_div(call.H, c.strips);
  const std::int64_t chunks = std::max<std::int64_t>(1, (rows * c.width + kChunkPixels / 2) / kChunkPixels);
  c.chunk_rows = ceil_div(rows, std::min(chunks, rows));
  return c;
}

// The workspace of a call: what strips or parts of the channels share, then the scratch memory of each thread. In
// bytes.
struct Workspace {
  std::int64_t ends;   // the rows on both sides of a boundary between strips
  std::int64_t image;  // shared by the tasks of one image
  std::int64_t shared, scratch;
  std::int64_t y_plane;  // elements
};
Workspace workspace_layout(const GatedCnnBlockCall& call, const BlockLayout& at, PackedFormat format,
                           const Partition& c) {
  const BlockScratch scratch = block_scratch(at, call.shape, format, c.width, c.chunk_rows, c.conv);
  const std::int64_t ends = c.halo ? align_up(at.conv * 2 * (call.shape.K / 2) * call.W * 4) : 0;
  const std::int64_t plane = (call.H * call.W + rows_read_beyond(format)) * scratch.lda2;
  const std::int64_t y = c.parts > 1 ? align_up(plane * format.element_bytes()) : 0;
  const std::int64_t image = y + (c.strips - 1) * ends;
  return {ends, image, image * call.N, scratch.total, plane};
}

}  // namespace

BlockScratch block_scratch(const BlockLayout& at, const GatedCnnBlockShape& shape, PackedFormat format,
                           std::int64_t width, std::int64_t chunk_rows, std::int64_t conv) noexcept {
  const std::int64_t R = shape.K / 2, pixels = chunk_rows * width;
  const std::int64_t line = format.parts == 0 ? kLine / 4 : kLine / 2, beyond = rows_read_beyond(format);
  const std::int64_t halo_rows = shape.C > 0 ? R : 0;
  BlockScratch w;
  // Not a multiple of 4 KiB: the rows of a tile would map to the same sets of L1.
  w.lda1 = padded(at.depth1, line) + line;
  w.lda2 = padded(at.depth2, line) + line;
  w.ring_rows = chunk_rows + 2 * R;
  w.padded_width = width + 2 * R;
  std::int64_t next = 0;
  const auto take = [&](std::int64_t bytes) {
    const std::int64_t begin = next;
    next += align_up(bytes);
    return begin;
  };
  w.normed_plane = ((std::max(chunk_rows, halo_rows) + halo_rows) * w.padded_width + beyond) * w.lda1;
  w.normed = take(w.normed_plane * format.element_bytes());
  w.ring = take(conv * w.ring_rows * w.padded_width * 4);
  w.y_plane = (pixels + beyond) * w.lda2;
  w.y = take(w.y_plane * format.element_bytes());
  w.s = take(2 * pixels * format.lanes * 4);
  w.tiles = take(2 * kMaxMr * at.columns * 4);
  w.total = next;
  return w;
}

bool block_supports(DType compute_dtype) {
  return select_kernels<BlockKernels>(compute_dtype, DType::kFloat32) != nullptr;
}

PackedFormat block_packed_format(const GatedCnnBlockShape& shape) {
  return select_kernels<BlockKernels>(shape.compute_dtype, DType::kFloat32)->format;
}
std::int64_t block_packed_bytes(const GatedCnnBlockShape& shape, PackedFormat format) {
  return make_layout(shape, format).total;
}

void pack_block(const GatedCnnBlockShape& shape, const GatedCnnBlockParameters& parameters, void* packed) {
  pack_block(shape, block_packed_format(shape), parameters, packed);
}

void pack_block(const GatedCnnBlockShape& shape, PackedFormat format, const GatedCnnBlockParameters& parameters,
                void* packed) {
  const BlockLayout at = make_layout(shape, format);
  std::memset(packed, 0, at.total);
  move_parameters(shape, at, PackedParameters<const float>(format, static_cast<char*>(packed)), parameters);
}

void unpack_block(const GatedCnnBlockShape& shape, PackedFormat format, const void* packed,
                  const MutableGatedCnnBlockParameters& parameters) {
  const PackedParameters<float> from(format, static_cast<const char*>(packed));
  move_parameters(shape, make_layout(shape, format), from, parameters);
}

std::int64_t block_workspace_bytes(const GatedCnnBlockCall& call, int num_threads) {
  if (call.N * call.H * call.W == 0) return kLine;
  const BlockKernels& kernels = *select_kernels<BlockKernels>(call.shape.compute_dtype, call.dtype);
  const BlockLayout at = make_layout(call.shape, kernels.format);
  const Workspace bytes = workspace_layout(call, at, kernels.format, partition(call, at, num_threads));
  return bytes.shared + num_threads * bytes.scratch + kLine;
}

void block_forward(const GatedCnnBlockCall& call, int num_threads, void* workspace, ParallelFor parallel_for) {
  if (call.N * call.H * call.W == 0) return;
  const BlockKernels& kernels = *select_kernels<BlockKernels>(call.shape.compute_dtype, call.dtype);
  const BlockLayout at = make_layout(call.shape, kernels.format);
  const Partition c = partition(call, at, num_threads);
  const Workspace bytes = workspace_layout(call, at, kernels.format, c);
  char* base = align_up(workspace);
  const auto run = [&](BlockStep step) {
    const std::int64_t tasks_of_image = c.strips * c.columns * c.parts;
    run_tasks(call.N * tasks_of_image, num_threads, parallel_for, [&](std::int64_t slot, std::int64_t task) {
      const std::int64_t tile = task % tasks_of_image / c.parts;
      const std::int64_t column = tile % c.columns, strip = tile / c.columns;
      BlockTask t;
      t.call = &call;
      t.at = &at;
      t.n = task / tasks_of_image;
      t.h0 = part_begin(call.H, c.strips, strip);
      t.h1 = part_begin(call.H, c.strips, strip + 1);
      t.w0 = part_begin(call.W, c.columns, column);
      t.w1 = part_begin(call.W, c.columns, column + 1);
      t.chunk_rows = c.chunk_rows;
      t.step = step;
      t.part = task % c.parts;
      t.parts = c.parts;
      char* shared = base + t.n * bytes.image;
      const auto end = [&](std::int64_t i) { return reinterpret_cast<float*>(shared + i * bytes.ends); };
      t.above = c.halo && strip > 0 ? end(strip - 1) : nullptr;
      t.below = c.halo && strip + 1 < c.strips ? end(strip) : nullptr;
      t.y = c.parts > 1 ? shared : nullptr;
      t.y_plane = bytes.y_plane;
      t.scratch = base + bytes.shared + slot * bytes.scratch;
      kernels.run(t);
    });
  };
  if (c.halo) run(BlockStep::kHalo);
  if (c.parts == 1) return run(BlockStep::kAll);
  run(BlockStep::kGate);
  run(BlockStep::kProject);
}

}  // namespace mambaout_kernels::cpu
