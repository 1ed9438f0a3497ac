// The op: partition of a call into tasks, packing of the weight, and the second stage of the weight gradient.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "../select_kernels.h"
#include "../simd/convert.h"
#include "../tasks.h"
#include "arguments.h"
#include "kernels.h"
#include "packed_pairs.h"

namespace mambaout_kernels::cpu {
namespace {

// Pixels of a row in one task, and rows of one task of the backward. They fix the order of the sums of the weight
// gradient, so they depend on nothing but the image: the gradient is the same at every thread count.
constexpr std::int64_t kMaxWidth = 64, kBackwardRows = 14;
constexpr std::int64_t kMaxForwardRows = 28, kMinForwardRows = 7;
// The scratch memory of one task stays in L2 beside the rows that pass through. More groups of channels need less, but
// read u in shorter pieces.
constexpr std::int64_t kForwardScratchBytes = 448 * 1024, kBackwardScratchBytes = 224 * 1024;
// Below these sizes of u prefetching costs more than it brings: L3 is near enough for the forward, L2 for the backward,
// which computes more (benchmarks/NOTES.md).
constexpr std::int64_t kStreamingBytes = 8 * 1024 * 1024, kPrefetchBytes = 2 * 1024 * 1024;
constexpr int kTasksPerThread = 4;

// Tasks: images x strips of rows x columns x groups of channels.
struct Plan {
  const GatedDwconvShape& shape;
  const GatedDwconvKernels& kernels;
  std::int64_t strips, columns, groups;
  std::int64_t vectors;        // of conv channels
  std::int64_t group_vectors;  // the most in one group
  std::int64_t width;          // the most in one column
  std::int64_t scratch_elements;
  bool large;  // larger than the caches

  std::int64_t tiles() const { return shape.N * strips * columns; }
  std::int64_t tasks() const { return tiles() * groups; }

  Tile tile(std::int64_t task) const {
    const std::int64_t group = task % groups, column = task / groups % columns;
    const std::int64_t strip = task / groups / columns % strips, n = task / groups / columns / strips;
    const std::int64_t L = kernels.lanes, identity = shape.D - shape.C, steps = ceil_div(identity, L);
    Tile t;
    t.n = n;
    t.h0 = part_begin(shape.H, strips, strip);
    t.h1 = part_begin(shape.H, strips, strip + 1);
    t.w0 = part_begin(shape.W, columns, column);
    t.w1 = part_begin(shape.W, columns, column + 1);
    t.conv0 = std::min(shape.C, part_begin(vectors, groups, group) * L);
    t.conv1 = std::min(shape.C, part_begin(vectors, groups, group + 1) * L);
    t.identity0 = std::min(identity, part_begin(steps, groups, group) * L);
    t.identity1 = std::min(identity, part_begin(steps, groups, group + 1) * L);
    return t;
  }
};

Plan make_plan(const GatedDwconvShape& shape, bool forward, int num_threads) {
  const GatedDwconvKernels& kernels = *select_kernels<GatedDwconvKernels>(shape.dtype);
  Plan plan{shape, kernels, 1, 1, 1, 0, 0, 0, 0, false};
  const auto scratch_elements = forward ? forward_scratch_elements : backward_scratch_elements;
  const std::int64_t wanted_tasks = num_threads == 1 ? 1 : std::int64_t{kTasksPerThread} * num_threads;
  plan.vectors = ceil_div(shape.C, kernels.lanes);
  if (shape.N * shape.H * shape.W == 0) {
    plan.strips = 0;
    return plan;
  }
  plan.columns = ceil_div(shape.W, kMaxWidth);
  plan.width = ceil_div(shape.W, plan.columns);
  plan.strips = ceil_div(shape.H, forward ? kMaxForwardRows : kBackwardRows);

  const std::int64_t bytes = scratch_elements(plan.width, 1, shape.K, kernels.lanes) * kernels.accumulator_bytes;
  const std::int64_t fitting =
      std::max<std::int64_t>(1, (forward ? kForwardScratchBytes : kBackwardScratchBytes) / bytes);
  plan.groups = std::max<std::int64_t>(1, ceil_div(plan.vectors, fitting));
  if (forward) {
    while (plan.tasks() < wanted_tasks && ceil_div(shape.H, plan.strips * 2) >= kMinForwardRows) plan.strips *= 2;
  }
  while (plan.tasks() < wanted_tasks && plan.groups * 2 <= plan.vectors) plan.groups *= 2;
  plan.group_vectors = ceil_div(plan.vectors, plan.groups);
  plan.large = shape.N * shape.H * shape.W * 2 * shape.D * element_bytes(shape.dtype) >
               (forward ? kStreamingBytes : kPrefetchBytes);
  plan.scratch_elements = scratch_elements(plan.width, plan.group_vectors, shape.K, kernels.lanes);
  return plan;
}

// Offsets in bytes into the workspace.
struct Workspace {
  std::int64_t weight, bias, scratches, scratch_bytes, scratch_used, partials, partial_bytes, total;
};
Workspace make_layout(const Plan& plan, bool forward, int num_threads) {
  const std::int64_t taps = static_cast<std::int64_t>(plan.shape.K) * plan.shape.K,
                     bytes = plan.kernels.accumulator_bytes;
  const std::int64_t vector_bytes = plan.kernels.lanes * bytes;
  Workspace at;
  at.weight = 0;
  at.bias = at.weight + align_up(plan.vectors * taps * vector_bytes);
  at.scratches = at.bias + align_up(plan.vectors * vector_bytes);
  at.scratch_bytes = align_up(plan.scratch_elements * bytes);
  if (!forward) at.scratch_bytes = std::max(at.scratch_bytes, align_up((taps + 1) * plan.kernels.lanes * 8));
  at.scratch_used = at.scratches + at.scratch_bytes * num_threads;  // a flag for each
  at.partials = at.scratch_used + align_up(num_threads);
  at.partial_bytes = forward ? 0 : align_up(plan.vectors * (taps + 1) * vector_bytes);
  at.total = at.partials + at.partial_bytes * plan.tiles() + kLine;
  return at;
}

// 4 channels of 4 taps, `taps` apart, to 4 taps of 4 channels, `lanes` apart.
void transpose_4x4(const float* from, std::int64_t taps, float* to, std::int64_t lanes) {
  typedef float Four __attribute__((vector_size(16)));
  Four row[4];
  for (int i = 0; i < 4; ++i) std::memcpy(&row[i], from + i * taps, sizeof(Four));
  const Four low01 = __builtin_shufflevector(row[0], row[1], 0, 4, 1, 5);
  const Four low23 = __builtin_shufflevector(row[2], row[3], 0, 4, 1, 5);
  const Four high01 = __builtin_shufflevector(row[0], row[1], 2, 6, 3, 7);
  const Four high23 = __builtin_shufflevector(row[2], row[3], 2, 6, 3, 7);
  const Four column[4] = {
      __builtin_shufflevector(low01, low23, 0, 1, 4, 5), __builtin_shufflevector(low01, low23, 2, 3, 6, 7),
      __builtin_shufflevector(high01, high23, 0, 1, 4, 5), __builtin_shufflevector(high01, high23, 2, 3, 6, 7)};
  for (int i = 0; i < 4; ++i) std::memcpy(to + i * lanes, &column[i], sizeof(Four));
}

// weight (C, K, K) -> [vectors][K * K][lanes]; lanes beyond C are zero. In a small call this costs a fifth of the
// whole.
template <typename Accumulator>
void pack_weight(const Plan& plan, const void* weight, void* packed) {
  const std::int64_t taps = static_cast<std::int64_t>(plan.shape.K) * plan.shape.K, L = plan.kernels.lanes;
  with_element_type(plan.shape.weight_dtype, [&](auto element) {
    using Element = decltype(element);
    auto* to = static_cast<Accumulator*>(packed);
    for (std::int64_t c = 0; c < plan.shape.C; c += L, to += taps * L) {
      const auto* from = static_cast<const Element*>(weight) + c * taps;
      const std::int64_t lanes = std::min(L, plan.shape.C - c);
      std::int64_t first = 0;  // tap that is not packed yet
      if constexpr (std::is_same_v<Element, float> && std::is_same_v<Accumulator, float>) {
        for (; lanes == L && first + 4 <= taps; first += 4) {
          for (std::int64_t l = 0; l < L; l += 4) transpose_4x4(from + l * taps + first, taps, to + first * L + l, L);
        }
      }
      for (std::int64_t k = first; k < taps; ++k) {
        for (std::int64_t l = 0; l < lanes; ++l) to[k * L + l] = static_cast<Accumulator>(widen(from[l * taps + k]));
        for (std::int64_t l = lanes; l < L; ++l) to[k * L + l] = 0;
      }
    }
  });
}

// weight (C, 7, 7) in bf16 -> [vectors][7], by pairs.
void pack_pairs(const Plan& plan, const void* weight, void* packed) {
  const auto* from = static_cast<const BFloat16*>(weight);
  auto* to = static_cast<PackedPairRow*>(packed);
  std::memset(to, 0, sizeof(PackedPairRow) * plan.vectors * kPairFilter);
  for (std::int64_t c = 0; c < plan.shape.C; ++c) {
    for (int kh = 0; kh < kPairFilter; ++kh) {
      PackedPairRow& row = to[c / kPairLanes * kPairFilter + kh];
      const BFloat16* taps = from + (c * kPairFilter + kh) * kPairFilter;
      for (int p = 0; p < kPairFilter / 2; ++p) std::memcpy(row.pairs[p][c % kPairLanes], taps + 2 * p, 4);
      row.last[c % kPairLanes] = widen(taps[kPairFilter - 1]);
    }
  }
}

template <typename Accumulator>
void pack_bias(const Plan& plan, const void* bias, void* packed) {
  with_element_type(plan.shape.bias_dtype, [&](auto element) {
    const auto* from = static_cast<const decltype(element)*>(bias);
    for (std::int64_t c = 0; c < plan.vectors * plan.kernels.lanes; ++c) {
      static_cast<Accumulator*>(packed)[c] = c < plan.shape.C ? static_cast<Accumulator>(widen(from[c])) : 0;
    }
  });
}

void pack(const Plan& plan, bool pairs, const void* weight, const void* bias, void* packed_weight, void* packed_bias) {
  const bool fp64 = plan.kernels.accumulator_bytes == 8;
  (fp64 ? pack_bias<double> : pack_bias<float>)(plan, bias, packed_bias);
  (pairs ? pack_pairs : fp64 ? pack_weight<double> : pack_weight<float>)(plan, weight, packed_weight);
}

// dweight and dbias of one vector of channels: the partial sums of all tiles, added in order, in fp64.
template <typename Accumulator>
void reduce(const Plan& plan, const GatedDwconvBackward& args, const char* partials, std::int64_t partial_bytes,
            std::int64_t vector, double* sums) {
  const std::int64_t taps = static_cast<std::int64_t>(plan.shape.K) * plan.shape.K, L = plan.kernels.lanes;
  const std::int64_t count = (taps + 1) * L;
  std::fill(sums, sums + count, 0.0);
  for (std::int64_t r = 0; r < plan.tiles(); ++r) {
    const auto* partial = reinterpret_cast<const Accumulator*>(partials + r * partial_bytes) + vector * count;
    for (std::int64_t i = 0; i < count; ++i) sums[i] += static_cast<double>(partial[i]);
  }
  const std::int64_t c0 = vector * L, c1 = std::min(plan.shape.C, c0 + L);
  with_element_type(plan.shape.weight_dtype, [&](auto element) {
    auto* to = static_cast<decltype(element)*>(args.dweight);
    for (std::int64_t c = c0; c < c1; ++c) {
      for (std::int64_t k = 0; k < taps; ++k)
        narrow(static_cast<AccumulatorOf<decltype(element)>>(sums[k * L + c - c0]), to + c * taps + k);
    }
  });
  with_element_type(plan.shape.bias_dtype, [&](auto element) {
    auto* to = static_cast<decltype(element)*>(args.dbias);
    for (std::int64_t c = c0; c < c1; ++c)
      narrow(static_cast<AccumulatorOf<decltype(element)>>(sums[taps * L + c - c0]), to + c);
  });
}

}  // namespace

std::int64_t forward_workspace_bytes(const GatedDwconvShape& shape, int num_threads) {
  return make_layout(make_plan(shape, true, num_threads), true, num_threads).total;
}

std::int64_t backward_workspace_bytes(const GatedDwconvShape& shape, int num_threads) {
  return make_layout(make_plan(shape, false, num_threads), false, num_threads).total;
}

void forward(const GatedDwconvForward& args, int num_threads, void* workspace, ParallelFor parallel_for) {
  const Plan plan = make_plan(args.shape, true, num_threads);
  const Workspace at = make_layout(plan, true, num_threads);
  char* base = align_up(workspace);
  const bool pairs = plan.kernels.forward_pairs != nullptr && args.shape.K == kPairFilter &&
                     args.shape.weight_dtype == DType::kBFloat16;
  pack(plan, pairs, args.weight, args.bias, base + at.weight, base + at.bias);
  const auto run = pairs ? plan.kernels.forward_pairs : plan.kernels.forward;
  bool* const used = reinterpret_cast<bool*>(base + at.scratch_used);
  std::fill(used, used + num_threads, false);
  const bool alike = plan.groups == 1 && plan.columns == 1;
  run_tasks(plan.tasks(), num_threads, parallel_for, [&](std::int64_t slot, std::int64_t task) {
    run({&args, plan.tile(task), base + at.weight, base + at.bias, base + at.scratches + slot * at.scratch_bytes,
         plan.large, alike && used[slot]});
    used[slot] = true;
  });
}

void backward(const GatedDwconvBackward& args, int num_threads, void* workspace, ParallelFor parallel_for) {
  const Plan plan = make_plan(args.shape, false, num_threads);
  const Workspace at = make_layout(plan, false, num_threads);
  char* base = align_up(workspace);
  pack(plan, false, args.weight, args.bias, base + at.weight, base + at.bias);
  run_tasks(plan.tasks(), num_threads, parallel_for, [&](std::int64_t slot, std::int64_t task) {
    char* partial = base + at.partials + task / plan.groups * at.partial_bytes;
    plan.kernels.backward({&args, plan.tile(task), base + at.weight, base + at.bias,
                           base + at.scratches + slot * at.scratch_bytes, plan.large, partial});
  });
  run_tasks(plan.vectors, num_threads, parallel_for, [&](std::int64_t slot, std::int64_t vector) {
    auto* sums = reinterpret_cast<double*>(base + at.scratches + slot * at.scratch_bytes);
    if (plan.kernels.accumulator_bytes == 8) {
      reduce<double>(plan, args, base + at.partials, at.partial_bytes, vector, sums);
    } else {
      reduce<float>(plan, args, base + at.partials, at.partial_bytes, vector, sums);
    }
  });
}

}  // namespace mambaout_kernels::cpu
