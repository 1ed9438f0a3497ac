// The unit of AMX, once a vec_*.h of 16 lanes and the tiles, amx_tiles.h or amx_emulated.h, are there.
#pragma once

// clang-format off
#include "gated_dwconv/body.h"
#include "layer_norm.h"
#include "gemm/fp32_gemm.h"
#include "gemm/amx_gemm.h"
#include "gated_cnn_block/body.h"
#include "conv3x3s2/body.h"
#include "head/kernels.h"
#include "selective_scan/kernels.h"
#include "linear/gemm_nt_body.h"
#include "linear/amx_matmul_body.h"
#include "peak/amx_body.h"
// clang-format on

namespace mambaout_kernels::cpu {

// As on avx512: the convolution of bf16 pairs is for processors whose dot products of pairs are faster than FMAs.
const GatedDwconvKernels* GatedDwconvKernels::amx_bf16(DType) { return nullptr; }

const BlockKernels* BlockKernels::amx_bf16(DType compute_dtype, DType io) {
  return compute_dtype == DType::kBFloat16 ? block_kernels_for<AmxBf16Gemm>(io) : block_kernels_for<AmxFp32Gemm>(io);
}

const Conv3x3s2Kernels* Conv3x3s2Kernels::amx_bf16(DType compute_dtype, DType in, DType out) {
  return compute_dtype == DType::kBFloat16 ? conv3x3s2_kernels_for<AmxBf16Gemm>(in, out)
                                           : conv3x3s2_kernels_for<AmxFp32Gemm>(in, out);
}

const MatmulKernels* MatmulKernels::amx_bf16() { return &kAmxMatmulKernels; }

const HeadKernels* HeadKernels::amx_bf16() { return nullptr; }

const ScanKernels* ScanKernels::amx_bf16(DType) { return nullptr; }

const PeakKernel* PeakKernel::amx_bf16(DType compute_dtype) {
  return compute_dtype == DType::kBFloat16 ? &kPeakAmxBf16 : &kPeakAmxFp32;
}

}  // namespace mambaout_kernels::cpu
