// Any odd kernel size, one channel of one pixel to a thread: for sizes without a kernel of their own.
#pragma once

#include "backward.cuh"
#include "backward_tiling.h"
#include "forward.cuh"

namespace mambaout_kernels::cuda {

constexpr int kGenericThreads = 256;

template <typename T>
struct GenericKernelSizeForward {
  ForwardArgs<T> args;
  int K;
  int row_blocks;  // of threads for one row of pixels
};

template <typename T>
__global__ void __launch_bounds__(kGenericThreads, 2)
    generic_kernel_size_fwd_kernel(const GenericKernelSizeForward<T> call) {
  const ForwardArgs<T>& args = call.args;
  const int K = call.K, R = K / 2, H = args.H, W = args.W, D = args.D, C = args.C;
  const unsigned row = blockIdx.x / call.row_blocks, index = blockIdx.x % call.row_blocks * blockDim.x + threadIdx.x;
  const int w = index / D, d = index % D, h = row % H, c = d - (D - C);
  if (w >= W) return;
  const std::int64_t pixel = static_cast<std::int64_t>(row) * W + w;
  const T* const u = args.u + pixel * args.u_pitch;
  const T* const x = u + D + d;  // identity, or the conv channel c
  float s;
  if (c < 0) {
    s = to_float(*x);
  } else {
    s = 0.0f;
    for (int kh = max(0, R - h); kh < min(K, H + R - h); ++kh) {
      float row = 0.0f;  // on its own: hundreds of taps one after the other would round too often
      for (int kw = max(0, R - w); kw < min(K, W + R - w); ++kw) {
        const float weight =
            load_parameter<T>(args.weight, args.weight_is_float32, (static_cast<std::int64_t>(c) * K + kh) * K + kw);
        row = __fmaf_rn(weight, to_float(x[(static_cast<std::int64_t>(kh - R) * W + kw - R) * args.u_pitch]), row);
      }
      s += row;
    }
    s += load_parameter<T>(args.bias, args.bias_is_float32, c);
  }
  with_gate<T>(args.act,
               [&](auto gate) { args.y[pixel * D + d] = from_float<T>(gate.value(Lanes<1>{to_float(u[d])}).x * s); });
}

template <typename T>
void generic_kernel_size_forward(const ForwardArgs<T>& args, int K, cudaStream_t stream) {
  const int row_blocks = ceil_div(static_cast<std::int64_t>(args.W) * args.D, kGenericThreads);
  launch_kernel(generic_kernel_size_fwd_kernel<T>, static_cast<std::int64_t>(args.N) * args.H * row_blocks,
                kGenericThreads, 0, stream, GenericKernelSizeForward<T>{args, K, row_blocks});
}

template <typename T>
struct GenericKernelSizeBackward {
  BackwardArgs<T> args;
  int K;
  int row_blocks;
  int slots, slot_pixels, chunks;
};

// e = dy * act(g) of one conv channel, d = D - C + c
template <typename T, typename Gate>
__device__ __forceinline__ float gated_gradient(Gate gate, const BackwardArgs<T>& args, std::int64_t pixel, int d) {
  const float g = to_float(args.u[pixel * args.u_pitch + d]);
  return to_float(args.dy[pixel * args.dy_pitch + d]) * gate.value(Lanes<1>{g}).x;
}

// du; one channel of one pixel to a thread.
template <typename T>
__global__ void __launch_bounds__(kGenericThreads, 2)
    generic_kernel_size_bwd_kernel(const GenericKernelSizeBackward<T> call) {
  const BackwardArgs<T>& args = call.args;
  const int K = call.K, R = K / 2, H = args.H, W = args.W, D = args.D, C = args.C;
  const unsigned row = blockIdx.x / call.row_blocks, index = blockIdx.x % call.row_blocks * blockDim.x + threadIdx.x;
  const int w = index / D, d = index % D, h = row % H, c = d - (D - C);
  if (w >= W) return;
  const std::int64_t pixel = static_cast<std::int64_t>(row) * W + w;
  const T* const u = args.u + pixel * args.u_pitch;
  const float dy = to_float(args.dy[pixel * args.dy_pitch + d]);
  with_gate<T>(args.act, [&](auto gate) {
    const auto both = gate.both(Lanes<1>{to_float(u[d])});
    float s, ds = 0.0f;
    if (c < 0) {
      s = to_float(u[D + d]);
      ds = dy * both.value.x;
    } else {
      s = 0.0f;
      for (int kh = 0; kh < K; ++kh) {
        float s_row = 0.0f, ds_row = 0.0f;
        for (int kw = 0; kw < K; ++kw) {
          const float weight =
              load_parameter<T>(args.weight, args.weight_is_float32, (static_cast<std::int64_t>(c) * K + kh) * K + kw);
          const int dh = kh - R, dw = kw - R;
          const std::int64_t step = static_cast<std::int64_t>(dh) * W + dw;
          if (h + dh >= 0 && h + dh < H && w + dw >= 0 && w + dw < W) {
            s_row = __fmaf_rn(weight, to_float(u[step * args.u_pitch + D + d]), s_row);
          }
          if (h - dh >= 0 && h - dh < H && w - dw >= 0 && w - dw < W) {
            ds_row = __fmaf_rn(weight, gated_gradient(gate, args, pixel - step, d), ds_row);
          }
        }
        s += s_row;
        ds += ds_row;
      }
      s += load_parameter<T>(args.bias, args.bias_is_float32, c);
    }
    T* const du = args.du + pixel * (2 * D) + d;
    du[0] = from_float<T>(dy * s * both.slope.x);
    du[D] = from_float<T>(ds);
  });
}

constexpr int kGenericRows = 8;  // parts of a slot's pixels

// Partial sums of dweight and dbias; one tap of a chunk of channels and one slot of pixels to a block.
template <typename T>
__global__ void __launch_bounds__(kChunk* kGenericRows)
    generic_kernel_size_dweight_kernel(const GenericKernelSizeBackward<T> call) {
  const BackwardArgs<T>& args = call.args;
  const int K = call.K, R = K / 2, taps = K * K + 1, H = args.H, W = args.W, D = args.D, C = args.C;
  const int chunks = call.chunks, lane = threadIdx.x % kChunk, row = threadIdx.x / kChunk;
  const int slot = blockIdx.x / taps / chunks, tap = blockIdx.x / chunks % taps;
  const int c = blockIdx.x % chunks * kChunk + lane, d = D - C + c;
  const int dh = tap < K * K ? tap / K - R : 0, dw = tap < K * K ? tap % K - R : 0;
  const unsigned pixels = static_cast<unsigned>(args.N) * H * W, begin = static_cast<unsigned>(slot) * call.slot_pixels;
  float sum = 0.0f;
  if (c < C) {
    with_gate<T>(args.act, [&](auto gate) {
      const unsigned end = min(begin + call.slot_pixels, pixels);
      for (unsigned pixel = begin + row; pixel < end; pixel += kGenericRows) {
        const int w = static_cast<int>(pixel % W) + dw, h = static_cast<int>(pixel / W % H) + dh;
        if (w < 0 || w >= W || h < 0 || h >= H) continue;
        const T* const x = args.u + (static_cast<std::int64_t>(pixel) + dh * W + dw) * args.u_pitch + D + d;
        sum = __fmaf_rn(gated_gradient(gate, args, pixel, d), tap < K * K ? to_float(*x) : 1.0f, sum);
      }
    });
  }
  float* const sums = reinterpret_cast<float*>(dynamic_shared());
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (row != 0 || c >= C) return;
  for (int r = 1; r < kGenericRows; ++r) sum += sums[r * kChunk + lane];
  args.partials[(static_cast<std::int64_t>(slot) * taps + tap) * C + c] = sum;
}

template <typename T>
void generic_kernel_size_backward(const BackwardArgs<T>& args, int K, cudaStream_t stream) {
  const std::int64_t rows = static_cast<std::int64_t>(args.N) * args.H, pixels = rows * args.W;
  GenericKernelSizeBackward<T> call{args, K};
  call.row_blocks = ceil_div(static_cast<std::int64_t>(args.W) * args.D, kGenericThreads);
  call.slots = generic_kernel_size_slots(pixels);
  call.slot_pixels = ceil_div(pixels, call.slots);
  call.chunks = ceil_div(args.C, kChunk);
  launch_kernel(generic_kernel_size_bwd_kernel<T>, rows * call.row_blocks, kGenericThreads, 0, stream, call);
  launch_kernel(generic_kernel_size_dweight_kernel<T>,
                static_cast<std::int64_t>(call.slots) * (K * K + 1) * call.chunks, kChunk * kGenericRows,
                kChunk * kGenericRows * 4, stream, call);
}

}  // namespace mambaout_kernels::cuda
