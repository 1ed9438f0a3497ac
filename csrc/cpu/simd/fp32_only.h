// All elements are computed on in fp32: there is no fp64. Needs a vec_*.h and activations.h before it.
#pragma once

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
