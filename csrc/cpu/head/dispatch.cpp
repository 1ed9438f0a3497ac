// A classifier's head: its steps one after the other, each on all threads.
#include "../linear/arguments.h"
#include "../select_kernels.h"
#include "../simd/convert.h"
#include "../tasks.h"
#include "arguments.h"
#include "kernels.h"

namespace mambaout_kernels::cpu {
namespace {

const HeadKernels& kernels() { return *select_kernels<HeadKernels>(); }

// Offsets in floats into the workspace: parameters in fp32, padded to whole vectors; and what each step gives.
struct Layout {
  std::int64_t norm_weight, norm_bias, bias1, mid_weight, mid_bias, bias2;
  std::int64_t features;  // [N][C]
  std::int64_t hidden;    // [N][hidden]
  std::int64_t logits;    // [N][classes]
  std::int64_t total;
};

Layout make_layout(const HeadCall& call, int lanes) {
  Layout at{};
  const auto take = [&](std::int64_t* offset, std::int64_t count) {
    *offset = at.total;
    at.total += ceil_div(count, lanes) * lanes;
  };
  take(&at.norm_weight, call.C);
  take(&at.norm_bias, call.C);
  take(&at.bias1, call.hidden);
  take(&at.mid_weight, call.mid_normed ? call.hidden : 0);
  take(&at.mid_bias, call.mid_normed ? call.hidden : 0);
  take(&at.bias2, call.classes);
  take(&at.features, call.N * call.C);
  take(&at.hidden, call.N * call.hidden);
  take(&at.logits, call.N * call.classes);
  return at;
}

}  // namespace

std::int64_t head_workspace_bytes(const HeadCall& call) { return make_layout(call, kernels().lanes).total * 4 + kLine; }

void head_forward(const HeadCall& call, int num_threads, void* workspace, ParallelFor parallel_for) {
  if (call.N == 0) return;
  const HeadKernels& k = kernels();
  const Layout at = make_layout(call, k.lanes);
  auto* base = reinterpret_cast<float*>(align_up(workspace));
  // Converts a parameter to fp32, padded with zeros to whole vectors.
  const auto vector = [&](std::int64_t offset, const void* from, std::int64_t count, float missing) {
    float* to = base + offset;
    with_element_type(call.parameter_dtype, [&](auto element) {
      const auto* values = static_cast<const decltype(element)*>(from);
      for (std::int64_t i = 0; i < count; ++i)
        to[i] = values == nullptr ? missing : static_cast<float>(widen(values[i]));
    });
    for (std::int64_t i = count; i < ceil_div(count, k.lanes) * k.lanes; ++i) to[i] = 0.0f;
    return to;
  };
  const auto product = [&](const HeadLinear& fc, std::int64_t bias_at, std::int64_t inputs, std::int64_t outputs,
                           const float* from, Act act, float* to) {
    const float* bias = vector(bias_at, fc.bias, outputs, 0.0f);
    gemm_nt({call.N, outputs, inputs, from, inputs, fc.weight, fc.ldb, call.parameter_dtype, bias, act, to},
            num_threads, parallel_for);
  };

  const float *weight = vector(at.norm_weight, call.norm.weight, call.C, 1.0f),
              *bias = vector(at.norm_bias, call.norm.bias, call.C, 0.0f);
  float *features = base + at.features, *hidden = base + at.hidden;
  run_tasks(call.N, num_threads, parallel_for, [&](std::int64_t, std::int64_t n) {
    k.pool(call, n, features + n * call.C);
    k.norm(features + n * call.C, call.C, call.norm.eps, weight, bias);
  });
  product(call.fc1, at.bias1, call.C, call.hidden, features, Act::kGelu, hidden);
  if (call.mid_normed) {
    const float *mid_weight = vector(at.mid_weight, call.mid_norm.weight, call.hidden, 1.0f),
                *mid_bias = vector(at.mid_bias, call.mid_norm.bias, call.hidden, 0.0f);
    run_tasks(call.N, num_threads, parallel_for, [&](std::int64_t, std::int64_t n) {
      k.norm(hidden + n * call.hidden, call.hidden, call.mid_norm.eps, mid_weight, mid_bias);
    });
  }
  float* logits = call.out_dtype == DType::kFloat32 ? static_cast<float*>(call.out) : base + at.logits;
  if (call.classes > 0) product(call.fc2, at.bias2, call.hidden, call.classes, hidden, Act::kIdentity, logits);
  const float* result = call.classes > 0 ? logits : hidden;
  if (result == call.out) return;
  const std::int64_t count = call.N * (call.classes > 0 ? call.classes : call.hidden);
  with_element_type(call.out_dtype, [&](auto element) {
    for (std::int64_t i = 0; i < count; ++i) narrow(result[i], static_cast<decltype(element)*>(call.out) + i);
  });
}

}  // namespace mambaout_kernels::cpu
