// amx_tiles.h in C++, for processors without AMX: its arithmetic to the bit, as the instruction's description has it,
// and an end of the program where tiles are used that are not configured.
#pragma once

#include <cstdlib>
#include <cstring>

#include "split.h"

namespace mambaout_kernels::cpu {

void multiply_tiles(unsigned char* sums, const unsigned char* a, const unsigned char* b);  // amx_emulated.cpp

namespace {

class EmulatedTiles {
 public:
  void configure() {
    if (configured_) std::abort();
    configured_ = true;
    std::memset(data_, 0xff, sizeof(data_));  // NaN: only what was loaded or set to zero counts
  }
  void release() { configured_ = false; }

  void zero(int tile) { std::memset(rows(tile), 0, kBytes); }
  void load(int tile, const void* from, std::int64_t step) {
    for (int r = 0; r < 16; ++r) std::memcpy(rows(tile)[r], static_cast<const char*>(from) + r * step, 64);
  }
  void store(int tile, void* to, std::int64_t step) {
    for (int r = 0; r < 16; ++r) std::memcpy(static_cast<char*>(to) + r * step, rows(tile)[r], 64);
  }

  void multiply(int sums, int a, int b) { multiply_tiles(*rows(sums), *rows(a), *rows(b)); }

 private:
  static constexpr std::size_t kBytes = 1024;
  using Rows = unsigned char (*)[64];

  Rows rows(int tile) {
    if (!configured_) std::abort();
    return reinterpret_cast<Rows>(data_ + tile * kBytes);
  }

  bool configured_ = false;
  alignas(64) unsigned char data_[8 * kBytes];
};

inline thread_local EmulatedTiles emulated_tiles;

class TileScope {
 public:
  TileScope() { emulated_tiles.configure(); }
  ~TileScope() { emulated_tiles.release(); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

#define TILE_MEMORY_BARRIER()
#define TILE_ZERO(tile) emulated_tiles.zero(tile)
#define TILE_LOAD(tile, from, step) emulated_tiles.load(tile, from, step)
#define TILE_STORE(tile, to, step) emulated_tiles.store(tile, to, step)
#define TILE_MULTIPLY(sums, a, b) emulated_tiles.multiply(sums, a, b)

}  // namespace
}  // namespace mambaout_kernels::cpu
