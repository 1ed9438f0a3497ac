// The format in which parameters are packed. Plain data; no template, no STL.
#pragma once

namespace mambaout_kernels::cpu {

// Panels have 2 * lanes columns, of fp32 (4 bytes) or bf16 (2 bytes).
struct PackedFormat {
  int lanes;
  int element_bytes;

  bool operator==(const PackedFormat&) const = default;
};

// Of portable, avx2, avx512; of avx512_bf16 for bf16 products.
constexpr PackedFormat kPackedFormats[] = {{4, 4}, {8, 4}, {16, 4}, {16, 2}};

constexpr int kMaxMr = 14;  // the most rows of a micro-kernel's tile

}  // namespace mambaout_kernels::cpu
