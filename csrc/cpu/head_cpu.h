// A classifier's head on the CPU: what bindings_head.cpp calls. Includes no torch; threads come from the caller.
#pragma once

#include "../head.h"
#include "gated_dwconv_cpu.h"

namespace mambaout_kernels::cpu {

// Scratch memory in bytes, any alignment.
std::int64_t head_workspace_bytes(const HeadCall& call);
// The same bits at every number of threads, and for every image, whatever the others.
void head_forward(const HeadCall& call, int num_threads, void* workspace, ParallelFor parallel_for);

}  // namespace mambaout_kernels::cpu
