// Rows of pixels, one chunk of channels of each, from global into shared memory.
#pragma once

#include "packet.cuh"
#include "tiling.h"

namespace mambaout_kernels::cuda {

// What a block is to do: its place in the launch (tiling.h).
struct BlockPlace {
  int group, w0, h0, h1, n0, n1;

  __device__ __forceinline__ BlockPlace(const Tiling& t, unsigned block, int tile_w, int N, int H) {
    group = block % t.chunk_groups;
    block /= t.chunk_groups;
    w0 = (block % t.w_tiles) * tile_w;
    block /= t.w_tiles;
    h0 = (block % t.segments) * t.segment_rows;
    h1 = h0 + min(t.segment_rows, H - h0);
    n0 = (block / t.segments) * t.images_per_block;
    n1 = n0 + min(t.images_per_block, N - n0);
  }
};

// A place in the sequence of rows that a block walks down, [first, end) of image after image.
struct RowStep {
  int n, row;

  __device__ __forceinline__ void advance(int first, int end) {
    if (++row < end) return;
    row = first;
    ++n;
  }
  // The pixel w of the row `above` rows above.
  __device__ __forceinline__ std::int64_t pixel(int above, int w, int H, int W) const {
    return (n * H + row - above) * W + w;
  }
};

// How pixels of a chunk lie in shared memory: [pixel][kPixel]. Where the elements are two bytes and not aligned to 16,
// whole words are copied; the first channel is then the phase-th element (0 or 1), and a pixel has one word more.
template <typename T, bool kAligned>
struct StagedRow {
  static constexpr bool kPhased = !kAligned && sizeof(T) == 2;
  static constexpr int kPixel = kChunk + (kPhased ? 2 : 0);

  __device__ __forceinline__ static int phase(const T* first_channel) {
    return kPhased ? static_cast<int>(reinterpret_cast<std::uintptr_t>(first_channel) / 2 % 2) : 0;
  }
};

// One thread's part in copying the pixels of a tile's row, kHalo / 2 of them to each side of the tile: the same packets
// in every row, so that everything but the row is known beforehand. What lies outside the row of W pixels, or beyond
// the last channel, is never written. A group of threads takes part for every strip of kStrip pixels.
template <typename T, bool kAligned, int kGroup, int kStrip, int kHalo>
class RowCopy {
  using Row = StagedRow<T, kAligned>;
  static constexpr int kBytes = kAligned ? 16 : 4, kPart = kBytes / sizeof(T);  // elements at once
  static constexpr int kParts = (Row::kPixel + kPart - 1) / kPart;              // of a pixel
  static constexpr int kTogether = kAligned ? kGroup / kParts : kGroup / 16;    // pixels, of a group at a time
  static constexpr int kMost = (kStrip + kHalo + kTogether - 1) / kTogether;    // pixels of a thread

 public:
  // This thread is `worker` of those of `strips` groups. The tile begins at pixel w0.
  __device__ __forceinline__ RowCopy(int worker, int strips, int w0, int W, int channels, int pitch) {
    constexpr int kThreads = kAligned ? kParts : 16;  // of a pixel
    const int q = worker / kThreads, c = worker % kThreads * kPart, count = strips * kStrip + kHalo;
    stride_ = strips * kTogether;
    pitch_ = pitch;
    from_ = (q - kHalo / 2) * pitch_ + c;
    to_ = q * Row::kPixel + c;
    channels_ = kAligned ? 0 : channels - c;
    wanted_ = 0;
#pragma unroll
    for (int j = 0; j < kMost; ++j) {
      const int pixel = q + j * stride_;
      const bool exists = pixel < count && static_cast<unsigned>(w0 + pixel - kHalo / 2) < static_cast<unsigned>(W);
      if (exists && (!kAligned || c < channels)) wanted_ |= 1u << j;
    }
  }

  // Starts the copy. `row`: the chunk's first channel at pixel w0 of the row.
  __device__ __forceinline__ void start(T* to, const T* row) const {
    to += to_;
    row += from_;
#pragma unroll
    for (int j = 0; j < kMost; ++j) {
      if (!(wanted_ >> j & 1)) continue;
      T* const to_pixel = to + j * stride_ * Row::kPixel;
      const T* const pixel = row + static_cast<std::int64_t>(j * stride_ * pitch_);
      if constexpr (kAligned) {
        copy_async_16(to_pixel, pixel);
      } else {
        const int before = Row::phase(pixel);
#pragma unroll
        for (int part = 0; part < kParts; part += 16) {
          const int c = part * kPart;
          const bool in_pixel = part + 16 <= kParts || to_ % Row::kPixel + c < Row::kPixel;
          const int left = channels_ + before - c;
          if (in_pixel && left > 0) copy_async_4(to_pixel + c, pixel - before + c, Row::kPhased && left == 1 ? 2 : 4);
        }
      }
    }
  }

 private:
  int stride_, pitch_, from_, to_, channels_;
  unsigned wanted_;
};

// All threads: zeros, for what RowCopy never writes.
__device__ __forceinline__ void clear_shared(void* memory, int bytes) {
  for (int i = threadIdx.x * 16; i < bytes; i += blockDim.x * 16) {
    *reinterpret_cast<uint4*>(static_cast<unsigned char*>(memory) + i) = make_uint4(0, 0, 0, 0);
  }
}

// Parameters may be fp32 beside low-precision activations.
template <typename T>
__device__ __forceinline__ float load_parameter(const void* parameter, bool is_float32, std::int64_t index) {
  return is_float32 ? static_cast<const float*>(parameter)[index] : to_float(static_cast<const T*>(parameter)[index]);
}

// weight (C, 1, K, K) of channels [c0, c0 + channels) into shared [channels][K * K], 16 bytes at a time where they are
// aligned. All threads; complete behind the next barrier. channels <= 0: nothing.
template <typename T, int K>
__device__ __forceinline__ void stage_weights(float* to, const void* weight, bool is_float32, int c0, int channels) {
  const std::int64_t first = static_cast<std::int64_t>(c0) * K * K;
  const int count = max(channels, 0) * K * K, threads = blockDim.x;
  if (sizeof(T) == 4 || is_float32) {
    const float* const from = static_cast<const float*>(weight) + first;
    const int whole = reinterpret_cast<std::uintptr_t>(from) % 16 == 0 ? count & ~3 : 0;
    for (int i = threadIdx.x * 4; i < whole; i += threads * 4) copy_async_16(to + i, from + i);
    for (int i = whole + threadIdx.x; i < count; i += threads) to[i] = from[i];
  } else {
    using Wide = Packet<T, true>;
    const T* const from = static_cast<const T*>(weight) + first;
    const int whole = reinterpret_cast<std::uintptr_t>(from) % 16 == 0 ? count / Wide::kChannels * Wide::kChannels : 0;
    for (int i = threadIdx.x * Wide::kChannels; i < whole; i += threads * Wide::kChannels) {
      const Wide values = Wide::load(from + i);
#pragma unroll
      for (int pair = 0; pair < Wide::kPairs; ++pair) values.get(pair).store(to + i + 2 * pair);
    }
    for (int i = whole + threadIdx.x; i < count; i += threads) to[i] = to_float(from[i]);
  }
  commit_copies();
  wait_copies<0>();
}
// All taps of this thread's channels, the first of which is `channel` of the chunk. kFlipped: the last tap first.
template <int K, int kLanes, bool kFlipped = false>
__device__ __forceinline__ void read_weights(const float* from, int channel, Lanes<kLanes> (&weight)[K * K]) {
#pragma unroll
  for (int tap = 0; tap < K * K; ++tap) {
    const int at = channel * K * K + (kFlipped ? K * K - 1 - tap : tap);
    if constexpr (kLanes == 1) {
      weight[tap] = {from[at]};
    } else {
      weight[tap] = {make_float2(from[at], from[at + K * K])};
    }
  }
}
template <typename T, int kLanes>
__device__ __forceinline__ Lanes<kLanes> load_bias(const void* bias, bool is_float32, int channel, int C) {
  const float first = channel < C ? load_parameter<T>(bias, is_float32, channel) : 0.0f;
  if constexpr (kLanes == 1) {
    return {first};
  } else {
    return {make_float2(first, channel + 1 < C ? load_parameter<T>(bias, is_float32, channel + 1) : 0.0f)};
  }
}

}  // namespace mambaout_kernels::cuda
