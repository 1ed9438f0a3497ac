// The instruction sets that kernels are compiled for, and the one in use.
#pragma once

namespace mambaout_kernels::cpu {

enum class Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmxBf16 = 4 };
constexpr Isa kIsas[] = {Isa::kPortable, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kAmxBf16};

// The instruction sets compiled into this binary, and those this processor can run.
bool compiled(Isa isa);
bool supported(Isa isa);
const char* isa_name(Isa isa);  // "portable", "avx2", "avx512", "avx512_bf16", "amx_bf16"

// The instruction set in use: the fastest supported one, chosen once at load. set_isa is for tests; it returns
// false, and changes nothing, where the processor or the build lacks it.
Isa current_isa();
bool set_isa(Isa isa);

// Why the instruction set that was chosen at load is not another, in words; empty where it is the last.
const char* isa_reason();

}  // namespace mambaout_kernels::cpu
