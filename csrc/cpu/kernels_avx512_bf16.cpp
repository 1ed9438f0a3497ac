// clang-format off
#include "vec_avx512.h"
#include "activations.h"
#include "conv_rows.h"
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

#include "kernel_body.h"
// After the kernels, whose rings it shares.
#include "bf16_pairs.h"

namespace mambaout_kernels::cpu {

const Kernels* kernels_avx512_bf16(DType dtype) {
  static constexpr Kernels kBFloat16 = [] {
    Kernels kernels = kernels_for<BFloat16>();
    kernels.forward_pairs = forward_any<BFloat16, Bf16PairConvolution>;
    return kernels;
  }();
  return dtype == DType::kBFloat16 ? &kBFloat16 : nullptr;
}

}  // namespace mambaout_kernels::cpu
