// What the Python tests call (through ctypes) and what standalone.cpp calls: csrc/cuda's own entry points on memory of
// the CPU.
#include "cuda/gated_dwconv_cuda.h"
#include "shim.h"
#include "watch.h"

using namespace mambaout_kernels;

extern "C" {

struct HostCall {
  std::int64_t N, H, W, D, C;
  std::int32_t K, act, dtype, weight_dtype, bias_dtype;
  std::int64_t u_pitch, dy_pitch;
  std::int32_t multiprocessors, major;  // of the device to pretend
  std::int32_t order, copies_land_late, error;
};

static GatedDwconvShape shape_of(const HostCall& call) {
  cuda_host::behaviour() = {static_cast<cuda_host::Order>(call.order), call.copies_land_late != 0, call.error};
  return {call.N,
          call.H,
          call.W,
          call.D,
          call.C,
          call.K,
          static_cast<Act>(call.act),
          static_cast<DType>(call.dtype),
          static_cast<DType>(call.weight_dtype),
          static_cast<DType>(call.bias_dtype)};
}
static NhwcView view(const HostCall& call, const void* data, std::int64_t pitch) {
  return {data, call.H * call.W * pitch, call.W * pitch, pitch};
}

void host_forward(const HostCall* call, const void* u, const void* weight, const void* bias, void* y) {
  const GatedDwconvShape shape = shape_of(*call);
  cuda::forward({shape, view(*call, u, call->u_pitch), weight, bias, y}, {call->multiprocessors, call->major}, nullptr);
}

void host_observe(const void* begin, std::int64_t bytes) { cuda_host::watch::observe(begin, bytes); }
void host_forget() { cuda_host::watch::forget(); }
int host_conflicts() { return cuda_host::watch::conflicts(); }
const char* host_message() { return cuda_host::watch::message(); }

}
