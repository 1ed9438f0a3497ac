// clang-format off
#include "simd/vec_avx512.h"
#include "simd/activations.h"
#include "simd/loops.h"
#include "gated_dwconv/conv_rows.h"
#include "simd/fp32_only.h"
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

const GatedDwconvKernels* GatedDwconvKernels::avx512(DType dtype) {
  static constexpr GatedDwconvKernels kFloat32 = kernels_for<float>();
  static constexpr GatedDwconvKernels kBFloat16 = kernels_for<BFloat16>();
  static constexpr GatedDwconvKernels kFloat16 = kernels_for<Float16>();
  switch (dtype) {
    case DType::kFloat32: return &kFloat32;
    case DType::kBFloat16: return &kBFloat16;
    case DType::kFloat16: return &kFloat16;
    default: return nullptr;
  }
}

const BlockKernels* BlockKernels::avx512(DType compute_dtype, DType io) {
  return compute_dtype == DType::kFloat32 ? block_kernels_for<Fp32Gemm>(io) : nullptr;
}

const Conv3x3s2Kernels* Conv3x3s2Kernels::avx512(DType compute_dtype, DType in, DType out) {
  return compute_dtype == DType::kFloat32 ? conv3x3s2_kernels_for<Fp32Gemm>(in, out) : nullptr;
}

const MatmulKernels* MatmulKernels::avx512() { return &kMatmulKernels; }

const HeadKernels* HeadKernels::avx512() { return &kHeadKernels; }

const ScanKernels* ScanKernels::avx512(DType dtype) { return scan_kernels_for(dtype); }

const PeakKernel* PeakKernel::avx512(DType compute_dtype) {
  return compute_dtype == DType::kFloat32 ? &kPeakFp32 : nullptr;
}

}  // namespace mambaout_kernels::cpu
