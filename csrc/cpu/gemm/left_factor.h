// Where the left factor of a product lies: a pointer to its elements, fp32 or bf16; or to bf16 parts of fp32 values,
// one plane for each part, of which a micro-kernel multiplies all. Needs simd/loops.h before it.
#pragma once

#include "packed_format.h"
#include "split.h"

namespace mambaout_kernels::cpu {
namespace {

template <int kParts>
struct PartsPointer {
  BFloat16* at;
  std::int64_t plane;  // elements from part to part
};

template <int kParts>
inline PartsPointer<kParts> operator+(PartsPointer<kParts> p, std::int64_t i) {
  return {p.at + i, p.plane};
}

// The left factor at `data`, of planes of so many elements.
template <typename Left>
struct LeftFactor;
template <typename Element>
struct LeftFactor<Element*> {
  static Element* at(void* data, std::int64_t) { return static_cast<Element*>(data); }
};
template <int kParts>
struct LeftFactor<PartsPointer<kParts>> {
  static PartsPointer<kParts> at(void* data, std::int64_t plane) { return {static_cast<BFloat16*>(data), plane}; }
};

inline void clear(float* p, std::int64_t count) { __builtin_memset(p, 0, count * sizeof(*p)); }
inline void clear(BFloat16* p, std::int64_t count) { __builtin_memset(p, 0, count * sizeof(*p)); }
template <int kParts>
inline void clear(PartsPointer<kParts> p, std::int64_t count) {
  for (int part = 0; part < kParts; ++part) clear(p.at + part * p.plane, count);
}

// Both may overlap.
template <typename Element>
inline void move(Element* to, const Element* from, std::int64_t count) {
  __builtin_memmove(to, from, count * sizeof(Element));
}
template <int kParts>
inline void move(PartsPointer<kParts> to, PartsPointer<kParts> from, std::int64_t count) {
  for (int part = 0; part < kParts; ++part) move(to.at + part * to.plane, from.at + part * from.plane, count);
}

inline void put(float* p, float x) { *p = x; }
inline void put(BFloat16* p, float x) { *p = nearest_bfloat16(x); }
template <int kParts>
inline void put(PartsPointer<kParts> p, float x) {
  split(x, kParts, [&](int part) { return p.at + part * p.plane; });
}

}  // namespace
}  // namespace mambaout_kernels::cpu
