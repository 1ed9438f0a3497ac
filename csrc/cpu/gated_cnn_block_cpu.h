// The whole block on the CPU: what bindings_block.cpp calls. Includes no torch; threads come from the caller.
#pragma once

#include "../gated_cnn_block.h"
#include "gated_dwconv_cpu.h"
#include "packed_format.h"

namespace mambaout_kernels::cpu {

// Whether the instruction set in use multiplies this dtype: fp32 always, bf16 with avx512_bf16.
bool block_supports(DType multiplied);

// Parameters are packed in the format of the instruction set in use; a call reads that format only, and the caller
// compares. A pack of any of kPackedFormats can be unpacked: what is left out was packed as 1 (weights of the norm,
// scale) or 0, and bf16 panels give back what they were rounded to. Packed memory is 64-byte aligned.
PackedFormat block_packed_format(const GatedCnnBlockShape& shape);
std::int64_t block_packed_bytes(const GatedCnnBlockShape& shape, PackedFormat format);
void pack_block(const GatedCnnBlockShape& shape, const GatedCnnBlockParameters& parameters, void* packed);
void unpack_block(const GatedCnnBlockShape& shape, PackedFormat format, const void* packed,
                  const MutableGatedCnnBlockParameters& parameters);

// Floating-point operations per second of the calling thread, measured for so many seconds: multiply-adds of the
// instruction set in use, on registers alone. 0 where it does not multiply this dtype.
double fma_flops(DType multiplied, double seconds);

// Scratch memory in bytes, any alignment.
std::int64_t block_workspace_bytes(const GatedCnnBlockCall& call, int num_threads);
void block_forward(const GatedCnnBlockCall& call, int num_threads, void* workspace, ParallelFor parallel_for);

}  // namespace mambaout_kernels::cpu
