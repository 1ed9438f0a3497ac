// clang-format off
#include "simd/vec_avx512.h"
#include "simd/activations.h"
#include "simd/loops.h"
#include "gated_dwconv/conv_rows.h"
#include "simd/fp32_only.h"
#include "gemm/amx_tiles.h"
// clang-format on

#include "kernels_amx_body.h"
