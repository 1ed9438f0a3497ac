// What the device compiler and the host shim of the tests (tests/cuda_host/shim.h) say differently; all other kernel
// code is the same text under both.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <climits>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "../gated_dwconv.h"

#ifdef MAMBAOUT_HOST_SHIM
#include "shim.h"
#else
#include <cuda_runtime.h>

namespace mambaout_kernels::cuda {

// The block's dynamic shared memory. 16-byte aligned.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

// Copies 16 bytes to shared memory, to arrive by wait_copies.
__device__ __forceinline__ void copy_async_16(void* to, const void* from) {
  const unsigned shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
}
// Likewise 4 bytes, of which those after the first `bytes` are not read but zero.
__device__ __forceinline__ void copy_async_4(void* to, const void* from, int bytes) {
  const unsigned shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending of this thread's latest groups are still under way.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// `volatile` keeps loads where they are written: before the arithmetic that hides their latency.
__device__ __forceinline__ uint4 load_global_16(const void* from) {
  uint4 v;
  asm volatile("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
  return v;
}
// Of memory that the same kernel writes.
__device__ __forceinline__ uint4 load_written_16(const void* from) {
  uint4 v;
  asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from)
               : "memory");
  return v;
}
template <typename T>
__device__ __forceinline__ T load_global(const T* from) {
  if constexpr (sizeof(T) == 4) {
    float v;
    asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(v) : "l"(from));
    return v;
  } else {
    unsigned short v;
    asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(v) : "l"(from));
    T result;
    memcpy(&result, &v, sizeof(T));
    return result;
  }
}
// A plain store is split into four by nvcc when its value was put together from parts.
__device__ __forceinline__ void store_global_16(void* to, uint4 v) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// 2^x and 1 / x to about 2 units in the last place, one instruction each.
__device__ __forceinline__ float exp2_fast(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
__device__ __forceinline__ float reciprocal_fast(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
// NaN where either operand is.
__device__ __forceinline__ float min_nan(float a, float b) {
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}
__device__ __forceinline__ float max_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// Keeps the compiler from turning a branch that is rarely taken into selections that are always made.
__device__ __forceinline__ void keep_branch() { asm volatile(""); }

// Keeps the compiler from computing a value again where it is used.
__device__ __forceinline__ void keep_in_register(unsigned& value) { asm volatile("" : "+r"(value)); }

// Two fused multiply-adds; one instruction where the chip has it.
__device__ __forceinline__ float2 fma_pair(float2 a, float2 b, float2 c) {
#if __CUDA_ARCH__ >= 1000
  return __ffma2_rn(a, b, c);
#else
  return make_float2(__fmaf_rn(a.x, b.x, c.x), __fmaf_rn(a.y, b.y, c.y));
#endif
}

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

template <typename Args>
void launch_kernel(void (*kernel)(Args), std::int64_t blocks, int threads, int shared_bytes, cudaStream_t stream,
                   const Args& args) {
  if (blocks > INT_MAX) throw std::runtime_error("gated_dwconv: more blocks than a launch can have");
  constexpr int kGrantedBytes = 48 * 1024;  // without asking
  if (shared_bytes > kGrantedBytes) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
          "gated_dwconv: shared memory");
  }
  void* arguments[] = {const_cast<Args*>(&args)};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                         dim3(static_cast<unsigned>(threads)), arguments, shared_bytes, stream),
        "gated_dwconv: launch");
}

}  // namespace mambaout_kernels::cuda
#endif
