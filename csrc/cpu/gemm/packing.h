// Packing and unpacking of parameters, from one description of the layout. For the dispatchers only: it has inline
// functions, which the translation units of different instruction sets must not share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "packed_format.h"
#include "split.h"

namespace mambaout_kernels::cpu {

// Packs from parameters where Float is const float, unpacks to them where it is float. Offsets and sizes are in bytes.
template <typename Float>
class PackedParameters {
  static constexpr bool kPacks = std::is_const_v<Float>;
  using Byte = std::conditional_t<kPacks, char, const char>;

 public:
  // To pack, data must be zero. It is 64-byte aligned.
  PackedParameters(PackedFormat format, Byte* data) : format_(format), data_(data) {}

  // [count] fp32. A parameter that is left out is packed as `missing`.
  void vector(std::int64_t offset, Float* parameter, std::int64_t count, float missing) const {
    auto* packed = at<float>(offset);
    for (std::int64_t i = 0; i < count; ++i) {
      if constexpr (kPacks) {
        packed[i] = parameter == nullptr ? missing : parameter[i];
      } else {
        parameter[i] = packed[i];
      }
    }
  }

  // (channels, taps) as [channels / lanes][taps][lanes] fp32
  void filters(std::int64_t offset, Float* parameter, std::int64_t channels, std::int64_t taps) const {
    const std::int64_t L = format_.lanes;
    auto* packed = at<float>(offset);
    for (std::int64_t c = 0; c < channels; ++c) {
      for (std::int64_t k = 0; k < taps; ++k) move(parameter + c * taps + k, packed + (c / L * taps + k) * L + c % L);
    }
  }

  // A matrix (rows, depth) in panels of 2 * lanes rows, `panel_step` apart: each [depth][2 * lanes] fp32, or
  // [depth / step][parts][step / 2][2 * lanes][2] bf16. parameter(row, k) points to an element, or is null where there
  // is none: zero.
  template <typename Parameter>
  void panels(std::int64_t offset, std::int64_t panel_step, std::int64_t rows, std::int64_t depth,
              const Parameter& parameter) const {
    const std::int64_t columns = 2 * format_.lanes, step = format_.step;
    for (std::int64_t first = 0; first < rows; first += columns, offset += panel_step) {
      const std::int64_t used = std::min(columns, rows - first);
      for (std::int64_t k = 0; k < depth; ++k) {
        for (std::int64_t j = 0; j < used; ++j) {
          Float* element = parameter(first + j, k);
          if (element == nullptr) continue;
          if (format_.parts == 0) {
            move(element, at<float>(offset) + k * columns + j);
          } else {
            const std::int64_t pair = (k % step / 2 * columns + j) * 2 + k % 2;
            move_parts(element, at<BFloat16>(offset) + k / step * format_.parts * step * columns + pair);
          }
        }
      }
    }
  }

 private:
  template <typename T>
  auto* at(std::int64_t offset) const {
    return reinterpret_cast<std::conditional_t<kPacks, T, const T>*>(data_ + offset);
  }
  template <typename Packed>
  static void move(Float* parameter, Packed* packed) {
    if constexpr (kPacks) {
      *packed = *parameter;
    } else {
      *parameter = *packed;
    }
  }
  template <typename Packed>
  void move_parts(Float* parameter, Packed* packed) const {
    const auto part = [&](int p) { return packed + p * format_.step * 2 * format_.lanes; };
    if constexpr (kPacks) {
      split(*parameter, format_.parts, part);
    } else {
      *parameter = joined(format_.parts, part);
    }
  }

  PackedFormat format_;
  Byte* data_;
};

}  // namespace mambaout_kernels::cpu
