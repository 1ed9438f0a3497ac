// The instruction sets that kernels are compiled for, and the one in use.
#pragma once

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

}  // namespace mambaout_kernels::cpu
