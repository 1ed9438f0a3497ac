// The format in which parameters are packed. Plain data; no template, no STL.
#pragma once

#include <cstdint>

namespace mambaout_kernels::cpu {

// Panels have 2 * lanes columns. An element is an fp32 (no parts), or the sum of so many bf16: one is a bf16, three are
// all bits of an fp32. Depths are padded to whole steps of a micro-kernel.
struct PackedFormat {
  int lanes;
  int parts;
  int step;

  bool operator==(const PackedFormat&) const = default;
  constexpr int element_bytes() const { return parts == 0 ? 4 : 2 * parts; }
};

// Of portable, avx2, avx512; of avx512_bf16 for bf16 products; of amx_bf16 for bf16 and fp32 products.
constexpr PackedFormat kPackedFormats[] = {{4, 0, 1}, {8, 0, 1}, {16, 0, 1}, {16, 1, 2}, {16, 1, 32}, {16, 3, 32}};

constexpr int kMaxMr = 32;  // the most rows of a micro-kernel's tile

// Rows beyond the last that a micro-kernel reads, and multiplies for nothing: the tiles of amx_bf16 have 16 rows.
constexpr std::int64_t rows_read_beyond(PackedFormat format) { return format.step == 32 ? 15 : 0; }

}  // namespace mambaout_kernels::cpu
