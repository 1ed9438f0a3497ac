// One element type per translation unit, so that they compile side by side: forward.cu, backward.cu and depthwise.cu
// are built once for each, with MAMBAOUT_DTYPE set.
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
void backward_as(const GatedDwconvBackward& args, void* workspace, void* stream);
template <DType dtype>
void depthwise_as(const Depthwise& call, const Device& device, void* stream);
template <DType dtype>
LaunchPlan depthwise_plan_as(const DepthwiseShape& shape, const Device& device);

}  // namespace mambaout_kernels::cuda
