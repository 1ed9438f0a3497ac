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
#include "layer_norm.h"
#include "gemm_tile.h"
#include "block_body.h"
#include "downsample_body.h"
#include "dots_body.h"
#include "matmul_body.h"
#include "head_body.h"
#include "peak_body.h"
// clang-format on

namespace mambaout_kernels::cpu {

const Kernels* kernels_avx512(DType dtype) {
  static constexpr Kernels kFloat32 = kernels_for<float>();
  static constexpr Kernels kBFloat16 = kernels_for<BFloat16>();
  static constexpr Kernels kFloat16 = kernels_for<Float16>();
  switch (dtype) {
    case DType::kFloat32: return &kFloat32;
    case DType::kBFloat16: return &kBFloat16;
    case DType::kFloat16: return &kFloat16;
    default: return nullptr;
  }
}

const BlockKernels* block_kernels_avx512(DType multiplied, DType io) {
  return multiplied == DType::kFloat32 ? block_kernels_for<Fp32Products>(io) : nullptr;
}

const DownsampleKernels* downsample_kernels_avx512(DType multiplied, DType in, DType out) {
  return multiplied == DType::kFloat32 ? downsample_kernels_for<Fp32Products>(in, out) : nullptr;
}

const MatmulKernels* matmul_kernels_avx512() { return &kMatmulKernels; }

const HeadKernels* head_kernels_avx512() { return &kHeadKernels; }

const PeakKernel* peak_avx512(DType multiplied) { return multiplied == DType::kFloat32 ? &kPeakFp32 : nullptr; }

}  // namespace mambaout_kernels::cpu
