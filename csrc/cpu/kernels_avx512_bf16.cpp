// clang-format off
#include "simd/vec_avx512.h"
#include "simd/activations.h"
#include "simd/loops.h"
#include "gated_dwconv/conv_rows.h"
#include "simd/fp32_only.h"
#include "gated_dwconv/body.h"
#include "gated_dwconv/forward_body.h"
#include "gated_dwconv/backward_body.h"
#include "gated_dwconv/bf16_pairs.h"
#include "layer_norm.h"
#include "gemm/fp32_gemm.h"
#include "gemm/bf16_gemm.h"
#include "gated_cnn_block/body.h"
#include "conv3x3s2/body.h"
#include "head/kernels.h"
#include "selective_scan/kernels.h"
#include "linear/kernels.h"
#include "peak/body.h"
// clang-format on

namespace mambaout_kernels::cpu {

const GatedDwconvKernels* GatedDwconvKernels::avx512_bf16(DType dtype) {
  static constexpr GatedDwconvKernels kBFloat16 = [] {
    GatedDwconvKernels kernels = kernels_for<BFloat16>();
    kernels.forward_pairs = forward_any<BFloat16, Bf16PairConvolution>;
    return kernels;
  }();
  return dtype == DType::kBFloat16 ? &kBFloat16 : nullptr;
}

const BlockKernels* BlockKernels::avx512_bf16(DType compute_dtype, DType io) {
  return compute_dtype == DType::kBFloat16 ? block_kernels_for<Bf16Gemm>(io) : nullptr;
}

const Conv3x3s2Kernels* Conv3x3s2Kernels::avx512_bf16(DType compute_dtype, DType in, DType out) {
  return compute_dtype == DType::kBFloat16 ? conv3x3s2_kernels_for<Bf16Gemm>(in, out) : nullptr;
}

const MatmulKernels* MatmulKernels::avx512_bf16() { return nullptr; }

const HeadKernels* HeadKernels::avx512_bf16() { return nullptr; }

const ScanKernels* ScanKernels::avx512_bf16(DType) { return nullptr; }

const PeakKernel* PeakKernel::avx512_bf16(DType compute_dtype) {
  return compute_dtype == DType::kBFloat16 ? &kPeakBf16 : nullptr;
}

}  // namespace mambaout_kernels::cpu
