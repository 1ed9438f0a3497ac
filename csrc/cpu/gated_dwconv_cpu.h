// CPU backend: what bindings.cpp calls. Includes no torch; threads come from the caller.
#pragma once

#include "../gated_dwconv.h"

namespace mambaout_kernels::cpu {

enum class Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

// The instruction sets compiled into this binary, and those this processor can run.
bool compiled(Isa isa);
bool supported(Isa isa);
const char* isa_name(Isa isa);  // "portable", "avx2", "avx512", "avx512_bf16"

// The instruction set in use: the best supported one, chosen once at load. set_isa is for tests; it returns
// false, and changes nothing, where the processor or the build lacks it.
Isa current_isa();
bool set_isa(Isa isa);

// Runs body(context, begin, end) over a partition of [0, count) on the caller's thread pool.
using RangeBody = void (*)(void* context, std::int64_t begin, std::int64_t end);
using ParallelFor = void (*)(std::int64_t count, RangeBody body, void* context);

// Scratch memory in bytes, which the caller allocates (any alignment) and which holds the packed weights, one row
// window per thread, and the partial sums of the weight gradient. Nothing else is allocated.
std::int64_t forward_workspace_bytes(const GatedDwconvShape& shape, int num_threads);
std::int64_t backward_workspace_bytes(const GatedDwconvShape& shape, int num_threads);

// The result does not depend on num_threads, bit for bit.
void forward(const GatedDwconvForward& args, int num_threads, void* workspace, ParallelFor parallel_for);
void backward(const GatedDwconvBackward& args, int num_threads, void* workspace, ParallelFor parallel_for);

}  // namespace mambaout_kernels::cpu
