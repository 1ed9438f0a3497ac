// The tile registers of AMX: 8 of 16 rows of 64 bytes. Numbers of registers are literals.
#pragma once

#include <immintrin.h>

namespace mambaout_kernels::cpu {
namespace {

// Tiles are in use while it lives. They are of the thread, which other libraries use as well: released at the end.
class TileScope {
 public:
  TileScope() {
    struct alignas(64) Configuration {
      unsigned char palette = 1, start_row = 0, reserved[14] = {};
      unsigned short row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      unsigned char rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    static constexpr Configuration kConfiguration;
    static_assert(sizeof(Configuration) == 64);
    _tile_loadconfig(&kConfiguration);
  }
  ~TileScope() { _tile_release(); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

// GCC's tile loads do not say that they read memory.
#define TILE_MEMORY_BARRIER() asm volatile("" ::: "memory")
#define TILE_ZERO(tile) _tile_zero(tile)
#define TILE_LOAD(tile, from, step) _tile_loadd(tile, from, step)
#define TILE_STORE(tile, to, step) _tile_stored(tile, to, step)
#define TILE_MULTIPLY(sums, a, b) _tile_dpbf16ps(sums, a, b)

}  // namespace
}  // namespace mambaout_kernels::cpu
