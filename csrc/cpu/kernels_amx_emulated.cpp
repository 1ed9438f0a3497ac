// For tests on processors without AMX.
// clang-format off
#define MAMBAOUT_VECTOR_BYTES 64
#include "simd/vec_portable.h"
#include "simd/activations.h"
#include "simd/loops.h"
#include "gated_dwconv/conv_rows.h"
#include "gemm/amx_emulated.h"
// clang-format on

namespace mambaout_kernels::cpu {
namespace {

template <Act act, typename Element>
using GateOf = Gate<act, sizeof(Element) == 2>;

}  // namespace
}  // namespace mambaout_kernels::cpu

#include "kernels_amx_body.h"
