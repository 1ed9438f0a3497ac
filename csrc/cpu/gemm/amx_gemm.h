// The micro-kernels of AMX: 32 rows by 32 columns of sums in four tiles, from bf16 as they are, or from fp32 values in
// three parts of bf16. Needs a vec_*.h of 16 lanes, loops.h, fp32_gemm.h, and amx_tiles.h or amx_emulated.h before it.
//
// An fp32 a = a0 + a1 + a2 exactly, each part with 8 bits of it. Of the nine products of a b, those that are left out
// (a1 b2, a2 b1, a2 b2) are below 2^-25 of it, half a rounding of fp32. Sums are of fp32 in the tiles. Where a part or
// a product is below 2^-126, tiles have zero for it.
#pragma once

#include "left_factor.h"

namespace mambaout_kernels::cpu {
namespace {

// The rows of a tile that are asked for; 16 or 32 are read and multiplied.
struct AmxRows {
  int count;
  operator int() const { return count; }
};

// Of values in parts. Vectors of numbers that split() treats in a way of their own are left to it.
template <int kParts>
inline void store(PartsPointer<kParts> p, Vec a) {
  if (all_below(abs(a), kSplitLimit)) {
    for (int part = 0; part < kParts; ++part) {
      const Vec nearest = rounded(a, BFloat16{});
      store(p.at + part * p.plane, nearest);
      a = a - nearest;
    }
  } else {
    float x[Vec::kLanes];
    store(x, a);
    for (int i = 0; i < Vec::kLanes; ++i) put(p + i, x[i]);
  }
}
template <int kParts>
inline void store_lanes(PartsPointer<kParts> p, Vec a, int lanes) {
  if (lanes == Vec::kLanes) return store(p, a);
  float x[Vec::kLanes];
  store(x, a);
  for (int i = 0; i < lanes; ++i) put(p + i, x[i]);
}

// Values of two rows side by side, as the right factor has them, in parts.
template <int kParts>
inline void store_pairs(PartsPointer<kParts> p, Vec even, Vec odd) {
  if (all_below(abs(even), kSplitLimit) && all_below(abs(odd), kSplitLimit)) {
    for (int part = 0; part < kParts; ++part) {
      const Vec first = rounded(even, BFloat16{}), second = rounded(odd, BFloat16{});
      store_interleaved(p.at + part * p.plane, first, second);
      even = even - first;
      odd = odd - second;
    }
  } else {
    float x[2][Vec::kLanes];
    store(x[0], even);
    store(x[1], odd);
    for (int i = 0; i < 2 * Vec::kLanes; ++i) put(p + i, x[i % 2][i / 2]);
  }
}

struct AmxBase {
  using TaskScope = TileScope;
  static constexpr int kMr = 32, kStep = 32, kColumns = 32;

  template <typename Body>
  static void for_each_tile(std::int64_t rows, const Body& body) {
    for (std::int64_t p = 0; p < rows; p += kMr) body(AmxRows{static_cast<int>(min(kMr, rows - p))}, p);
  }

 protected:
  static constexpr std::int64_t kPitch = kColumns * sizeof(float);              // bytes of a row of sums
  static constexpr std::int64_t kPanelPitch = kColumns * 2 * sizeof(BFloat16);  // of a row of pairs

  template <bool kTwo>
  static void zero_sums() {
    TILE_ZERO(0);
    TILE_ZERO(1);
    if constexpr (kTwo) {
      TILE_ZERO(2);
      TILE_ZERO(3);
    }
  }
  template <bool kTwo>
  static void load_sums(const float* sums) {
    TILE_LOAD(0, sums, kPitch);
    TILE_LOAD(1, sums + 16, kPitch);
    if constexpr (kTwo) {
      TILE_LOAD(2, sums + 16 * kColumns, kPitch);
      TILE_LOAD(3, sums + 16 * kColumns + 16, kPitch);
    }
  }
  template <bool kTwo>
  static void store_sums(float* sums) {
    TILE_STORE(0, sums, kPitch);
    TILE_STORE(1, sums + 16, kPitch);
    if constexpr (kTwo) {
      TILE_STORE(2, sums + 16 * kColumns, kPitch);
      TILE_STORE(3, sums + 16 * kColumns + 16, kPitch);
    }
  }
  template <bool kTwo>
  static void load_a(const BFloat16* a, std::int64_t lda) {
    TILE_LOAD(4, a, 2 * lda);
    if constexpr (kTwo) TILE_LOAD(5, a + 16 * lda, 2 * lda);
  }
  static void load_b(const BFloat16* b) {
    TILE_LOAD(6, b, kPanelPitch);
    TILE_LOAD(7, b + 32, kPanelPitch);
  }
  template <bool kTwo>
  static void multiply() {
    TILE_MULTIPLY(0, 4, 6);
    TILE_MULTIPLY(1, 4, 7);
    if constexpr (kTwo) {
      TILE_MULTIPLY(2, 5, 6);
      TILE_MULTIPLY(3, 5, 7);
    }
  }
  static void fetch(const Prefetch& prefetch, std::int64_t step) {
    for (std::int64_t i = 0; i < prefetch.step; i += 64) {
      __builtin_prefetch(prefetch.at + step * prefetch.step + i, 0, 2);
    }
  }
};

// Products of bf16: exact, sums in fp32.
struct AmxBf16Gemm : AmxBase {
  using Element = BFloat16;
  using Left = BFloat16*;
  static constexpr PackedFormat kFormat = {16, 1, kStep};

  template <bool kAdd>
  static void tile(AmxRows rows, const BFloat16* a, std::int64_t lda, const void* panel, std::int64_t depth, float* out,
                   Prefetch prefetch) {
    const auto* b = static_cast<const BFloat16*>(panel);
    rows > 16 ? multiply_all<kAdd, true>(a, lda, b, depth, out, prefetch)
              : multiply_all<kAdd, false>(a, lda, b, depth, out, prefetch);
  }

 private:
  template <bool kAdd, bool kTwo>
  [[gnu::noinline]] static void multiply_all(const BFloat16* a, std::int64_t lda, const BFloat16* b, std::int64_t depth,
                                             float* out, Prefetch prefetch) {
    TILE_MEMORY_BARRIER();
    kAdd ? load_sums<kTwo>(out) : zero_sums<kTwo>();
    for (std::int64_t k = 0; k < depth; k += kStep) {
      fetch(prefetch, k / kStep);
      load_a<kTwo>(a + k, lda);
      load_b(b + k * kColumns);
      multiply<kTwo>();
    }
    store_sums<kTwo>(out);
  }
};

// Products of fp32 in three parts.
struct AmxFp32Gemm : AmxBase {
  static constexpr int kParts = 3;
  using Element = float;
  using Left = PartsPointer<kParts>;
  static constexpr PackedFormat kFormat = {16, kParts, kStep};
  static constexpr std::int64_t kSumDepth = Fp32Gemm::kSumDepth;

  template <bool kAdd>
  static void tile(AmxRows rows, Left a, std::int64_t lda, const void* panel, std::int64_t depth, float* out,
                   Prefetch prefetch) {
    alignas(64) float sums[kMr * kColumns];
    const auto* b = static_cast<const BFloat16*>(panel);
    std::int64_t k = 0;
    do {  // at least once: with no terms the sums are zero
      const std::int64_t terms = min(kSumDepth, depth - k);
      rows > 16 ? multiply_part<true>(a, lda, b, terms, sums, prefetch)
                : multiply_part<false>(a, lda, b, terms, sums, prefetch);
      if (!finite(sums, rows)) multiply_as_fp32(rows, a, lda, b, terms, sums);
      for (int i = 0; i < rows * kColumns; i += Vec::kLanes) {
        store(out + i, k == 0 && !kAdd ? load(sums + i) : load(out + i) + load(sums + i));
      }
      k += kSumDepth;
      a = a + kSumDepth;
      b += kSumDepth * kParts * kColumns;
      prefetch.at += terms / kStep * prefetch.step;
    } while (k < depth);
  }

 private:
  // The small products first. Each part of a is loaded once, of b three times in all.
  template <bool kTwo>
  [[gnu::noinline]] static void multiply_part(Left a, std::int64_t lda, const BFloat16* b, std::int64_t terms,
                                              float* sums, Prefetch prefetch) {
    constexpr std::int64_t kPart = kStep * kColumns;
    TILE_MEMORY_BARRIER();
    zero_sums<kTwo>();
    for (std::int64_t k = 0; k < terms; k += kStep, b += kParts * kPart) {
      fetch(prefetch, k / kStep);
      load_a<kTwo>(a.at + k, lda);
      load_b(b + 2 * kPart);
      multiply<kTwo>();
      load_b(b + kPart);
      multiply<kTwo>();
      load_b(b);
      multiply<kTwo>();
      load_a<kTwo>(a.at + a.plane + k, lda);
      multiply<kTwo>();
      load_b(b + kPart);
      multiply<kTwo>();
      load_a<kTwo>(a.at + 2 * a.plane + k, lda);
      load_b(b);
      multiply<kTwo>();
    }
    store_sums<kTwo>(sums);
  }

  static bool finite(const float* sums, int rows) {
    const Vec zero = broadcast(0.0f);
    Vec left = zero, right = zero;
    for (const float* row = sums; row < sums + rows * kColumns; row += kColumns) {
      left = fma(load(row), zero, left);
      right = fma(load(row + 16), zero, right);
    }
    return sum_of_lanes(left + right) == 0.0f;
  }

  // Infinity times a part that is zero is NaN: such rows are multiplied again, each by itself, as eager has them.
  [[gnu::noinline]] static void multiply_as_fp32(int rows, Left a, std::int64_t lda, const BFloat16* b,
                                                 std::int64_t terms, float* sums) {
    for (int r = 0; r < rows; ++r) {
      if (finite(sums + r * kColumns, 1)) continue;
      const auto left = [&](std::int64_t k) {
        return joined(kParts, [&](int part) { return a.at + part * a.plane + r * lda + k; });
      };
      for (int column = 0; column < kColumns; ++column) {
        float total = 0.0f;
        for (std::int64_t k = 0; k < terms; ++k) {
          const BFloat16* pair = b + k / kStep * kParts * kStep * kColumns + (k % kStep / 2 * kColumns + column) * 2;
          const float right = joined(kParts, [&](int part) { return pair + part * kStep * kColumns + k % 2; });
          total = __builtin_fmaf(left(k), right, total);
        }
        sums[r * kColumns + column] = total;
      }
    }
  }
};

}  // namespace
}  // namespace mambaout_kernels::cpu
