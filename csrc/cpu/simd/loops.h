// Loops over channels, a vector or a few at a time. Needs a vec_*.h and vec_array.h before it.
#pragma once

#include "../../gated_dwconv.h"

namespace mambaout_kernels::cpu {
namespace {

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
  constexpr operator int() const { return kValue; }
};

inline std::int64_t min(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

template <typename Element>
inline const Element* pixel(const NhwcView& view, std::int64_t n, std::int64_t h, std::int64_t w) {
  return static_cast<const Element*>(view.data) + n * view.stride_n + h * view.stride_h + w * view.stride_w;
}

// Calls body(offset, lanes_in_use) for count channels, a vector at a time; the last may be partial.
template <int kLanes, typename Body>
inline void for_each_vector(std::int64_t count, Body body) {
  std::int64_t offset = 0;
  for (; offset + kLanes <= count; offset += kLanes) body(offset, kLanes);
  if (offset < count) body(offset, static_cast<int>(count - offset));
}
// Calls body(offset, Constant<vectors>, lanes_in_use of the last vector) likewise, up to kMost vectors at a time.
template <typename V, int kMost = V::kUnroll, typename Body>
inline void for_each_vectors(std::int64_t count, Body body) {
  constexpr int kLanes = V::kLanes;
  std::int64_t offset = 0;
  for (; offset + kMost * kLanes <= count; offset += kMost * kLanes) body(offset, Constant<kMost>{}, kLanes);
  if constexpr (kMost > 2) {
    for (; offset + 2 * kLanes <= count; offset += 2 * kLanes) body(offset, Constant<2>{}, kLanes);
  }
  if constexpr (kMost > 1) {
    for (; offset + kLanes <= count; offset += kLanes) body(offset, Constant<1>{}, kLanes);
  }
  if (offset < count) body(offset, Constant<1>{}, static_cast<int>(count - offset));
}
template <typename V, typename Element>
inline V load_lanes(const Element* p, int lanes) {
  return lanes == V::kLanes ? load(p) : load_first(p, lanes);
}
template <typename Element, typename V>
inline void store_lanes(Element* p, V value, int lanes) {
  if (lanes == V::kLanes) {
    store(p, value);
  } else {
    store_first(p, value, lanes);
  }
}

// kCount vectors, of which the last may be partial.
template <int kCount, typename V, typename Element>
inline VecArray<V, kCount> load_array(const Element* p, int lanes) {
  return map<kCount>([&](int i) { return load_lanes<V>(p + i * V::kLanes, lanes); });
}
template <int kCount, typename V, typename Element>
inline void store_array(Element* p, const VecArray<V, kCount>& values, int lanes) {
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) store_lanes(p + i * V::kLanes, values.vec[i], lanes);
}

template <typename V, int kCount, typename Element>
inline void stream_array(Element* p, const VecArray<V, kCount>& values) {
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) stream(p + i * V::kLanes, values.vec[i]);
}

}  // namespace
}  // namespace mambaout_kernels::cpu
