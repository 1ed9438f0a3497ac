// Matrices in the order in which gemm_tile.h and bf16_products.h read them: for the dispatchers only.
#pragma once

#include <algorithm>
#include <cstdint>

#include "convert.h"

namespace mambaout_kernels::cpu {

// A panel [depth][columns] of value(j, k), j < rows: the j-th output's factor of the k-th input; zero for other j. In
// two bytes an element, as bf16: [depth / 2][columns][2].
template <typename Value>
void pack_panel(void* to, std::int64_t element_bytes, std::int64_t columns, std::int64_t rows, std::int64_t depth,
                const Value& value) {
  for (std::int64_t k = 0; k < depth; ++k) {
    for (std::int64_t j = 0; j < columns; ++j) {
      const float x = j < rows ? value(j, k) : 0.0f;
      if (element_bytes == 4) {
        static_cast<float*>(to)[k * columns + j] = x;
      } else {
        narrow(x, static_cast<BFloat16*>(to) + (k / 2 * columns + j) * 2 + k % 2);
      }
    }
  }
}

}  // namespace mambaout_kernels::cpu
