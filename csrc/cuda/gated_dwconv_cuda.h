// CUDA backend: what bindings_cuda.cpp calls. Includes no torch and no CUDA header.
#pragma once

#include "../gated_dwconv.h"
#include "tiling.h"

namespace mambaout_kernels::cuda {

struct Device {
  int multiprocessors;
  int major;  // of its compute capability
};

constexpr std::int64_t kMostChannels = 1 << 20;                       // D
constexpr std::int64_t kMostPixels = (std::int64_t{1} << 31) - 1024;  // so that a tile may reach beyond the last
constexpr std::int64_t kMostSpacing = 1 << 24;                        // elements from one pixel of u or dy to the next

// No fp64; D up to kMostChannels; up to kMostPixels pixels, and fewer than 2^31 values in a row of y.
// The pixels of u and dy lie evenly spaced in memory: stride_h = W * stride_w and stride_n = H * stride_h. Both begin
// at a multiple of 4 bytes, and for two-byte types the spacing of u is even.
bool supported(const GatedDwconvShape& shape);

// What a launch is made of, for a contiguous u; all 0 where the filter has no kernel of its own.
struct LaunchPlan {
  Tiling tiling;
  int strip, threads, shared_bytes;  // of a block
  int bytes_ahead;                   // that a block has under way from global memory while it computes
};
LaunchPlan forward_plan(const GatedDwconvShape& shape, const Device& device);
LaunchPlan backward_plan(const GatedDwconvShape& shape);         // of the one kernel
LaunchPlan weight_gradient_plan(const GatedDwconvShape& shape);  // of the split path; all 0 where there is none

// One kernel (backward.cuh), or several (split_backward.h); for measurements and tests a call may name one.
enum class BackwardPath : int { kChosen = 0, kFused = 1, kSplit = 2 };

// Scratch device memory of a backward launch, which begins at a multiple of 16 bytes: for the partial sums of dweight
// and dbias and, of the split path, e. Its size depends on the shape alone, and the order of the sums on the shape and
// the path. An empty u leaves dweight and dbias to the caller.
std::int64_t backward_workspace_bytes(const GatedDwconvShape& shape, BackwardPath path = BackwardPath::kChosen);

// Starts the kernels on `stream` (a cudaStream_t) of the current device and returns; nothing is allocated.
// std::runtime_error where a launch fails, or the path that is asked for does not take the call.
void forward(const GatedDwconvForward& args, const Device& device, void* stream);
void backward(const GatedDwconvBackward& args, void* workspace, const Device& device, void* stream,
              BackwardPath path = BackwardPath::kChosen);

}  // namespace mambaout_kernels::cuda
