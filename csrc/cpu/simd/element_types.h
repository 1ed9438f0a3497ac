// Storage types of tensors. Arithmetic is done on what a Vec loads from them.
#pragma once

#include <cstdint>

namespace mambaout_kernels::cpu {

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

}  // namespace mambaout_kernels::cpu
