// clang-format off
#include "simd/vec_portable.h"
#include "simd/activations_f64.h"
#include "simd/loops.h"
#include "gated_dwconv/conv_rows.h"
// clang-format on

namespace mambaout_kernels::cpu {
namespace {

template <Act act, typename Element>
struct GateOf : Gate<act, sizeof(Element) == 2> {};
template <Act act>
struct GateOf<act, double> {
  static VecF64 value(VecF64 x) { return map_lanes(x, GateF64<act>::value); }
  static VecF64 slope(VecF64 x) { return map_lanes(x, GateF64<act>::slope); }
  static VecArray<VecF64, 1> value(VecArray<VecF64, 1> x) { return {{value(x.vec[0])}}; }
  static VecArray<VecF64, 1> slope(VecArray<VecF64, 1> x) { return {{slope(x.vec[0])}}; }
};

}  // namespace
}  // namespace mambaout_kernels::cpu

// clang-format off
#include "gated_dwconv/body.h"
#include "gated_dwconv/forward_body.h"
#include "gated_dwconv/backward_body.h"
#include "layer_norm.h"
#include "gemm/fp32_gemm.h"
#include "gated_cnn_block/body.h"
#include "conv3x3s2/body.h"
#include "linear/gemm_nt_body.h"
#include "linear/matmul_body.h"
#include "head/body.h"
#include "simd/exponentials.h"
#include "selective_scan/body.h"
#include "selective_scan/backward_body.h"
#include "peak/body.h"
// clang-format on

namespace mambaout_kernels::cpu {

const GatedDwconvKernels* GatedDwconvKernels::portable(DType dtype) {
  static constexpr GatedDwconvKernels kFloat32 = kernels_for<float>();
  static constexpr GatedDwconvKernels kBFloat16 = kernels_for<BFloat16>();
  static constexpr GatedDwconvKernels kFloat16 = kernels_for<Float16>();
  static constexpr GatedDwconvKernels kFloat64 = kernels_for<double>();
  switch (dtype) {
    case DType::kFloat32: return &kFloat32;
    case DType::kBFloat16: return &kBFloat16;
    case DType::kFloat16: return &kFloat16;
    case DType::kFloat64: return &kFloat64;
  }
  return nullptr;
}

const BlockKernels* BlockKernels::portable(DType compute_dtype, DType io) {
  return compute_dtype == DType::kFloat32 ? block_kernels_for<Fp32Gemm>(io) : nullptr;
}

const Conv3x3s2Kernels* Conv3x3s2Kernels::portable(DType compute_dtype, DType in, DType out) {
  return compute_dtype == DType::kFloat32 ? conv3x3s2_kernels_for<Fp32Gemm>(in, out) : nullptr;
}

const MatmulKernels* MatmulKernels::portable() { return &kMatmulKernels; }

const HeadKernels* HeadKernels::portable() { return &kHeadKernels; }

const ScanKernels* ScanKernels::portable(DType dtype) { return scan_kernels_for(dtype); }

const PeakKernel* PeakKernel::portable(DType compute_dtype) {
  return compute_dtype == DType::kFloat32 ? &kPeakFp32 : nullptr;
}

}  // namespace mambaout_kernels::cpu
