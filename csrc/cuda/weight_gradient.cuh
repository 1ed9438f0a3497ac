// dweight[c,kh,kw] = sum_{n,h,w} e[h,w,c] * x[h+kh-R, w+kw-R, c];   dbias[c] = sum_{n,h,w} e[h,w,c]
//
// One pass down the rows of x, as depthwise.cuh makes it, over a ring in shared memory whose stages hold row r of x
// with its halo and row r + R of e. A thread keeps the sums of all taps and its window, the rows r - R to r + R of e;
// the pixels of row r stream by, each multiplied by all that a tap pairs it with. At its end a block adds up its strips
// and writes one slot of partial sums; sum_partials_kernel adds the slots, in a fixed order.
#pragma once

#include "packet.cuh"
#include "split_backward.h"
#include "staging.cuh"

namespace mambaout_kernels::cuda {

template <typename T>
struct WeightGradientArgs {
  Tiling tiling;
  int x_elements, stage_elements;  // of shared memory: of one chunk's x, and of a stage
  int N, H, W, C;
  std::int64_t x_row, e_row;  // elements from one row to the next
  const T* x;                 // (N, H, W, C), pixels x_pitch elements apart
  int x_pitch;
  const T* e;       // (N, H, W, C)
  float* partials;  // [slot][K * K + 1][C]: dweight by taps, then dbias
};

template <typename T>
struct WeightGradientTraits {
  static constexpr int K = kDepthwiseKernelSize, R = K / 2, kStrip = kWeightGradientStrip;
  static constexpr int kGroup = kChunk;  // threads: one channel each
  // All that registers allow: 99 of them hold the window and the sums.
  static constexpr int kMaxThreads = kWeightGradientGroups * kGroup, kMinBlocks = sizeof(T) == 2 ? 4 : 3;
  static constexpr int kStages = sizeof(T) == 2 ? 8 : 5;
  static constexpr int kTaps = K * K + 1;  // the last: dbias

  // Elements of one stage of one chunk: of x, with its halo, and of x and e.
  __host__ __device__ static int x_elements(const Tiling& t) { return (t.strips * kStrip + K - 1) * kChunk; }
  __host__ __device__ static int chunk_elements(const Tiling& t) { return x_elements(t) + t.strips * kStrip * kChunk; }
  static int threads(const Tiling& t) { return t.strips * t.chunks * kGroup; }
  // The sums pass through the ring's memory.
  __host__ __device__ static int ring_bytes(const Tiling& t) {
    return kStages * t.chunks * chunk_elements(t) * static_cast<int>(sizeof(T));
  }
  static int shared_bytes(const Tiling& t) {
    const int ring = ring_bytes(t), sums = threads(t) * kTaps * 4;
    return ring > sums ? ring : sums;
  }
};

template <typename T>
__global__ void __launch_bounds__(WeightGradientTraits<T>::kMaxThreads, WeightGradientTraits<T>::kMinBlocks)
    weight_gradient_kernel(const WeightGradientArgs<T> args) {
  using Traits = WeightGradientTraits<T>;
  using Value = Lanes<1>;
  constexpr int K = Traits::K, R = Traits::R, kStrip = Traits::kStrip, kStages = Traits::kStages;
  constexpr int kGroup = Traits::kGroup, kTaps = Traits::kTaps;

  const Tiling& tiling = args.tiling;
  const int H = args.H, W = args.W, C = args.C;
  const int tile_w = tiling.strips * kStrip;
  const BlockPlace place(tiling, blockIdx.x, tile_w, args.N, H);

  const int group = threadIdx.x / kGroup, lane = threadIdx.x % kGroup;
  const int chunk = group / tiling.strips, strip = group % tiling.strips;
  const int c0 = (place.group * tiling.chunks + chunk) * kChunk, channels = C - c0;
  const bool adding = channels > 0 && place.w0 + strip * kStrip < W;

  T* const ring = reinterpret_cast<T*>(dynamic_shared());
  T* const ring_of_chunk = ring + chunk * Traits::chunk_elements(tiling);
  const int x_elements = args.x_elements, stage_elements = args.stage_elements;
  clear_shared(ring, Traits::ring_bytes(tiling));
  __syncthreads();

  // Steps `row` in [first, end): those above the image only bring rows of e into the window, and steps from e_end on
  // bring none. Rows of e outside of the segment are other blocks'. A block has several images only where each is one
  // segment: their rows then follow one another in memory.
  const int first = place.h0 - R, end = min(place.h1 + R, H), e_end = place.h1 - R;

  // A thread's part in copying, as RowCopy has it, of both rows; with two of these registers do not suffice.
  constexpr int kPart = Packet<T, true>::kChannels, kTogether = kGroup * kPart / kChunk;  // pixels, of a group at once
  constexpr int kMostX = (kStrip + K - 1 + kTogether - 1) / kTogether, kMostE = (kStrip + kTogether - 1) / kTogether;
  const int worker = threadIdx.x - chunk * tiling.strips * kGroup, stride = tiling.strips * kTogether;
  const int pixel = worker * kPart / kChunk, channel = worker * kPart % kChunk;
  unsigned wanted = 0;
  if (channel < channels) {
#pragma unroll
    for (int j = 0; j < kMostX; ++j) {
      const int q = pixel + j * stride, w = place.w0 + q - R;
      if (q < tile_w + K - 1 && w >= 0 && w < W) wanted |= 1u << j;
    }
#pragma unroll
    for (int j = 0; j < kMostE; ++j) {
      const int q = pixel + j * stride;
      if (q < tile_w && place.w0 + q < W) wanted |= 1u << (kMostX + j);
    }
  }
  const std::int64_t rows_before = static_cast<std::int64_t>(place.n0) * H;
  const std::int64_t x_pixel = (rows_before + max(first, 0)) * W + place.w0 + pixel - R;
  const std::int64_t e_pixel = (rows_before + place.h0) * W + place.w0 + pixel;
  const T* x_from = args.x + x_pixel * args.x_pitch + c0 + channel;
  const T* e_from = args.e + e_pixel * C + c0 + channel;
  T* const copied = ring_of_chunk + pixel * kChunk + channel;
  int next = first, images_ahead = place.n1 - place.n0;
  const auto stage_next = [&](int stage) {
    T* const to = copied + stage;
    if (next >= 0) {
#pragma unroll
      for (int j = 0; j < kMostX; ++j) {
        const std::int64_t from = static_cast<std::int64_t>(j * stride) * args.x_pitch;
        if (wanted >> j & 1) copy_async_16(to + j * stride * kChunk, x_from + from);
      }
      x_from += args.x_row;
    }
    if (next < e_end) {
#pragma unroll
      for (int j = 0; j < kMostE; ++j) {
        const std::int64_t from = static_cast<std::int64_t>(j * stride) * C;
        if (wanted >> (kMostX + j) & 1) copy_async_16(to + x_elements + j * stride * kChunk, e_from + from);
      }
      e_from += args.e_row;
    }
    commit_copies();
    if (++next == end) {
      next = first;
      if (--images_ahead == 0) wanted = 0;
    }
  };

#pragma unroll 1
  for (int s = 0; s < kStages - 1; ++s) stage_next(s * stage_elements);
  const T* const strip_at = ring_of_chunk + strip * kStrip * kChunk + lane;
  Value sum[kTaps], window[K][kStrip];  // window[kh]: the row of e that tap row kh pairs with the row of x
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) sum[tap] = Value::zero();
  int stage = 0;
  const auto step = [&](int row) {
    wait_copies<kStages - 2>();
    __syncthreads();
    stage_next(stage == 0 ? (kStages - 1) * stage_elements : stage - stage_elements);
    // Also where nothing is added, and the ring holds zeros: under a condition the window would be there twice.
    const T* const x_row = strip_at + stage;
#pragma unroll
    for (int kh = K - 1; kh > 0; --kh)
#pragma unroll
      for (int s = 0; s < kStrip; ++s) window[kh][s] = window[kh - 1][s];
#pragma unroll
    for (int s = 0; s < kStrip; ++s) {
      const Value e = Value::load(x_row + x_elements + s * kChunk);
      window[0][s] = row < e_end ? e : Value::zero();
      sum[K * K] = sum[K * K] + window[0][s];
    }
    if (adding && row >= 0) {
#pragma unroll
      for (int j = 0; j < kStrip + K - 1; ++j) {
        const Value x = Value::load(x_row + j * kChunk);
#pragma unroll
        for (int kh = 0; kh < K; ++kh) {
#pragma unroll
          for (int s = 0; s < kStrip; ++s) {
            const int kw = j - s;
            if (kw >= 0 && kw < K) sum[kh * K + kw] = fma(window[kh][s], x, sum[kh * K + kw]);
          }
        }
      }
    }
    stage = stage == (kStages - 1) * stage_elements ? 0 : stage + stage_elements;
  };
#pragma unroll 1
  for (int n = place.n0; n < place.n1; ++n) {
#pragma unroll
    for (int kh = 0; kh < K; ++kh)
#pragma unroll
      for (int s = 0; s < kStrip; ++s) window[kh][s] = Value::zero();
    // Two at a time: the window's registers then move by two rows once, instead of by one twice.
#pragma unroll 1
    for (int row = first; row < end; ++row) {
      step(row);
      if (++row == end) break;
      step(row);
    }
  }

  // [group][tap][lane] -> the sum over the strips of each chunk
  wait_copies<0>();
  __syncthreads();
  float* const sums = reinterpret_cast<float*>(ring);
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) sums[(group * kTaps + tap) * kChunk + lane] = sum[tap].x;
  __syncthreads();
  if (lane >= channels) return;
  const std::int64_t slot = blockIdx.x / tiling.chunk_groups;
  float* const slot_sums = args.partials + slot * kTaps * C + c0 + lane;
  for (int tap = strip; tap < kTaps; tap += tiling.strips) {
    float total = 0.0f;
    for (int s = 0; s < tiling.strips; ++s) total += sums[((chunk * tiling.strips + s) * kTaps + tap) * kChunk + lane];
    slot_sums[static_cast<std::int64_t>(tap) * C] = total;
  }
}

}  // namespace mambaout_kernels::cuda
