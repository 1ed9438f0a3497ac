// In what format parameters are packed. Plain data: the translation units of the instruction sets include it.
#pragma once

namespace mambaout_kernels::cpu {

// Panels have 2 * lanes columns, of fp32 (4 bytes) or bf16 (2 bytes).
struct PackedFormat {
  int lanes;
  int element_bytes;

  bool operator==(const PackedFormat&) const = default;
};

// portable, avx2, avx512; avx512_bf16 for bf16 products
constexpr PackedFormat kPackedFormats[] = {{4, 4}, {8, 4}, {16, 4}, {16, 2}};

constexpr int kMaxTileRows = 14;  // of a micro-kernel

}  // namespace mambaout_kernels::cpu
