// The matrix products of linear layers on the CPU: what bindings_matmul.cpp calls. Includes no torch; threads come from
// the caller.
#pragma once

#include "../matmul.h"
#include "gated_dwconv_cpu.h"

namespace mambaout_kernels::cpu {

// Scratch memory in bytes, any alignment.
std::int64_t matmul_workspace_bytes(const MatmulCall& call, int num_threads);
// The same bits at every number of threads.
void matmul(const MatmulCall& call, int num_threads, void* workspace, ParallelFor parallel_for);

// For a matrix b that is used once, a few times at most: it is read as it lies. The same bits at every number of
// threads, and for every row, whatever the others.
void dots(const DotsCall& call, int num_threads, ParallelFor parallel_for);

}  // namespace mambaout_kernels::cpu
