// The whole block on the CPU: what bindings_block.cpp calls. Includes no torch; threads come from the caller.
#pragma once

#include "../gated_cnn_block.h"
#include "gated_dwconv_cpu.h"

namespace mambaout_kernels::cpu {

// Whether the instruction set in use multiplies this dtype: fp32 always, bf16 with avx512_bf16.
bool block_supports(DType multiplied);

// Packed parameters depend on the instruction set in use; block_pack_id tells which it is, and a call with a pack of
// another would read the wrong layout: the caller compares.
std::int64_t block_pack_bytes(const GatedCnnBlockShape& shape);
int block_pack_id(const GatedCnnBlockShape& shape);
void pack_block(const GatedCnnBlockShape& shape, const GatedCnnBlockParameters& parameters, void* packed);

// Floating-point operations per second of the calling thread, measured for so many seconds: multiply-adds of the
// instruction set in use, on registers alone. 0 where it does not multiply this dtype.
double fma_flops(DType multiplied, double seconds);

// Scratch memory in bytes, any alignment.
std::int64_t block_workspace_bytes(const GatedCnnBlockCall& call, int num_threads);
void block_forward(const GatedCnnBlockCall& call, int num_threads, void* workspace, ParallelFor parallel_for);

}  // namespace mambaout_kernels::cpu
