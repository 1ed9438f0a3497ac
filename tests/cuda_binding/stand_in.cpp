// What csrc/torch/gated_dwconv_cuda.cpp calls, without a GPU: the functions of libtorch that know of devices, the CUDA
// runtime, the way to the current stream; and the launches, which run the kernels on the CPU (tests/cuda_host).
// stand_in.py links it with that file as it is: the linker turns every call of f there into one of __wrap_f, and
// __real_f is f.
//
// Tensors on the CPU pass for ones on a CUDA device. All calls are recorded. New memory holds NaN. A launch first holds
// its arguments to what gated_dwconv_cuda.h asks for: an error tells more than a write out of bounds.
#define USE_CUDA  // shim.h then declares aoti_torch_get_current_cuda_stream
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <initializer_list>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

#include "cuda/depthwise.h"
#include "cuda/gated_dwconv_cuda.h"
#include "torch/registration.h"

namespace {

using namespace mambaout_kernels;

struct Place {
  bool cuda;
  int device;
};

struct State {
  Place place{true, 0};                       // of tensors
  std::map<const void*, Place> others;        // of tensors that begin at an address
  int current = 0;                            // device of torch
  int runtime = 0;                            // device of the CUDA runtime that the module has linked
  std::int64_t streams = 0;                   // the current stream of a device is streams + device
  std::string failing;                        // the call that fails
  std::map<const void*, std::int64_t> bytes;  // of memory that was allocated
  std::string calls;                          // one JSON object a line
} state;

using Fields = std::initializer_list<std::pair<const char*, std::int64_t>>;
void record(const char* name, Fields fields) {
  std::ostringstream line;
  line << "{\"call\": \"" << name << "\", \"current\": " << state.current << ", \"runtime\": " << state.runtime;
  for (const auto& [field, value] : fields) line << ", \"" << field << "\": " << value;
  state.calls += line.str() + "}\n";
}
bool fails(const char* name) { return state.failing == name; }
std::int64_t number(const void* address) { return reinterpret_cast<std::intptr_t>(address); }

const void* address_of(AtenTensorHandle tensor) {
  const void* address = nullptr;
  torch_get_const_data_ptr(tensor, &address);
  return address;
}
std::int64_t bytes_of(AtenTensorHandle tensor) {
  std::int64_t numel = 0;
  std::int32_t dtype = 0;
  aoti_torch_get_numel(tensor, &numel);
  aoti_torch_get_dtype(tensor, &dtype);
  return numel * static_cast<std::int64_t>(aoti_torch_dtype_element_size(dtype));
}
Place place_of(AtenTensorHandle tensor) {
  const auto found = state.others.find(address_of(tensor));
  return found == state.others.end() ? state.place : found->second;
}

std::int64_t bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

void require(bool holds, const char* name, const char* what) {
  if (!holds) throw std::runtime_error(std::string("stand-in: ") + name + " " + what);
}
void require_new(const void* data, std::int64_t bytes, const char* name) {
  const auto found = state.bytes.find(data);
  require(bytes == 0 || (found != state.bytes.end() && found->second >= bytes), name, "is not new memory of its size");
}
void require_readable(const NhwcView& view, const GatedDwconvShape& shape, bool even, const char* name) {
  const std::int64_t spacing = view.stride_w;
  require(view.stride_h == shape.W * spacing && view.stride_n == shape.H * view.stride_h, name, "is not evenly spaced");
  require(spacing >= 0 && spacing <= cuda::kMostSpacing, name, "is spaced too far");
  require(!even || shape.dtype == DType::kFloat32 || spacing % 2 == 0, name, "has an odd spacing");
  require(number(view.data) % 4 == 0, name, "does not begin at a multiple of 4 bytes");
}
bool empty(const GatedDwconvShape& shape) { return shape.N * shape.H * shape.W * shape.D == 0; }

// What torch has in libtorch_cuda.
decltype(aoti_torch_get_current_cuda_stream) current_stream;
AOTITorchError current_stream(std::int32_t device, void** stream) {
  record("stream", {{"device", device}});
  if (fails("stream")) return AOTI_TORCH_FAILURE;
  *stream = reinterpret_cast<void*>(state.streams + device);
  return AOTI_TORCH_SUCCESS;
}

}  // namespace

// --- libtorch ---
extern "C" {

decltype(aoti_torch_library_init_impl) __real_aoti_torch_library_init_impl;
AOTITorchError __wrap_aoti_torch_library_init_impl(const char* ops_namespace, const char* key, const char* file,
                                                   std::uint32_t line, TorchLibraryHandle* result) {
  const char* const ours = std::strcmp(key, "CUDA") == 0 ? "CPU" : "Meta";
  return __real_aoti_torch_library_init_impl(ops_namespace, ours, file, line, result);
}

AOTITorchError __wrap_aoti_torch_get_device_type(AtenTensorHandle tensor, std::int32_t* type) {
  *type = place_of(tensor).cuda ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu();
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError __wrap_aoti_torch_get_device_index(AtenTensorHandle tensor, std::int32_t* index) {
  *index = place_of(tensor).device;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError __wrap_aoti_torch_create_device_guard(std::int32_t device, DeviceGuardHandle* guard) {
  if (fails("guard")) return AOTI_TORCH_FAILURE;
  *guard = reinterpret_cast<DeviceGuardHandle>(new int(std::exchange(state.current, device)));
  record("guard", {{"device", device}});
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError __wrap_aoti_torch_delete_device_guard(DeviceGuardHandle guard) {
  int* const before = reinterpret_cast<int*>(guard);
  state.current = *before;
  delete before;
  record("release", {});
  return AOTI_TORCH_SUCCESS;
}

decltype(torch_call_dispatcher) __real_torch_call_dispatcher;
AOTITorchError __wrap_torch_call_dispatcher(const char* op, const char* overload, StableIValue* stack,
                                            std::uint64_t version) {
  const void* const from = address_of(reinterpret_cast<AtenTensorHandle>(stack[0]));
  const AOTITorchError status = __real_torch_call_dispatcher(op, overload, stack, version);
  if (status != AOTI_TORCH_SUCCESS) return status;
  const auto result = reinterpret_cast<AtenTensorHandle>(stack[0]);
  const void* const to = address_of(result);
  const std::int64_t bytes = bytes_of(result);
  if (std::strcmp(op, "aten::new_empty") == 0 && bytes > 0) std::memset(const_cast<void*>(to), 0xff, bytes);
  if (to != from) state.bytes[to] = bytes;
  record(op, {{"from", number(from)}, {"to", number(to)}, {"bytes", bytes}});
  return status;
}

// --- the way to the current stream ---
void* __wrap_dlopen(const char* file, int flags) {
  record(file, {{"flags", flags}});
  return fails("dlopen") ? nullptr : &state;
}
void* __wrap_dlsym(void* library, const char* name) {
  record(name, {});
  const bool known = library == &state && std::strcmp(name, "aoti_torch_get_current_cuda_stream") == 0;
  return known && !fails("dlsym") ? reinterpret_cast<void*>(&current_stream) : nullptr;
}

// --- the CUDA runtime ---
cudaError_t __wrap_cudaSetDevice(int device) {
  if (fails("cudaSetDevice")) return cudaErrorInvalidDevice;
  state.runtime = device;
  record("cudaSetDevice", {{"device", device}});
  return cudaSuccess;
}
cudaError_t __wrap_cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  const bool count = attribute == cudaDevAttrMultiProcessorCount,
             major = attribute == cudaDevAttrComputeCapabilityMajor;
  if (fails(count ? "multiprocessors" : "major") || !(count || major)) return cudaErrorInvalidValue;
  *value = count ? 100 + device : 8 + device % 3;
  record("cudaDeviceGetAttribute", {{"device", device}});
  return cudaSuccess;
}

}  // extern "C"

// --- the launches ---
namespace mambaout_kernels::cuda {

// By their names for the linker.
void run_forward(const GatedDwconvForward&, const Device&,
                 void*) __asm__("__real__ZN16mambaout_kernels4cuda7forwardERKNS_18GatedDwconvForwardERKNS0_6DeviceEPv");
void record_forward(const GatedDwconvForward&, const Device&, void*) __asm__(
    "__wrap__ZN16mambaout_kernels4cuda7forwardERKNS_18GatedDwconvForwardERKNS0_6DeviceEPv");
void run_backward(const GatedDwconvBackward&, void*, const Device&, void*, BackwardPath) __asm__(
    "__real__ZN16mambaout_kernels4cuda8backwardERKNS_19GatedDwconvBackwardEPvRKNS0_6DeviceES4_NS0_12BackwardPathE");
void record_backward(const GatedDwconvBackward&, void*, const Device&, void*, BackwardPath) __asm__(
    "__wrap__ZN16mambaout_kernels4cuda8backwardERKNS_19GatedDwconvBackwardEPvRKNS0_6DeviceES4_NS0_12BackwardPathE");

void record_forward(const GatedDwconvForward& call, const Device& device, void* stream) {
  const GatedDwconvShape& shape = call.shape;
  record("forward", {{"u", number(call.u.data)},
                     {"u_spacing", call.u.stride_w},
                     {"weight", number(call.weight)},
                     {"bias", number(call.bias)},
                     {"y", number(call.y)},
                     {"multiprocessors", device.multiprocessors},
                     {"major", device.major},
                     {"stream", number(stream)}});
  if (fails("launch")) throw std::runtime_error("gated_dwconv: launch: out of luck");
  if (empty(shape)) return;
  require_readable(call.u, shape, true, "u");
  require_new(call.y, shape.N * shape.H * shape.W * shape.D * bytes_of(shape.dtype), "y");
  run_forward(call, device, stream);
}

void record_backward(const GatedDwconvBackward& call, void* workspace, const Device& device, void* stream,
                     BackwardPath path) {
  const GatedDwconvShape& shape = call.shape;
  record("backward", {{"u", number(call.u.data)},
                      {"u_spacing", call.u.stride_w},
                      {"dy", number(call.dy.data)},
                      {"dy_spacing", call.dy.stride_w},
                      {"weight", number(call.weight)},
                      {"bias", number(call.bias)},
                      {"du", number(call.du)},
                      {"dweight", number(call.dweight)},
                      {"dbias", number(call.dbias)},
                      {"workspace", number(workspace)},
                      {"workspace_bytes", backward_workspace_bytes(shape, path)},
                      {"multiprocessors", device.multiprocessors},
                      {"major", device.major},
                      {"path", static_cast<int>(path)},
                      {"stream", number(stream)}});
  if (fails("launch")) throw std::runtime_error("gated_dwconv: launch: out of luck");
  if (empty(shape)) return;
  require_readable(call.u, shape, true, "u");
  require_readable(call.dy, shape, false, "dy");
  require_new(call.du, shape.N * shape.H * shape.W * 2 * shape.D * bytes_of(shape.dtype), "du");
  require_new(call.dweight, shape.C * shape.K * shape.K * bytes_of(shape.weight_dtype), "dweight");
  require_new(call.dbias, shape.C * bytes_of(shape.bias_dtype), "dbias");
  require_new(workspace, backward_workspace_bytes(shape, path), "the workspace");
  require(number(workspace) % 16 == 0, "the workspace", "is not aligned");
  run_backward(call, workspace, device, stream, path);
}

// Likewise depthwise(const Depthwise&, const Device&, void*).
void run_depthwise(const Depthwise&, const Device&,
                   void*) __asm__("__real__ZN16mambaout_kernels4cuda9depthwiseERKNS0_9DepthwiseERKNS0_6DeviceEPv");
void record_depthwise(const Depthwise&, const Device&,
                      void*) __asm__("__wrap__ZN16mambaout_kernels4cuda9depthwiseERKNS0_9DepthwiseERKNS0_6DeviceEPv");

void record_depthwise(const Depthwise& call, const Device& device, void* stream) {
  const DepthwiseShape& shape = call.shape;
  record("depthwise", {{"x", number(call.x)},
                       {"x_spacing", call.x_spacing},
                       {"weight", number(call.weight)},
                       {"bias", number(call.bias)},
                       {"s", number(call.s)},
                       {"multiprocessors", device.multiprocessors},
                       {"major", device.major},
                       {"stream", number(stream)}});
  if (fails("launch")) throw std::runtime_error("gated_dwconv: launch: out of luck");
  require(supported(shape), "the shape", "is not supported");
  require(aligned(shape, call.x, call.x_spacing), "x", "is not aligned");
  require(call.x_spacing >= 0 && call.x_spacing <= kMostSpacing, "x", "is spaced too far");
  require_new(call.s, shape.N * shape.H * shape.W * shape.C * bytes_of(shape.dtype), "s");
  require(number(call.s) % 16 == 0, "s", "is not aligned");
  run_depthwise(call, device, stream);
}

}  // namespace mambaout_kernels::cuda

// --- for stand_in.py ---
extern "C" {
[[gnu::visibility("default")]] void stand_in_register(const char* ops_namespace) {
  register_gated_dwconv_cuda(ops_namespace);
}
[[gnu::visibility("default")]] void stand_in_begin(int device, int current, int runtime, std::int64_t streams,
                                                   const char* failing) {
  state = {};
  state.place.device = device;
  state.current = current;
  state.runtime = runtime;
  state.streams = streams;
  state.failing = failing;
}
[[gnu::visibility("default")]] void stand_in_put(const void* address, bool cuda, int device) {
  state.others[address] = {cuda, device};
}
[[gnu::visibility("default")]] int stand_in_current() { return state.current; }
[[gnu::visibility("default")]] const char* stand_in_calls() { return state.calls.c_str(); }
}
