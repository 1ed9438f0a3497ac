// clang-format off
#include "simd/vec_avx512.h"
#include "simd/activations.h"
#include "simd/loops.h"
#include "gated_dwconv/conv_rows.h"
#include "gemm/amx_tiles.h"
// clang-format on

namespace mambaout_kernels::cpu {
namespace {

template <typename Element>
struct VecOf {
  using type = Vec;
};
template <Act act, typename Element>
using GateOf = Gate<act, sizeof(Element) == 2>;

}  // namespace
}  // namespace mambaout_kernels::cpu

#include "kernels_amx_body.h"
