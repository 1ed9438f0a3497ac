// clang-format off
#include "vec_portable.h"
#include "activations_f64.h"
#include "conv_rows.h"
// clang-format on

namespace mambaout_kernels::cpu {
namespace {

template <Act act, typename Element>
struct GateOf : Gate<act, sizeof(Element) == 2> {};
template <Act act>
struct GateOf<act, double> {
  static VecF64 value(VecF64 x) { return map_lanes(x, GateF64<act>::value); }
  static VecF64 slope(VecF64 x) { return map_lanes(x, GateF64<act>::slope); }
  static Several<VecF64, 1> value(Several<VecF64, 1> x) { return {{value(x.part[0])}}; }
  static Several<VecF64, 1> slope(Several<VecF64, 1> x) { return {{slope(x.part[0])}}; }
};

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

const Kernels* kernels_portable(DType dtype) {
  static constexpr Kernels kFloat32 = kernels_for<float>();
  static constexpr Kernels kBFloat16 = kernels_for<BFloat16>();
  static constexpr Kernels kFloat16 = kernels_for<Float16>();
  static constexpr Kernels kFloat64 = kernels_for<double>();
  switch (dtype) {
    case DType::kFloat32: return &kFloat32;
    case DType::kBFloat16: return &kBFloat16;
    case DType::kFloat16: return &kFloat16;
    case DType::kFloat64: return &kFloat64;
  }
  return nullptr;
}

const BlockKernels* block_kernels_portable(DType multiplied, DType io) {
  return multiplied == DType::kFloat32 ? block_kernels_for<Fp32Products>(io) : nullptr;
}

const DownsampleKernels* downsample_kernels_portable(DType multiplied, DType in, DType out) {
  return multiplied == DType::kFloat32 ? downsample_kernels_for<Fp32Products>(in, out) : nullptr;
}

const MatmulKernels* matmul_kernels_portable() { return &kMatmulKernels; }

const HeadKernels* head_kernels_portable() { return &kHeadKernels; }

const PeakKernel* peak_portable(DType multiplied) { return multiplied == DType::kFloat32 ? &kPeakFp32 : nullptr; }

}  // namespace mambaout_kernels::cpu
