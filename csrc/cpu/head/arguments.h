// The launch interface of a classifier's head, for inference: no torch.
//
//   out = fc2(layer_norm(gelu(fc1(layer_norm(mean over H and W of x)))))        (N, classes)
#pragma once

#include <cstdint>

#include "../../gated_dwconv.h"
#include "../parallel_for.h"

namespace mambaout_kernels {

// A null weight is 1, a null bias 0.
struct HeadNorm {
  const void *weight, *bias;
  float eps;
};

// weight (out_features, in_features), row pitch ldb; a null bias is 0.
struct HeadLinear {
  const void* weight;
  std::int64_t ldb;
  const void* bias;
};

struct HeadCall {
  std::int64_t N, H, W, C;       // of x; H and W are 1 or more
  std::int64_t hidden, classes;  // outputs of fc1 and of fc2; no classes: fc2 is left out
  DType in_dtype, out_dtype;     // kFloat32 or kBFloat16
  DType parameter_dtype;         // likewise; of all parameters. Everything is computed in fp32
  NhwcView x;                    // channels are contiguous
  HeadNorm norm;
  HeadLinear fc1;
  bool mid_normed;  // whether there is a norm between gelu and fc2
  HeadNorm mid_norm;
  HeadLinear fc2;
  void* out;  // [N][classes], or without fc2 [N][hidden]
};

}  // namespace mambaout_kernels

namespace mambaout_kernels::cpu {

// Scratch memory in bytes, any alignment.
std::int64_t head_workspace_bytes(const HeadCall& call);
// The result depends neither on num_threads nor on the other images, bit for bit.
void head_forward(const HeadCall& call, int num_threads, void* workspace, ParallelFor parallel_for);

}  // namespace mambaout_kernels::cpu
