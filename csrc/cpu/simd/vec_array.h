// Several vectors that go through the same operations side by side. An activation is a chain of twenty dependent
// operations; one vector after the other, the processor's scheduler is full of operations that wait. Needs a vec_*.h
// before it.
#pragma once

namespace mambaout_kernels::cpu {
namespace {

template <typename T, int kCount>
struct Several {
  T part[kCount];
};

template <typename T>
constexpr int kCountOf = 0;
template <typename T, int kCount>
constexpr int kCountOf<Several<T, kCount>> = kCount;

// Part i of several, or what all of them share.
template <typename T>
[[gnu::always_inline]] inline T part(const T& shared, int) {
  return shared;
}
template <typename T, int kCount>
[[gnu::always_inline]] inline T part(const Several<T, kCount>& several, int i) {
  return several.part[i];
}

template <int kCount, typename F>
[[gnu::always_inline]] inline auto each(const F& f) {
  Several<decltype(f(0)), kCount> result;
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) result.part[i] = f(i);
  return result;
}

template <typename... T>
constexpr int kMostOf = 0;
template <typename First, typename... Rest>
constexpr int kMostOf<First, Rest...> = kCountOf<First> > kMostOf<Rest...> ? kCountOf<First> : kMostOf<Rest...>;

template <typename A, typename B>
  requires(kMostOf<A, B> > 0)
[[gnu::always_inline]] inline auto operator+(const A& a, const B& b) {
  return each<kMostOf<A, B>>([&](int i) { return part(a, i) + part(b, i); });
}
template <typename A, typename B>
  requires(kMostOf<A, B> > 0)
[[gnu::always_inline]] inline auto operator-(const A& a, const B& b) {
  return each<kMostOf<A, B>>([&](int i) { return part(a, i) - part(b, i); });
}
template <typename A, typename B>
  requires(kMostOf<A, B> > 0)
[[gnu::always_inline]] inline auto operator*(const A& a, const B& b) {
  return each<kMostOf<A, B>>([&](int i) { return part(a, i) * part(b, i); });
}
template <typename A, typename B>
  requires(kMostOf<A, B> > 0)
[[gnu::always_inline]] inline auto operator/(const A& a, const B& b) {
  return each<kMostOf<A, B>>([&](int i) { return part(a, i) / part(b, i); });
}
template <typename A, typename B, typename C>
  requires(kMostOf<A, B, C> > 0)
[[gnu::always_inline]] inline auto fma(const A& a, const B& b, const C& c) {
  return each<kMostOf<A, B, C>>([&](int i) { return fma(part(a, i), part(b, i), part(c, i)); });
}
template <typename A, typename B, typename C>
  requires(kMostOf<A, B, C> > 0)
[[gnu::always_inline]] inline auto fnma(const A& a, const B& b, const C& c) {
  return each<kMostOf<A, B, C>>([&](int i) { return fnma(part(a, i), part(b, i), part(c, i)); });
}
template <typename A, typename B>
  requires(kMostOf<A, B> > 0)
[[gnu::always_inline]] inline auto min(const A& a, const B& b) {
  return each<kMostOf<A, B>>([&](int i) { return min(part(a, i), part(b, i)); });
}
template <typename A, typename B>
  requires(kMostOf<A, B> > 0)
[[gnu::always_inline]] inline auto max(const A& a, const B& b) {
  return each<kMostOf<A, B>>([&](int i) { return max(part(a, i), part(b, i)); });
}
template <typename A, typename B, typename C, typename D>
  requires(kMostOf<A, B, C, D> > 0)
[[gnu::always_inline]] inline auto select_less(const A& a, const B& b, const C& if_less, const D& otherwise) {
  return each<kMostOf<A, B, C, D>>(
      [&](int i) { return select_less(part(a, i), part(b, i), part(if_less, i), part(otherwise, i)); });
}
template <typename T, int kCount>
[[gnu::always_inline]] inline auto abs(const Several<T, kCount>& a) {
  return each<kCount>([&](int i) { return abs(a.part[i]); });
}
template <typename A, typename B>
  requires(kMostOf<A, B> > 0)
[[gnu::always_inline]] inline auto round_product(const A& a, const B& b) {
  return each<kMostOf<A, B>>([&](int i) { return round_product(part(a, i), part(b, i)); });
}
template <typename T, int kCount>
[[gnu::always_inline]] inline auto whole(const Several<T, kCount>& rounded) {
  return each<kCount>([&](int i) { return whole(rounded.part[i]); });
}
template <typename T, int kCount>
[[gnu::always_inline]] inline auto power_of_two(const Several<T, kCount>& rounded) {
  return each<kCount>([&](int i) { return power_of_two(rounded.part[i]); });
}
template <typename Table, typename T, int kCount>
[[gnu::always_inline]] inline auto lookup(const Table& table, const Several<T, kCount>& rounded) {
  return each<kCount>([&](int i) { return lookup(table, rounded.part[i]); });
}

}  // namespace
}  // namespace mambaout_kernels::cpu
