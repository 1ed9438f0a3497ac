// s[.., c] = sum_{kh,kw} weight[c,kh,kw] * x[h+kh-R, w+kw-R, c] + bias[c]
//
// flipped: with weight[c,K-1-kh,K-1-kw], which turns a gradient by s into one by x.
//
// The forward kernel (forward.cuh) without gate and identity channels; all accesses are 16 bytes wide. One block: the
// strips and chunks of its tile (tiling.h), from the top of a segment of rows to its end. Every step adds one row of x
// to K rows of sums in registers (conv_rows.cuh), while the kStages - 1 rows behind it are on their way to a ring in
// shared memory. The last row of an image completes, besides its own, the R rows of s that lack only rows of zeros.
#pragma once

#include "conv_rows.cuh"
#include "packet.cuh"
#include "staging.cuh"

namespace mambaout_kernels::cuda {

template <typename T>
struct DepthwiseArgs {
  Tiling tiling;
  int N, H, W, C;
  const T* x;  // (N, H, W, C), pixels x_pitch elements apart
  int x_pitch;
  const void* weight;  // (C, 1, K, K)
  const void* bias;    // (C,), or null
  bool weight_is_float32, bias_is_float32, flipped;
  T* s;  // (N, H, W, C), pixels s_pitch elements apart
  int s_pitch;
};

template <typename T_, int K_, int kLanes_, int kStrip_>
struct DepthwiseTraits {
  using T = T_;
  static constexpr int K = K_, R = K / 2, kLanes = kLanes_, kStrip = kStrip_;
  static constexpr int kGroup = kChunk / kLanes;  // threads
  // All that registers allow: 98 of them hold weights and sums, twice as many with two channels.
  static constexpr int kMaxThreads = kLanes == 1 ? 128 : 64, kMinBlocks = 4;
  static constexpr int kMaxGroups = kMaxThreads / kGroup;
  static constexpr int kStages = sizeof(T) == 2 ? 8 : 5;

  // Elements of one stage, x with its halo, of one chunk; and of a strip of s.
  __host__ __device__ static int chunk_elements(const Tiling& t) { return (t.strips * kStrip + K - 1) * kChunk; }
  static constexpr int kOutput = kStrip * kChunk;
  static int threads(const Tiling& t) { return ceil_div(t.strips * t.chunks * kGroup, 32) * 32; }
  // The weights pass through the ring's memory before the first row; s, through memory of its own behind it.
  __host__ __device__ static int ring_bytes(const Tiling& t) {
    const int ring = kStages * t.chunks * chunk_elements(t) * static_cast<int>(sizeof(T));
    const int weights = t.chunks * kChunk * K * K * 4;
    return ring > weights ? ring : weights;
  }
  static int shared_bytes(const Tiling& t) {
    return ring_bytes(t) + threads(t) / kGroup * kOutput * static_cast<int>(sizeof(T));
  }
};

template <typename Traits>
__device__ __forceinline__ void depthwise(const DepthwiseArgs<typename Traits::T>& args) {
  using T = typename Traits::T;
  using Values = Lanes<Traits::kLanes>;
  using Wide = Packet<T, true>;
  constexpr int K = Traits::K, R = Traits::R, kStrip = Traits::kStrip, kStages = Traits::kStages;
  constexpr int kGroup = Traits::kGroup;

  const Tiling& tiling = args.tiling;
  const int H = args.H, W = args.W;
  const int tile_w = tiling.strips * kStrip;
  const BlockPlace place(tiling, blockIdx.x, tile_w, args.N, H);

  const int group = threadIdx.x / kGroup, lane = threadIdx.x % kGroup;
  const int chunk = group / tiling.strips, strip = group % tiling.strips;
  const int c0 = (place.group * tiling.chunks + chunk) * kChunk, channels = args.C - c0;
  const int c = lane * Traits::kLanes;               // of the chunk
  const int pixels = W - place.w0 - strip * kStrip;  // of the strip, that exist
  const bool staging = chunk < tiling.chunks && channels > 0, convolving = staging && pixels > 0;

  T* const ring = reinterpret_cast<T*>(dynamic_shared());
  T* const output = reinterpret_cast<T*>(dynamic_shared() + Traits::ring_bytes(tiling)) + group * Traits::kOutput;
  const int chunk_elements = Traits::chunk_elements(tiling), stage_elements = tiling.chunks * chunk_elements;

  Values weight[K * K], bias = Values::zero();
  {
    float* const staged = reinterpret_cast<float*>(ring);
    const int first = place.group * tiling.chunks * kChunk;
    stage_weights<T, K>(staged, args.weight, args.weight_is_float32, first,
                        min(tiling.chunks * kChunk, args.C - first));
    __syncthreads();
    if (staging) {
      const float* const of_chunk = staged + chunk * kChunk * K * K;
      if (args.flipped) {
        read_weights<K, Traits::kLanes, true>(of_chunk, c, weight);
      } else {
        read_weights<K, Traits::kLanes>(of_chunk, c, weight);
      }
      if (args.bias != nullptr) {
        bias = load_bias<T, Traits::kLanes>(args.bias, args.bias_is_float32, c0 + c, args.C);
      }
    }
    __syncthreads();
    clear_shared(ring, Traits::ring_bytes(tiling));
    __syncthreads();
  }

  // Rows [first, end) of x are read, of image after image; step `row` yields row - R of s. Where an image has no
  // `missing` rows behind the last of them, that step yields as many rows more.
  const int first = max(place.h0 - R, 0), end = min(place.h1 + R, H), missing = place.h1 + R - end;
  const int worker = threadIdx.x - chunk * tiling.strips * kGroup;
  const RowCopy<T, true, kGroup, kStrip, K - 1> copy(worker, tiling.strips, place.w0, W, channels, args.x_pitch);
  const std::int64_t x_row = static_cast<std::int64_t>(W) * args.x_pitch;
  const std::int64_t s_row = static_cast<std::int64_t>(W) * args.s_pitch;
  int ahead = staging ? (place.n1 - place.n0) * (end - first) : 0;  // rows that are not yet asked for
  const T* from = args.x + ((static_cast<std::int64_t>(place.n0) * H + first) * W + place.w0) * args.x_pitch + c0;
  const auto stage_next = [&](int slot) {
    if (ahead > 0) {
      copy.start(ring + slot * stage_elements + chunk * chunk_elements, from);
      from += x_row;
      --ahead;
    }
    commit_copies();
  };

  constexpr int kPackets = kChunk / Wide::kChannels, kTogether = kGroup / kPackets;  // of a pixel; pixels at once
  const int packet_pixel = lane / kPackets, packet_channel = lane % kPackets * Wide::kChannels;
  const int stored = convolving && packet_channel < channels ? pixels - packet_pixel : 0;
  T* const packets = output + packet_pixel * kChunk + packet_channel;
  T* to = args.s +
          ((static_cast<std::int64_t>(place.n0) * H + place.h0) * W + place.w0 + strip * kStrip + packet_pixel) *
              args.s_pitch +
          c0 + packet_channel;
  const auto yield = [&](const Values(&sums)[kStrip]) {
    if (convolving) {
#pragma unroll
      for (int s = 0; s < kStrip; ++s) (sums[s] + bias).store(output + s * kChunk + c);
    }
    __syncwarp();
#pragma unroll
    for (int s = 0; s < kStrip; s += kTogether) {
      if (s < stored && s + packet_pixel < kStrip) Wide::load_shared(packets + s * kChunk).store(to + s * args.s_pitch);
    }
    __syncwarp();
    to += s_row;
  };

#pragma unroll 1
  for (int s = 0; s < kStages - 1; ++s) stage_next(s);
  const T* const strip_at = ring + chunk * chunk_elements + strip * kStrip * kChunk + c;
  RowSums<Traits::kLanes, K, kStrip> conv;
  RowStep at{place.n0, first};
  int slot = 0;
#pragma unroll 1
  while (at.n < place.n1) {
    wait_copies<kStages - 2>();
    __syncthreads();
    stage_next(slot == 0 ? kStages - 1 : slot - 1);
    if (at.row == first) {
      keep_branch();
      conv.start();
    }
    if (convolving) {
      const T* const stage = strip_at + slot * stage_elements;
      conv.advance();
      conv.template add_row<false>([&](int j) { return Values::load(stage + j * kChunk); }, weight);
    }
    if (at.row - R >= place.h0) yield(conv.sum[0]);
    if (at.row + 1 == end) {
#pragma unroll
      for (int k = 1; k <= R; ++k) {
        if (k <= missing && at.row - R + k >= place.h0) yield(conv.sum[k]);
      }
    }
    at.advance(first, end);
    slot = slot + 1 == kStages ? 0 : slot + 1;
  }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kMaxThreads, Traits::kMinBlocks)
    depthwise_kernel(const DepthwiseArgs<typename Traits::T> args) {
  depthwise<Traits>(args);
}

}  // namespace mambaout_kernels::cuda
