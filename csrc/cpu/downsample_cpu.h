// The downsampling on the CPU: what bindings_downsample.cpp calls. Includes no torch; threads come from the caller.
#pragma once

#include "../downsample.h"
#include "gated_dwconv_cpu.h"
#include "packed_format.h"

namespace mambaout_kernels::cpu {

// Whether the instruction set in use multiplies this dtype: fp32 always, bf16 with avx512_bf16.
bool downsample_supports(DType multiplied);

// Parameters are packed in the format of the instruction set in use; a call reads that format only, and the caller
// compares. A pack of any of kPackedFormats can be unpacked: what is left out was packed as 1 (weights of the norm)
// or 0, and bf16 panels give back what they were rounded to. Packed memory is 64-byte aligned.
PackedFormat downsample_packed_format(const DownsampleShape& shape);
std::int64_t downsample_packed_bytes(const DownsampleShape& shape, PackedFormat format);
void pack_downsample(const DownsampleShape& shape, const DownsampleParameters& parameters, void* packed);
void unpack_downsample(const DownsampleShape& shape, PackedFormat format, const void* packed,
                       const MutableDownsampleParameters& parameters);

// Scratch memory in bytes, any alignment.
std::int64_t downsample_workspace_bytes(const DownsampleCall& call, int num_threads);
void downsample_forward(const DownsampleCall& call, int num_threads, void* workspace, ParallelFor parallel_for);

}  // namespace mambaout_kernels::cpu
