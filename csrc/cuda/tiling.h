// The partition of a launch into blocks of threads: decided here, on the host. What a block computes is the kernels'.
//
// Channels come in chunks of 32, columns in strips. One group of threads (a warp, or half of one where each thread has
// two channels) convolves one strip of one chunk, walking down the rows of a segment, image after image. A block has
// strips x chunks groups. The identity channels are shared out over the chunk groups, at the same pixels.
#pragma once

#include <algorithm>
#include <cstdint>

namespace mambaout_kernels::cuda {

constexpr int kChunk = 32;  // channels

struct Tiling {
  int strips, chunks;          // of a block
  int w_tiles, chunk_groups;   // of the launch
  int segments, segment_rows;  // rows of an image, one after the other
  int images_per_block, image_groups;

  std::int64_t blocks() const { return static_cast<std::int64_t>(w_tiles) * chunk_groups * segments * image_groups; }
};

struct TilingRequest {
  int N, H, W, C;
  int identity_packets;   // per pixel: what one thread moves at once
  int strip;              // pixels
  int max_groups;         // of a block
  int packets_per_block;  // identity packets that a block can take along with one row of its convolution
  int multiprocessors;
  int wanted_blocks;  // enough to fill the device once
  int waves;          // how often it is filled before a block is given a second image
  int most_rows;      // of a block with several images
};

inline int ceil_div(std::int64_t a, std::int64_t b) { return static_cast<int>((a + b - 1) / b); }
// The size of equal parts, none above `most`.
inline int balanced(int total, int most) { return ceil_div(total, ceil_div(total, most)); }

// Likewise of parts that may be smaller, down to half of `most`, where the multiprocessor with the most of them is done
// sooner: there are `times` as many parts, and they are shared out over `multiprocessors`.
inline int fitting(int total, int most, std::int64_t times, int multiprocessors) {
  const auto longest = [=](int size) {
    return std::int64_t{ceil_div(ceil_div(total, size) * times, multiprocessors)} * size;
  };
  int best = balanced(total, most);
  for (int size = most; 2 * size > most; --size) {
    if (longest(size) < longest(best)) best = size;
  }
  return best;
}

inline Tiling choose_tiling(const TilingRequest& r) {
  constexpr int kFewestRows = 4;  // below, a segment is mostly halo
  Tiling t;
  const int strips = ceil_div(r.W, r.strip), chunks = std::max(1, ceil_div(r.C, kChunk));
  t.strips = balanced(strips, r.max_groups);
  t.w_tiles = ceil_div(strips, t.strips);
  t.chunks = r.C == 0 ? r.max_groups / t.strips
                      : fitting(chunks, r.max_groups / t.strips, std::int64_t{r.N} * t.w_tiles, r.multiprocessors);
  const int conv_groups = ceil_div(chunks, t.chunks);
  const int identity_groups =
      ceil_div(static_cast<std::int64_t>(r.identity_packets) * t.strips * r.strip, r.packets_per_block);
  t.chunk_groups = std::max(conv_groups, identity_groups);

  const std::int64_t columns = static_cast<std::int64_t>(t.w_tiles) * conv_groups;
  const int most_segments = ceil_div(r.H, kFewestRows);
  const int segments = std::clamp(ceil_div(r.wanted_blocks, columns * r.N), 1, most_segments);
  t.segment_rows = ceil_div(r.H, segments);
  t.segments = ceil_div(r.H, t.segment_rows);
  // One image after the other only where a segment is the whole image: the sums of one are cleared by the rows that
  // are missing below it.
  const std::int64_t spare = t.segments > 1 ? 1 : columns * r.N / (r.waves * std::int64_t{r.wanted_blocks});
  t.images_per_block =
      static_cast<int>(std::clamp<std::int64_t>(std::min<std::int64_t>(spare, r.most_rows / t.segment_rows), 1, r.N));
  t.image_groups = ceil_div(r.N, t.images_per_block);
  return t;
}

}  // namespace mambaout_kernels::cuda
