// One element type per translation unit, so that they compile side by side: forward.cu and backward.cu are built once
// for each, with MAMBAOUT_DTYPE set.
#pragma once

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

}  // namespace mambaout_kernels::cuda
