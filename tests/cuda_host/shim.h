// The part of CUDA that the kernels of csrc/cuda use, on the CPU, for tests: one fibre per CUDA thread, blocks one
// after the other. Deterministic. Included by csrc/cuda/platform.cuh in place of the CUDA runtime.
//
// Three things a GPU may do are chosen by the test (Behaviour): the order in which threads reach a barrier, whether an
// asynchronous copy lands when it is started or when it is waited for, and how far off the approximate exp2 and
// reciprocal are. Shared memory starts as NaN.
#pragma once

#include <vector_functions.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace cuda_host {

enum class Order { kForward, kReverse, kShuffled };

struct Behaviour {
  Order order = Order::kForward;
  bool copies_land_late = false;
  int error = 0;        // of exp2 and reciprocal, in units of their bound: -1, 0 or 1
  int last_blocks = 0;  // of every launch: only these are run; 0: all
};
Behaviour& behaviour();

uint3& thread_index();
uint3& block_index();
dim3& block_size();
unsigned char* shared_memory();
void sync_block();
void sync_warp();
// Zeros follow the copied bytes, up to `total`.
void start_copy(void* to, const void* from, std::size_t bytes, std::size_t total);
void commit_copies();
void wait_copies(int pending);

void launch(unsigned blocks, unsigned threads, std::size_t shared_bytes, const std::function<void()>& body);

// Ends the process: a device would trap or corrupt memory.
[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_host: %s\n", what);
  std::abort();
}
inline void require_aligned(const void* pointer, std::size_t bytes) {
  if (reinterpret_cast<std::uintptr_t>(pointer) % bytes != 0) fail("misaligned access");
}

}  // namespace cuda_host

#define threadIdx (cuda_host::thread_index())
#define blockIdx (cuda_host::block_index())
#define blockDim (cuda_host::block_size())
#define __syncthreads() cuda_host::sync_block()
#define __syncwarp() cuda_host::sync_warp()

inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((1ull * a * b) >> 32); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

namespace mambaout_kernels::cuda {

using std::max;
using std::min;

inline unsigned char* dynamic_shared() { return cuda_host::shared_memory(); }

inline void copy_async_16(void* to, const void* from) {
  cuda_host::require_aligned(to, 16);
  cuda_host::require_aligned(from, 16);
  cuda_host::start_copy(to, from, 16, 16);
}
inline void copy_async_4(void* to, const void* from, int bytes) {
  cuda_host::require_aligned(to, 4);
  cuda_host::require_aligned(from, 4);
  cuda_host::start_copy(to, from, bytes, 4);
}
inline void commit_copies() { cuda_host::commit_copies(); }
template <int kPending>
void wait_copies() {
  cuda_host::wait_copies(kPending);
}

inline uint4 load_global_16(const void* from) {
  cuda_host::require_aligned(from, 16);
  return *static_cast<const uint4*>(from);
}
inline uint4 load_written_16(const void* from) { return load_global_16(from); }
template <typename T>
T load_global(const T* from) {
  return *from;
}
inline void store_global_16(void* to, uint4 v) {
  cuda_host::require_aligned(to, 16);
  *static_cast<uint4*>(to) = v;
}

// ex2.approx.ftz: relative error up to 2^-22; rcp.approx.ftz: up to 2^-23. Subnormal results are 0.
inline float approximate(double exact, double bound) {
  const float x = static_cast<float>(exact * (1 + bound * cuda_host::behaviour().error));
  return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x;
}
inline float exp2_fast(float x) { return approximate(std::exp2(static_cast<double>(x)), 0x1p-22); }
inline float reciprocal_fast(float x) { return approximate(1.0 / static_cast<double>(x), 0x1p-23); }
inline float min_nan(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : std::fmin(a, b); }
inline float max_nan(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : std::fmax(a, b); }
inline void keep_branch() {}
inline void keep_in_register(unsigned&) {}
inline float2 fma_pair(float2 a, float2 b, float2 c) {
  return make_float2(std::fma(a.x, b.x, c.x), std::fma(a.y, b.y, c.y));
}

template <typename Args>
void launch_kernel(void (*kernel)(Args), std::int64_t blocks, int threads, int shared_bytes, cudaStream_t,
                   const Args& args) {
  cuda_host::launch(static_cast<unsigned>(blocks), threads, shared_bytes, [&] { kernel(args); });
}

}  // namespace mambaout_kernels::cuda
