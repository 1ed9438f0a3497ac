// A few vectors that go through the same operations side by side: an activation is a chain of some twenty dependent
// operations, and independent chains hide their latency. Needs a vec_*.h before it.
#pragma once

namespace mambaout_kernels::cpu {
namespace {

template <typename T, int kCount>
struct VecArray {
  T vec[kCount];
};

template <typename T>
constexpr int kCountOf = 0;
template <typename T, int kCount>
constexpr int kCountOf<VecArray<T, kCount>> = kCount;

// Vector i of an array, or the one that all share.
template <typename T>
[[gnu::always_inline]] inline T vec_of(const T& shared, int) {
  return shared;
}
template <typename T, int kCount>
[[gnu::always_inline]] inline T vec_of(const VecArray<T, kCount>& array, int i) {
  return array.vec[i];
}

template <int kCount, typename F>
[[gnu::always_inline]] inline auto map(const F& f) {
  VecArray<decltype(f(0)), kCount> result;
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) result.vec[i] = f(i);
  return result;
}

template <typename... T>
constexpr int kMaxCountOf = 0;
template <typename First, typename... Rest>
constexpr int kMaxCountOf<First, Rest...> =
    kCountOf<First> > kMaxCountOf<Rest...> ? kCountOf<First> : kMaxCountOf<Rest...>;

template <typename A, typename B>
  requires(kMaxCountOf<A, B> > 0)
[[gnu::always_inline]] inline auto operator+(const A& a, const B& b) {
  return map<kMaxCountOf<A, B>>([&](int i) { return vec_of(a, i) + vec_of(b, i); });
}
template <typename A, typename B>
  requires(kMaxCountOf<A, B> > 0)
[[gnu::always_inline]] inline auto operator-(const A& a, const B& b) {
  return map<kMaxCountOf<A, B>>([&](int i) { return vec_of(a, i) - vec_of(b, i); });
}
template <typename A, typename B>
  requires(kMaxCountOf<A, B> > 0)
[[gnu::always_inline]] inline auto operator*(const A& a, const B& b) {
  return map<kMaxCountOf<A, B>>([&](int i) { return vec_of(a, i) * vec_of(b, i); });
}
template <typename A, typename B>
  requires(kMaxCountOf<A, B> > 0)
[[gnu::always_inline]] inline auto operator/(const A& a, const B& b) {
  return map<kMaxCountOf<A, B>>([&](int i) { return vec_of(a, i) / vec_of(b, i); });
}
template <typename A, typename B, typename C>
  requires(kMaxCountOf<A, B, C> > 0)
[[gnu::always_inline]] inline auto fma(const A& a, const B& b, const C& c) {
  return map<kMaxCountOf<A, B, C>>([&](int i) { return fma(vec_of(a, i), vec_of(b, i), vec_of(c, i)); });
}
template <typename A, typename B, typename C>
  requires(kMaxCountOf<A, B, C> > 0)
[[gnu::always_inline]] inline auto fnma(const A& a, const B& b, const C& c) {
  return map<kMaxCountOf<A, B, C>>([&](int i) { return fnma(vec_of(a, i), vec_of(b, i), vec_of(c, i)); });
}
template <typename A, typename B>
  requires(kMaxCountOf<A, B> > 0)
[[gnu::always_inline]] inline auto min(const A& a, const B& b) {
  return map<kMaxCountOf<A, B>>([&](int i) { return min(vec_of(a, i), vec_of(b, i)); });
}
template <typename A, typename B>
  requires(kMaxCountOf<A, B> > 0)
[[gnu::always_inline]] inline auto max(const A& a, const B& b) {
  return map<kMaxCountOf<A, B>>([&](int i) { return max(vec_of(a, i), vec_of(b, i)); });
}
template <typename A, typename B, typename C, typename D>
  requires(kMaxCountOf<A, B, C, D> > 0)
[[gnu::always_inline]] inline auto select_less(const A& a, const B& b, const C& if_less, const D& otherwise) {
  return map<kMaxCountOf<A, B, C, D>>(
      [&](int i) { return select_less(vec_of(a, i), vec_of(b, i), vec_of(if_less, i), vec_of(otherwise, i)); });
}
template <typename T, int kCount>
[[gnu::always_inline]] inline auto abs(const VecArray<T, kCount>& a) {
  return map<kCount>([&](int i) { return abs(a.vec[i]); });
}
template <typename A, typename B>
  requires(kMaxCountOf<A, B> > 0)
[[gnu::always_inline]] inline auto round_product(const A& a, const B& b) {
  return map<kMaxCountOf<A, B>>([&](int i) { return round_product(vec_of(a, i), vec_of(b, i)); });
}
template <typename A, typename B>
  requires(kMaxCountOf<A, B> > 0)
[[gnu::always_inline]] inline auto times_power_of_two(const A& a, const B& n) {
  return map<kMaxCountOf<A, B>>([&](int i) { return times_power_of_two(vec_of(a, i), vec_of(n, i)); });
}
template <typename T, int kCount>
[[gnu::always_inline]] inline auto to_float(const VecArray<T, kCount>& rounded) {
  return map<kCount>([&](int i) { return to_float(rounded.vec[i]); });
}
template <typename T, int kCount>
[[gnu::always_inline]] inline auto power_of_two(const VecArray<T, kCount>& rounded) {
  return map<kCount>([&](int i) { return power_of_two(rounded.vec[i]); });
}
template <typename Table, typename T, int kCount>
[[gnu::always_inline]] inline auto lookup(const Table& table, const VecArray<T, kCount>& rounded) {
  return map<kCount>([&](int i) { return lookup(table, rounded.vec[i]); });
}

}  // namespace
}  // namespace mambaout_kernels::cpu
