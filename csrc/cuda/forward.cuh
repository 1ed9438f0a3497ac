// y[.., d]     = act(g) * i                                                        d < D - C
// y[.., D-C+c] = act(g) * (bias[c] + sum_{kh,kw} weight[c,kh,kw] * x[h+kh-R, w+kw-R, c])
//
// One block: the strips and chunks of its tile (tiling.h), from the top of a segment of rows to its end, and at the
// same pixels its share of the identity channels. Rows of x, and R steps later of g, arrive by asynchronous copies in a
// ring in shared memory, kStages - 1 rows ahead; every row of x is read from there once and added to K rows of sums in
// registers (conv_rows.cuh). While it is, the identity channels are under way from memory to registers.
#pragma once

#include "conv_rows.cuh"
#include "identity_row.cuh"
#include "staging.cuh"

namespace mambaout_kernels::cuda {

template <typename T>
struct ForwardArgs {
  Tiling tiling;
  int N, H, W, D, C;
  Act act;
  const T* u;  // (N, H, W, 2D), pixels u_pitch elements apart
  int u_pitch;
  const void* weight;  // (C, 1, K, K)
  const void* bias;    // (C,)
  bool weight_is_float32, bias_is_float32;
  T* y;  // (N, H, W, D)
};

template <typename T_, int K_, bool kAligned_, int kLanes_, int kStrip_>
struct ForwardTraits {
  using T = T_;
  static constexpr int K = K_, R = K / 2, kLanes = kLanes_, kStrip = kStrip_;
  static constexpr bool kAligned = kAligned_;
  static constexpr int kGroup = kChunk / kLanes;  // threads
  // Two channels to a thread: for GPUs whose memory is so fast that blocks must be small to be shared out evenly.
  static constexpr int kMaxThreads = kLanes == 1 ? 128 : 64, kMinBlocks = !kAligned ? 2 : kLanes == 1 ? 3 : 4;
  static constexpr int kMaxGroups = kMaxThreads / kGroup;
  static constexpr int kStages = sizeof(T) == 2 ? 6 : 4;
  static constexpr int kBatch = kAligned ? 2 : 4;
  static constexpr int kPixel = StagedRow<T, kAligned>::kPixel;
  static_assert(kAligned || kLanes == 1, "a pair of channels is read as one word");

  // Elements of one stage: x with its halo, and g, of every chunk.
  __host__ __device__ static int x_elements(const Tiling& t) { return (t.strips * kStrip + K - 1) * kPixel; }
  __host__ __device__ static int chunk_elements(const Tiling& t) { return x_elements(t) + t.strips * kStrip * kPixel; }
  static int threads(const Tiling& t) { return ceil_div(t.strips * t.chunks * kGroup, 32) * 32; }
  // The weights pass through the ring's memory before the first row.
  __host__ __device__ static int shared_bytes(const Tiling& t) {
    const int ring = kStages * t.chunks * chunk_elements(t) * static_cast<int>(sizeof(T));
    const int weights = t.chunks * kChunk * K * K * 4;
    return ring > weights ? ring : weights;
  }
};

template <typename Traits>
__device__ __forceinline__ void gated_dwconv_fwd(const ForwardArgs<typename Traits::T>& args) {
  using T = typename Traits::T;
  using Row = StagedRow<T, Traits::kAligned>;
  using Values = Lanes<Traits::kLanes>;
  using Share = Packet<T, Traits::kAligned>;
  constexpr int K = Traits::K, R = Traits::R, kStrip = Traits::kStrip, kStages = Traits::kStages;
  constexpr int kGroup = Traits::kGroup, kPixel = Traits::kPixel, kBatch = Traits::kBatch;

  const Tiling& tiling = args.tiling;
  const int H = args.H, W = args.W, D = args.D, identity = D - args.C;
  const int tile_w = tiling.strips * kStrip;
  const BlockPlace place(tiling, blockIdx.x, tile_w, args.N, H);

  const int group = threadIdx.x / kGroup, lane = threadIdx.x % kGroup;
  const int chunk = group / tiling.strips, strip = group % tiling.strips;
  const int c0 = (place.group * tiling.chunks + chunk) * kChunk, channels = args.C - c0;
  const int c = lane * Traits::kLanes;               // of the chunk
  const int pixels = W - place.w0 - strip * kStrip;  // of the strip, that exist
  const bool staging = chunk < tiling.chunks && channels > 0, convolving = staging && pixels > 0;

  T* const ring = reinterpret_cast<T*>(dynamic_shared());
  const int x_elements = Traits::x_elements(tiling), chunk_elements = Traits::chunk_elements(tiling);
  const int stage_elements = tiling.chunks * chunk_elements;

  Values weight[K * K], bias = Values::zero();
  {
    float* const staged = reinterpret_cast<float*>(ring);
    const int first = place.group * tiling.chunks * kChunk;
    stage_weights<T, K>(staged, args.weight, args.weight_is_float32, first,
                        min(tiling.chunks * kChunk, args.C - first));
    __syncthreads();
    if (staging) {
      read_weights<K, Traits::kLanes>(staged + chunk * kChunk * K * K, c, weight);
      bias = load_bias<T, Traits::kLanes>(args.bias, args.bias_is_float32, c0 + c, args.C);
    }
    __syncthreads();
    clear_shared(ring, Traits::shared_bytes(tiling));
    __syncthreads();
  }

  // Rows of x [first, x_end) are read; step `row` yields row - R of y. Behind the last row of the image, steps only
  // complete what is begun.
  const int first = max(place.h0 - R, 0), end = place.h1 + R, x_end = min(end, H);
  const int worker = threadIdx.x - chunk * tiling.strips * kGroup;
  const RowCopy<T, Traits::kAligned, kGroup, kStrip, K - 1> x_copy(worker, tiling.strips, place.w0, W, channels,
                                                                   args.u_pitch);
  const RowCopy<T, Traits::kAligned, kGroup, kStrip, 0> g_copy(worker, tiling.strips, place.w0, W, channels,
                                                               args.u_pitch);
  RowStep next{place.n0, first};
  const auto stage_next = [&](int slot) {
    if (staging && next.n < place.n1) {
      T* const to = ring + slot * stage_elements + chunk * chunk_elements;
      const T* const g = args.u + (identity + c0);
      if (next.row < x_end) x_copy.start(to, g + D + next.pixel(0, place.w0, H, W) * args.u_pitch);
      if (next.row - R >= place.h0) g_copy.start(to + x_elements, g + next.pixel(R, place.w0, H, W) * args.u_pitch);
    }
    commit_copies();
    next.advance(first, end);
  };

  const IdentityShare<Share::kChannels> share(identity, place.group, tiling.chunk_groups, min(tile_w, W - place.w0));
  IdentityPlace places[kBatch];  // the same in every row
#pragma unroll
  for (int b = 0; b < kBatch; ++b) {
    places[b] = share.place(threadIdx.x + b * blockDim.x);
    places[b].keep();
  }
  const auto own_place = [&](int b) { return places[b]; };
#pragma unroll 1
  for (int s = 0; s < kStages - 1; ++s) stage_next(s);
  RowStep at{place.n0, first};
  const int x_at = chunk * chunk_elements + strip * kStrip * kPixel + c + Row::phase(args.u + 2 * D - args.C + c0);
  const int g_at = chunk * chunk_elements + x_elements + strip * kStrip * kPixel;
  const int g_phase = Row::phase(args.u + identity + c0);
  RowSums<Traits::kLanes, K, kStrip> conv;
  int slot = 0;
#pragma unroll 1
  while (at.n < place.n1) {
    wait_copies<kStages - 2>();
    __syncthreads();
    stage_next(slot == 0 ? kStages - 1 : slot - 1);

    const bool yields = at.row - R >= place.h0;
    const T* const u_row = args.u + at.pixel(R, place.w0, H, W) * args.u_pitch;  // of the row that is yielded
    IdentityForward<T, Traits::kAligned, kBatch> batch;
    if (yields) batch.load(own_place, u_row, args.u_pitch, D);

    T* const stage = ring + slot * stage_elements;
    if (at.row == first) {
      keep_branch();
      conv.start();
    }
    if (convolving && at.row < x_end) {
      conv.advance();
      conv.template add_row<false>([&](int j) { return Values::load(stage + x_at + j * kPixel); }, weight);
    }
    if (yields) {
      Values sums[kStrip];
      conv.complete(at.row - (x_end - 1), sums);
      T* const y_row = args.y + at.pixel(R, place.w0, H, W) * D;
      with_gate<T>(args.act, [&](auto gate) {
        T* const g = stage + g_at;
        T* const y = y_row + (strip * kStrip * D + identity + c0);
        if (convolving) {
#pragma unroll
          for (int s = 0; s < kStrip; ++s) {
            T* const here = g + s * kPixel + c + g_phase;
            const Values value = gate.value(Values::load(here)) * (sums[s] + bias);
            if constexpr (Traits::kAligned) {
              value.store(here);  // in place of g, to be stored as packets
            } else {
              if (s < pixels && c < channels) value.store(y + s * D + c);
            }
          }
        }
        if constexpr (Traits::kAligned) {
          constexpr int kPackets = kChunk / Share::kChannels;  // of a pixel
          const int channel = lane % kPackets * Share::kChannels;
          __syncwarp();
#pragma unroll
          for (int j = 0; j < kStrip; j += kGroup / kPackets) {
            const int s = j + lane / kPackets;
            if (convolving && channel < channels && s < kStrip && s < pixels) {
              Share::load_shared(g + s * kPixel + channel).store(y + s * D + channel);
            }
          }
        }
        batch.finish(gate, own_place, y_row, D);
        for (int begin = kBatch * blockDim.x; begin < share.count(); begin += kBatch * blockDim.x) {
          const auto further_place = [&](int b) { return share.place(begin + threadIdx.x + b * blockDim.x); };
          batch.load(further_place, u_row, args.u_pitch, D);
          batch.finish(gate, further_place, y_row, D);
        }
      });
    }
    at.advance(first, end);
    slot = slot + 1 == kStages ? 0 : slot + 1;
  }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kMaxThreads, Traits::kMinBlocks)
    gated_dwconv_fwd_kernel(const ForwardArgs<typename Traits::T> args) {
  gated_dwconv_fwd<Traits>(args);
}

}  // namespace mambaout_kernels::cuda
