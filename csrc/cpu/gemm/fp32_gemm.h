// The fp32 micro-kernel: kMr rows (pixels) times a packed panel of kNr = 2 * lanes columns, sums in registers. Needs a
// vec_*.h and loops.h before it.
#pragma once

#include <cstdint>

#include "left_factor.h"

namespace mambaout_kernels::cpu {
namespace {

// Prefetches the weights that come next into L2 while the current ones are multiplied, `step` bytes at each step of k.
// Without it the first tile of each chunk of pixels would wait for every panel: a model's weights do not stay in L2
// from one use to the next.
struct Prefetch {
  const char* at;
  std::int64_t step;
  [[gnu::always_inline]] void fetch(std::int64_t k) const { __builtin_prefetch(at + k * step, 0, 2); }
};

struct NoPrefetch {
  [[gnu::always_inline]] void fetch(std::int64_t) const {}
};

// The left factor a(r, k) of a tile: [row][lda], or packed as [k][rows of the tile].
struct RowMajorA {
  const float* at;
  std::int64_t lda;
  [[gnu::always_inline]] float operator()(std::int64_t r, std::int64_t k) const { return at[r * lda + k]; }
};
template <int kTileRows>
struct PackedA {
  const float* at;
  [[gnu::always_inline]] float operator()(std::int64_t r, std::int64_t k) const { return at[k * kTileRows + r]; }
};

// Calls body(Constant<rows>, p) for the tiles, of kMr rows at most, that cover rows [0, rows).
template <int kMr, typename Body>
inline void for_each_gemm_tile(std::int64_t rows, const Body& body) {
  std::int64_t p = 0;
  for (; p + kMr <= rows; p += kMr) body(Constant<kMr>{}, p);
  if constexpr (kMr > 7) {
    for (; p + 7 <= rows; p += 7) body(Constant<7>{}, p);
  }
  if constexpr (kMr > 4) {
    for (; p + 4 <= rows; p += 4) body(Constant<4>{}, p);
  }
  for (; p + 2 <= rows; p += 2) body(Constant<2>{}, p);
  for (; p < rows; ++p) body(Constant<1>{}, p);
}

struct NoScope {
  NoScope() {}
};

// Products and sums in fp32.
struct Fp32Gemm {
  using Element = float;
  using Left = float*;
  using TaskScope = NoScope;  // what lives as long as a task
  static constexpr PackedFormat kFormat = {Vec::kLanes, 0, 1};
  // Rows of a tile. Registers: two accumulators a row, two vectors of b, one broadcast of a.
  static constexpr int kMr = Vec::kLanes == 16 ? 14 : Vec::kLanes == 8 ? 6 : 4;

  template <typename Body>
  static void for_each_tile(std::int64_t rows, const Body& body) {
    for_each_gemm_tile<kMr>(rows, body);
  }

  // Terms of one partial sum. A single sum of 1536 terms has 3.5 times eager's error.
  static constexpr std::int64_t kSumDepth = 128;

  // Calls put(is_first, r, left, right) with each partial sum_k a(r, k) * panel[k][0 .. 2 lanes) of kSumDepth terms.
  template <int kTileRows, typename A, typename Prefetcher, typename Put>
  [[gnu::always_inline]] static void multiply(const A& a, const float* b, std::int64_t depth,
                                              const Prefetcher& prefetch, const Put& put) {
    constexpr int L = Vec::kLanes;
    for (std::int64_t k0 = 0; k0 < depth; k0 += kSumDepth) {
      const std::int64_t k1 = k0 + kSumDepth < depth ? k0 + kSumDepth : depth;
      Vec left[kTileRows], right[kTileRows];
#pragma GCC unroll 16
      for (int r = 0; r < kTileRows; ++r) left[r] = right[r] = broadcast(0.0f);
      for (std::int64_t k = k0; k < k1; ++k) {
        const Vec b0 = load(b + k * 2 * L), b1 = load(b + k * 2 * L + L);
        prefetch.fetch(k);
#pragma GCC unroll 16
        for (int r = 0; r < kTileRows; ++r) {
          const Vec value = broadcast(a(r, k));
          left[r] = fma(value, b0, left[r]);
          right[r] = fma(value, b1, right[r]);
        }
      }
#pragma GCC unroll 16
      for (int r = 0; r < kTileRows; ++r) put(k0 == 0, r, left[r], right[r]);
    }
  }

  // out[r][0 .. 2 lanes) = sum_k a[r * lda + k] * panel[k][0 .. 2 lanes), added to what is there if kAdd
  template <bool kAdd, int kTileRows>
  [[gnu::noinline]] static void tile(Constant<kTileRows>, const float* a, std::int64_t lda, const void* panel,
                                     std::int64_t depth, float* out, Prefetch prefetch) {
    constexpr int L = Vec::kLanes;
    multiply<kTileRows>(RowMajorA{a, lda}, static_cast<const float*>(panel), depth, prefetch,
                        [=](bool first, int r, Vec left, Vec right) {
                          float* to = out + r * 2 * L;
                          store(to, first && !kAdd ? left : load(to) + left);
                          store(to + L, first && !kAdd ? right : load(to + L) + right);
                        });
  }
};

}  // namespace
}  // namespace mambaout_kernels::cpu
