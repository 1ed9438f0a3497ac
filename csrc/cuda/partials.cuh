// dweight and dbias from the partial sums: the second of the two stages. The order of the additions depends on the
// shape alone.
#pragma once

#include "lanes.cuh"
#include "tiling.h"

namespace mambaout_kernels::cuda {

template <typename T>
struct SumPartialsArgs {
  const float* partials;  // [slots][taps][C]; the last tap is dbias
  int slots, taps, C;
  void* dweight;  // (C, 1, K, K), K * K = taps - 1
  void* dbias;    // (C,)
  bool weight_is_float32, bias_is_float32;
};

constexpr int kSumLanes = 32, kSumRows = 8;  // threads of a block: results x parts of the slots

template <typename T>
__global__ void __launch_bounds__(kSumLanes* kSumRows) sum_partials_kernel(const SumPartialsArgs<T> args) {
  const unsigned results = static_cast<unsigned>(args.taps) * args.C;
  const int lane = threadIdx.x % kSumLanes, row = threadIdx.x / kSumLanes;
  const unsigned result = blockIdx.x * kSumLanes + lane;
  float sum = 0.0f;
  if (result < results) {
#pragma unroll 8
    for (int slot = row; slot < args.slots; slot += kSumRows) {
      sum += args.partials[static_cast<std::int64_t>(slot) * results + result];
    }
  }
  float* const sums = reinterpret_cast<float*>(dynamic_shared());
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (row != 0 || result >= results) return;
  for (int r = 1; r < kSumRows; ++r) sum += sums[r * kSumLanes + lane];
  const int tap = result / args.C, c = result % args.C;
  const bool is_bias = tap + 1 == args.taps;
  void* const to = is_bias ? args.dbias : args.dweight;
  const std::int64_t index = is_bias ? c : static_cast<std::int64_t>(c) * (args.taps - 1) + tap;
  if (is_bias ? args.bias_is_float32 : args.weight_is_float32) {
    static_cast<float*>(to)[index] = sum;
  } else {
    static_cast<T*>(to)[index] = from_float<T>(sum);
  }
}

template <typename T>
void sum_partials(const SumPartialsArgs<T>& args, cudaStream_t stream) {
  const std::int64_t results = static_cast<std::int64_t>(args.taps) * args.C;
  launch_kernel(sum_partials_kernel<T>, (results + kSumLanes - 1) / kSumLanes, kSumLanes * kSumRows,
                kSumLanes * kSumRows * 4, stream, args);
}

}  // namespace mambaout_kernels::cuda
