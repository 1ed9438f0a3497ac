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

// clang-format off
#include "kernel_body.h"
#include "forward_body.h"
#include "backward_body.h"
#include "bf16_pairs.h"
#include "layer_norm.h"
#include "gemm_tile.h"
#include "bf16_products.h"
#include "block_body.h"
#include "downsample_body.h"
#include "peak_body.h"
// clang-format on

namespace mambaout_kernels::cpu {

const Kernels* kernels_avx512_bf16(DType dtype) {
  static constexpr Kernels kBFloat16 = [] {
    Kernels kernels = kernels_for<BFloat16>();
    kernels.forward_pairs = forward_any<BFloat16, Bf16PairConvolution>;
    return kernels;
  }();
  return dtype == DType::kBFloat16 ? &kBFloat16 : nullptr;
}

const BlockKernels* block_kernels_avx512_bf16(DType multiplied, DType io) {
  return multiplied == DType::kBFloat16 ? block_kernels_for<Bf16Products>(io) : nullptr;
}

const DownsampleKernels* downsample_kernels_avx512_bf16(DType multiplied, DType in, DType out) {
  return multiplied == DType::kBFloat16 ? downsample_kernels_for<Bf16Products>(in, out) : nullptr;
}

const PeakKernel* peak_avx512_bf16(DType multiplied) { return multiplied == DType::kBFloat16 ? &kPeakBf16 : nullptr; }

}  // namespace mambaout_kernels::cpu
