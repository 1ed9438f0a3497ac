// The downsampling on the CPU: what bindings_downsample.cpp calls. Includes no torch; threads come from the caller.
#pragma once

#include "../downsample.h"
#include "gated_dwconv_cpu.h"

namespace mambaout_kernels::cpu {

// Whether the instruction set in use multiplies this dtype: fp32 always, bf16 with avx512_bf16.
bool downsample_supports(DType multiplied);

// Packed parameters depend on the instruction set in use; downsample_pack_id tells which it is, and a call with a pack
// of another would read the wrong layout: the caller compares.
std::int64_t downsample_pack_bytes(const DownsampleShape& shape);
int downsample_pack_id(const DownsampleShape& shape);
void pack_downsample(const DownsampleShape& shape, const DownsampleParameters& parameters, void* packed);

// Scratch memory in bytes, any alignment.
std::int64_t downsample_workspace_bytes(const DownsampleCall& call, int num_threads);
void downsample_forward(const DownsampleCall& call, int num_threads, void* workspace, ParallelFor parallel_for);

}  // namespace mambaout_kernels::cpu
