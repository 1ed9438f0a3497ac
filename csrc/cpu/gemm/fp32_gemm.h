// The matrix products' inner loop: a tile of pixels times a panel of columns, sums in registers. Needs a vec_*.h before
// it.
#pragma once

#include <cstdint>

namespace mambaout_kernels::cpu {
namespace {

// Weights that come next, to be brought into L2 while those at hand are multiplied: `step` bytes further at each step
// of a sum. A panel of them is read from L3 or memory once for each chunk of pixels, by the first tile of the chunk,
// which would wait for it: nothing of a model's weights is left in L2 when their turn comes again.
struct Ahead {
  const char* at;
  std::int64_t step;
  [[gnu::always_inline]] void fetch(std::int64_t k) const { __builtin_prefetch(at + k * step, 0, 2); }
};

struct NothingAhead {
  [[gnu::always_inline]] void fetch(std::int64_t) const {}
};

// The factors a(r, k) of a tile of pixels: [pixel][step], or [k][pixels of the tile].
struct PixelByPixel {
  const float* at;
  std::int64_t step;
  [[gnu::always_inline]] float operator()(std::int64_t r, std::int64_t k) const { return at[r * step + k]; }
};
template <int kTileRows>
struct TermByTerm {
  const float* at;
  [[gnu::always_inline]] float operator()(std::int64_t r, std::int64_t k) const { return at[k * kTileRows + r]; }
};

// Products in fp32.
struct Fp32Products {
  using Element = float;
  // Pixels of a tile: two vectors of sums each, two of columns, one of a pixel's value.
  static constexpr int kRows = Vec::kLanes == 16 ? 14 : Vec::kLanes == 8 ? 6 : 4;
  static constexpr int kTermsOfStep = 1;

  // Terms of one sum; the sums of a longer one are added up. One sum of 1536 terms has 3.5 times eager's error.
  static constexpr std::int64_t kSumDepth = 128;

  // put(first sum?, r, left, right) gets sum_k a(r, k) * panel[k][0 .. 2 lanes), in sums of kSumDepth terms.
  template <int kTileRows, typename A, typename AheadOf, typename Put>
  [[gnu::always_inline]] static void multiply(const A& a, const float* b, std::int64_t depth, const AheadOf& ahead,
                                              const Put& put) {
    constexpr int L = Vec::kLanes;
    for (std::int64_t k0 = 0; k0 < depth; k0 += kSumDepth) {
      const std::int64_t k1 = k0 + kSumDepth < depth ? k0 + kSumDepth : depth;
      Vec left[kTileRows], right[kTileRows];
#pragma GCC unroll 16
      for (int r = 0; r < kTileRows; ++r) left[r] = right[r] = broadcast(0.0f);
      for (std::int64_t k = k0; k < k1; ++k) {
        const Vec b0 = load(b + k * 2 * L), b1 = load(b + k * 2 * L + L);
        ahead.fetch(k);
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

  // out[r][0 .. 2 lanes) = sum_k a[r * a_step + k] * panel[k][0 .. 2 lanes), added to what is there if kAdd
  template <int kTileRows, bool kAdd = false>
  [[gnu::noinline]] static void tile(const float* a, std::int64_t a_step, const void* panel, std::int64_t depth,
                                     float* out, Ahead ahead) {
    constexpr int L = Vec::kLanes;
    multiply<kTileRows>(PixelByPixel{a, a_step}, static_cast<const float*>(panel), depth, ahead,
                        [=](bool first, int r, Vec left, Vec right) {
                          float* to = out + r * 2 * L;
                          store(to, first && !kAdd ? left : load(to) + left);
                          store(to + L, first && !kAdd ? right : load(to + L) + right);
                        });
  }
};

// Calls body(Constant<rows>, p) for the tiles that cover pixels [begin, end).
template <int kRows, typename Body>
inline void for_each_gemm_tile(std::int64_t begin, std::int64_t end, const Body& body) {
  std::int64_t p = begin;
  for (; p + kRows <= end; p += kRows) body(Constant<kRows>{}, p);
  if constexpr (kRows > 7) {
    for (; p + 7 <= end; p += 7) body(Constant<7>{}, p);
  }
  if constexpr (kRows > 4) {
    for (; p + 4 <= end; p += 4) body(Constant<4>{}, p);
  }
  for (; p + 2 <= end; p += 2) body(Constant<2>{}, p);
  for (; p < end; ++p) body(Constant<1>{}, p);
}

}  // namespace
}  // namespace mambaout_kernels::cpu
