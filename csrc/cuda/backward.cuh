// With e = dy * act(g) and s as in the forward pass:
//   dg = dy * s * act'(g);   di = e;   dc[h,w] = sum_{kh,kw} weight[kh,kw] * e[h-kh+R, w-kw+R]
//   dweight[kh,kw] = sum_{n,h,w} e[h,w] * c[h+kh-R, w+kw-R];   dbias = sum e
//
// One pass, walking down the rows as the forward kernel does. At step `row`, from one ring in shared memory:
//   dy[row] becomes e[row], g[row] becomes p[row] = dy * act'(g), once per pixel of the tile and its halo;
//   e[row] is added to the sums of dc (filter flipped), c[row] to those of s: row - R of both is then complete,
//   and is stored as dc and as p * s;
//   dweight takes the pairs of rows of which one is new: e[row] with c[row-R .. row], c[row] with e[row-R .. row-1].
// A thread keeps the filter, the sums and its strip's dweight in registers. At its end a block adds up its strips and
// writes one slot of partial sums; sum_partials_kernel adds the slots, in a fixed order.
#pragma once

#include "conv_rows.cuh"
#include "identity_row.cuh"
#include "staging.cuh"

namespace mambaout_kernels::cuda {

template <typename T>
struct BackwardArgs {
  Tiling tiling;
  int N, H, W, D, C;
  Act act;
  const T* u;  // (N, H, W, 2D), pixels u_pitch elements apart
  int u_pitch;
  const T* dy;  // (N, H, W, D), pixels dy_pitch elements apart
  int dy_pitch;
  const void* weight;  // (C, 1, K, K)
  const void* bias;    // (C,)
  bool weight_is_float32, bias_is_float32;
  T* du;            // (N, H, W, 2D)
  float* partials;  // [slot][K * K + 1][C]: dweight by taps, then dbias
};

template <typename T_, int K_, bool kAligned_, int kStrip_>
struct BackwardTraits {
  using T = T_;
  static constexpr int K = K_, R = K / 2, kStrip = kStrip_;
  static constexpr bool kAligned = kAligned_;
  static constexpr int kGroup = kChunk;  // threads: one channel each
  static constexpr int kMaxThreads = 128, kMinBlocks = 2;
  static constexpr int kMaxGroups = kMaxThreads / kGroup;
  static constexpr int kAhead = sizeof(T) == 2 ? 4 : 2;  // rows under way
  static constexpr int kSlots = kAhead + 1 + R;
  static constexpr int kBatch = kAligned && sizeof(T) == 2 ? 1 : 2;
  static constexpr int kPixel = StagedRow<T, kAligned>::kPixel;
  static constexpr int kTaps = K * K + 1;  // the last: dbias

  // Elements of one row of g, dy or c of one chunk, with halo.
  __host__ __device__ static int row_elements(const Tiling& t) { return (t.strips * kStrip + K - 1) * kPixel; }
  static int threads(const Tiling& t) { return t.strips * t.chunks * kGroup; }
  // The filter and the partial sums pass through the ring's memory.
  __host__ __device__ static int shared_bytes(const Tiling& t) {
    const int ring = kSlots * 3 * t.chunks * row_elements(t) * static_cast<int>(sizeof(T));
    const int sums = t.strips * t.chunks * kChunk * kTaps * 4;
    return ring > sums ? ring : sums;
  }
};

// sum[kh][kw] += sum_s e[s] * c[s + kw]
template <int K, int kStrip>
__device__ __forceinline__ void add_taps(Lanes<1> (&sum)[K * K + 1], int kh, const Lanes<1> (&e)[kStrip],
                                         const Lanes<1> (&c)[kStrip + K - 1]) {
#pragma unroll
  for (int s = 0; s < kStrip; ++s)
#pragma unroll
    for (int kw = 0; kw < K; ++kw) sum[kh * K + kw] = fma(e[s], c[s + kw], sum[kh * K + kw]);
}

// Over a row with its halo, in place: g becomes p = dy * act'(g), dy becomes e = dy * act(g); both at phase 0.
template <typename Traits, typename Gate, typename T>
__device__ __forceinline__ void gate_row(Gate gate, T* g_row, T* dy_row, int g_phase, const T* dy_source, int dy_pitch,
                                         int width, int worker, int workers) {
  constexpr int kLanes = Traits::kAligned ? 2 : 1, kThreads = kChunk / kLanes;
  const int c = worker % kThreads * kLanes;
  for (int q = worker / kThreads; q < width; q += workers / kThreads) {
    T *const g = g_row + q * Traits::kPixel + c, *const dy = dy_row + q * Traits::kPixel + c;
    const int dy_phase = StagedRow<T, Traits::kAligned>::phase(dy_source + q * dy_pitch);
    const Lanes<kLanes> upstream = Lanes<kLanes>::load(dy + dy_phase);
    const auto both = gate.both(Lanes<kLanes>::load(g + g_phase));
    if constexpr (StagedRow<T, Traits::kAligned>::kPhased) __syncwarp();  // the element of the neighbouring lane
    (upstream * both.slope).store(g);
    (upstream * both.value).store(dy);
  }
}

template <typename Traits>
__device__ __forceinline__ void gated_dwconv_bwd(const BackwardArgs<typename Traits::T>& args) {
  using T = typename Traits::T;
  using Row = StagedRow<T, Traits::kAligned>;
  using Value = Lanes<1>;
  using Share = Packet<T, Traits::kAligned>;
  constexpr int K = Traits::K, R = Traits::R, kStrip = Traits::kStrip, kPixel = Traits::kPixel;
  constexpr int kSlots = Traits::kSlots, kAhead = Traits::kAhead, kTaps = Traits::kTaps;

  const Tiling& tiling = args.tiling;
  const int H = args.H, W = args.W, D = args.D, C = args.C, identity = D - C;
  const int tile_w = tiling.strips * kStrip, width = tile_w + K - 1;
  const BlockPlace place(tiling, blockIdx.x, tile_w, args.N, H);

  const int group = threadIdx.x / Traits::kGroup, lane = threadIdx.x % Traits::kGroup;
  const int chunk = group / tiling.strips, strip = group % tiling.strips;
  const int c0 = (place.group * tiling.chunks + chunk) * kChunk, channels = C - c0;
  const int strip_w = place.w0 + strip * kStrip;
  const bool staging = channels > 0, convolving = staging && strip_w < W;

  T* const ring = reinterpret_cast<T*>(dynamic_shared());
  const int row_elements = Traits::row_elements(tiling), slot_elements = 3 * tiling.chunks * row_elements;
  // The rows of this chunk in a slot: g (then p, then dg), dy (then e, then dc), c.
  const auto g_row = [&](int slot) { return ring + slot * slot_elements + 3 * chunk * row_elements; };
  const auto e_row = [&](int slot) { return g_row(slot) + row_elements; };
  const auto c_row = [&](int slot) { return g_row(slot) + 2 * row_elements; };
  const auto before = [](int slot, int rows) { return slot >= rows ? slot - rows : slot - rows + kSlots; };

  Value weight[K * K], bias = Value::zero();
  {
    float* const staged = reinterpret_cast<float*>(ring);
    const int first = place.group * tiling.chunks * kChunk;
    stage_weights<T, K>(staged, args.weight, args.weight_is_float32, first, min(tiling.chunks * kChunk, C - first));
    __syncthreads();
    read_weights<K, 1>(staged + chunk * kChunk * K * K, lane, weight);
    if (staging) bias = load_bias<T, 1>(args.bias, args.bias_is_float32, c0 + lane, C);
    __syncthreads();
    clear_shared(ring, Traits::shared_bytes(tiling));
    __syncthreads();
  }

  // Rows [first, row_end) are read; step `row` yields row - R.
  const int first = max(place.h0 - R, 0), end = place.h1 + R, row_end = min(end, H);
  const int worker = threadIdx.x - chunk * tiling.strips * Traits::kGroup, workers = tiling.strips * Traits::kGroup;
  const RowCopy<T, Traits::kAligned, Traits::kGroup, kStrip, K - 1> u_copy(worker, tiling.strips, place.w0, W, channels,
                                                                           args.u_pitch);
  const RowCopy<T, Traits::kAligned, Traits::kGroup, kStrip, K - 1> dy_copy(worker, tiling.strips, place.w0, W,
                                                                            channels, args.dy_pitch);
  RowStep next{place.n0, first};
  const auto stage_next = [&](int slot) {
    if (staging && next.n < place.n1 && next.row < row_end) {
      const std::int64_t pixel = next.pixel(0, place.w0, H, W);
      const T* const u = args.u + pixel * args.u_pitch + (identity + c0);
      u_copy.start(g_row(slot), u);
      dy_copy.start(e_row(slot), args.dy + pixel * args.dy_pitch + (identity + c0));
      u_copy.start(c_row(slot), u + D);
    }
    commit_copies();
    next.advance(first, end);
  };

  const IdentityShare<Share::kChannels> share(identity, place.group, tiling.chunk_groups, min(tile_w, W - place.w0));
  const int g_phase = Row::phase(args.u + identity + c0), c_phase = Row::phase(args.u + 2 * D - C + c0);
  const int strip_at = strip * kStrip * kPixel + lane;  // of the pixel R to the left of the strip

#pragma unroll 1
  for (int s = 0; s < kAhead; ++s) stage_next(s);
  RowStep at{place.n0, first};
  RowSums<1, K, kStrip> s_sums, dc_sums;
  Value partial[kTaps];
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) partial[tap] = Value::zero();

  int slot = 0;
#pragma unroll 1
  while (at.n < place.n1) {
    wait_copies<kAhead - 1>();
    __syncthreads();
    stage_next(before(slot, kSlots - kAhead));

    const bool yields = at.row - R >= place.h0, reads = at.row < row_end;
    const std::int64_t pixel = at.pixel(R, place.w0, H, W);  // of the row that is yielded
    const T *const u_row = args.u + pixel * args.u_pitch, *const dy_row = args.dy + pixel * args.dy_pitch;
    T* const du_row = args.du + pixel * (2 * D);
    IdentityBackward<T, Traits::kAligned, Traits::kBatch> batch;
    const auto own_place = [&](int b) { return share.place(threadIdx.x + b * blockDim.x); };
    if (yields) batch.load(own_place, u_row, args.u_pitch, dy_row, args.dy_pitch, D);

    with_gate<T>(args.act, [&](auto gate) {
      if (reads && staging) {
        const T* const dy = args.dy + at.pixel(0, place.w0 - R, H, W) * args.dy_pitch + (identity + c0);
        gate_row<Traits>(gate, g_row(slot), e_row(slot), g_phase, dy, args.dy_pitch, width, worker, workers);
      }
      if (yields) {
        batch.finish(gate, own_place, du_row, D);
        for (int begin = Traits::kBatch * blockDim.x; begin < share.count(); begin += Traits::kBatch * blockDim.x) {
          const auto further_place = [&](int b) { return share.place(begin + threadIdx.x + b * blockDim.x); };
          batch.load(further_place, u_row, args.u_pitch, dy_row, args.dy_pitch, D);
          batch.finish(gate, further_place, du_row, D);
        }
      }
    });
    __syncthreads();

    if (at.row == first) {
      keep_branch();
      s_sums.start();
      dc_sums.start();
    }
    if (convolving && reads) {
      s_sums.advance();
      dc_sums.advance();
      Value e[kStrip], c[kStrip + K - 1];
      const T* const e_from = e_row(slot) + strip_at;
      dc_sums.template add_row<true>(
          [&](int j) {
            const Value value = Value::load(e_from + j * kPixel);
            if (j >= R && j < R + kStrip) e[j - R] = value;
            return value;
          },
          weight);
      const T* const c_from = c_row(slot) + strip_at + c_phase;
      s_sums.template add_row<false>(
          [&](int j) {
            c[j] = Value::load(c_from + j * kPixel);
            return c[j];
          },
          weight);
      const bool counts = at.row >= place.h0 && at.row < place.h1;  // e rows of the halo count in other segments
      if (counts) {
        add_taps<K, kStrip>(partial, R, e, c);
#pragma unroll
        for (int s = 0; s < kStrip; ++s) partial[K * K].x += e[s].x;
      }
#pragma unroll
      for (int rows = 1; rows <= R; ++rows) {
        const int earlier = before(slot, rows);
        if (at.row - rows >= place.h0 && at.row - rows < place.h1) {
          Value e_earlier[kStrip];
          const T* const from = e_row(earlier) + strip_at + R * kPixel;
#pragma unroll
          for (int s = 0; s < kStrip; ++s) e_earlier[s] = Value::load(from + s * kPixel);
          add_taps<K, kStrip>(partial, R + rows, e_earlier, c);
        }
      }
      if (counts) {
#pragma unroll
        for (int rows = 1; rows <= R; ++rows) {
          if (at.row - rows >= first) {
            const T* const from = c_row(before(slot, rows)) + strip_at + c_phase;
#pragma unroll
            for (int j = 0; j < kStrip + K - 1; ++j) c[j] = Value::load(from + j * kPixel);
            add_taps<K, kStrip>(partial, R - rows, e, c);
          }
        }
      }
    }
    if (yields) {
      Value s_row[kStrip], dc_row[kStrip];
      s_sums.complete(at.row - (row_end - 1), s_row);
      dc_sums.complete(at.row - (row_end - 1), dc_row);
      T* const dg = g_row(before(slot, R)) + strip_at + R * kPixel;
      T* const dc = e_row(before(slot, R)) + strip_at + R * kPixel;
      T* const strip_du = du_row + strip * kStrip * (2 * D) + identity + c0;
      if (convolving) {
#pragma unroll
        for (int s = 0; s < kStrip; ++s) {
          if (strip_w + s >= W) continue;  // there the ring must stay zero
          const Value dg_value = Value::load(dg + s * kPixel) * (s_row[s] + bias);
          if constexpr (Traits::kAligned) {
            dg_value.store(dg + s * kPixel);  // in place, to be stored as packets
            dc_row[s].store(dc + s * kPixel);
          } else if (lane < channels) {
            dg_value.store(strip_du + s * (2 * D) + lane);
            dc_row[s].store(strip_du + s * (2 * D) + D + lane);
          }
        }
      }
      if constexpr (Traits::kAligned) {
        constexpr int kPackets = kChunk / Share::kChannels;  // per pixel
        __syncwarp();
        for (int p = lane; convolving && p < kStrip * kPackets; p += Traits::kGroup) {
          const int s = p / kPackets, channel = p % kPackets * Share::kChannels;
          if (strip_w + s >= W || channel >= channels) continue;
          T* const to = strip_du + s * (2 * D) + channel;
          Share::load_shared(dg - lane + s * kPixel + channel).store(to);
          Share::load_shared(dc - lane + s * kPixel + channel).store(to + D);
        }
      }
    }
    at.advance(first, end);
    slot = slot + 1 == kSlots ? 0 : slot + 1;
  }

  // [group][tap][lane] -> the sum over the strips of each chunk
  wait_copies<0>();
  __syncthreads();
  float* const sums = reinterpret_cast<float*>(ring);
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) sums[(group * kTaps + tap) * kChunk + lane] = partial[tap].x;
  __syncthreads();
  const int slots_before = blockIdx.x / tiling.chunk_groups;
  for (int tap = strip; tap < kTaps; tap += tiling.strips) {
    float sum = 0.0f;
    for (int s = 0; s < tiling.strips; ++s) sum += sums[((chunk * tiling.strips + s) * kTaps + tap) * kChunk + lane];
    if (lane < channels) args.partials[(static_cast<std::int64_t>(slots_before) * kTaps + tap) * C + c0 + lane] = sum;
  }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kMaxThreads, Traits::kMinBlocks)
    gated_dwconv_bwd_kernel(const BackwardArgs<typename Traits::T> args) {
  gated_dwconv_bwd<Traits>(args);
}

}  // namespace mambaout_kernels::cuda
