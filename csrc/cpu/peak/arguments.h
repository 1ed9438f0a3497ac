// The peak rate of multiply-adds.
#pragma once

#include "../../gated_dwconv.h"

namespace mambaout_kernels::cpu {

// Floating-point operations per second of the calling thread, measured for so many seconds: multiply-adds of the
// instruction set in use, on registers alone. 0 where it does not multiply this dtype.
double fma_flops(DType compute_dtype, double seconds);

}  // namespace mambaout_kernels::cpu
