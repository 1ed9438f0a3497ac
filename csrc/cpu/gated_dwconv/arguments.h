// The op on the CPU: its entry points. Their arguments are shared with CUDA (csrc/gated_dwconv.h).
#pragma once

#include "../../gated_dwconv.h"
#include "../parallel_for.h"

namespace mambaout_kernels::cpu {

// Scratch memory in bytes, which the caller allocates (any alignment) and which holds the packed weights, the scratch
// memory of each thread, and the partial sums of the weight gradient. Nothing else is allocated.
std::int64_t forward_workspace_bytes(const GatedDwconvShape& shape, int num_threads);
std::int64_t backward_workspace_bytes(const GatedDwconvShape& shape, int num_threads);

// The result does not depend on num_threads, bit for bit.
void forward(const GatedDwconvForward& args, int num_threads, void* workspace, ParallelFor parallel_for);
void backward(const GatedDwconvBackward& args, int num_threads, void* workspace, ParallelFor parallel_for);

}  // namespace mambaout_kernels::cpu
