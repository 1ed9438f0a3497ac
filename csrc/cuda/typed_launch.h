// One element type per translation unit, so that they compile side by side: all of them (CMakeLists.txt) but
// dispatch.cpp are built once for each, with MAMBAOUT_DTYPE set.
#pragma once

#include "depthwise.h"
#include "gated_dwconv_cuda.h"

namespace mambaout_kernels::cuda {

template <DType dtype>
void forward_as(const GatedDwconvForward& args, const Device& device, void* stream);
template <DType dtype>
LaunchPlan forward_plan_as(const GatedDwconvShape& shape, const Device& device);
template <DType dtype>
LaunchPlan backward_plan_as(const GatedDwconvShape& shape);
template <DType dtype>
void backward_as(const GatedDwconvBackward& args, void* workspace, const Device& device, void* stream,
                 BackwardPath path);
// Of the split backward. e: in place of s, (N, H, W, C); partials: [slot][K * K + 1][C].
template <DType dtype>
void gate_backward_as(const GatedDwconvBackward& args, void* e, void* stream);
template <DType dtype>
void weight_gradient_as(const GatedDwconvBackward& args, const void* e, float* partials, void* stream);
template <DType dtype>
LaunchPlan weight_gradient_plan_as(const GatedDwconvShape& shape);
template <DType dtype>
void depthwise_as(const Depthwise& call, const Device& device, void* stream);
template <DType dtype>
LaunchPlan depthwise_plan_as(const DepthwiseShape& shape, const Device& device);

}  // namespace mambaout_kernels::cuda
