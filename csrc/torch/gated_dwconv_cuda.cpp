// The op on CUDA, as the module _C_cuda. libtorch's stable ABI only, and no symbol of libtorch_cuda: it loads under any
// torch >= 2.10, with CUDA or without, with a GPU or without.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/accelerator.h>

#include <array>
#include <tuple>

#include "../cuda/gated_dwconv_cuda.h"
#include "gated_dwconv_checks.h"

namespace mambaout_kernels {
namespace {

void check_cuda(const Tensor& tensor, const char* name, std::int32_t device) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == device, name, " must be on the CUDA device of u");
}

GatedDwconvShape checked_cuda_shape(const Tensor& u, const Tensor& weight, const Tensor& bias, std::int64_t act) {
  STD_TORCH_CHECK(u.is_cuda(), "u must be on a CUDA device");
  check_cuda(weight, "weight", u.get_device_index());
  check_cuda(bias, "bias", u.get_device_index());
  STD_TORCH_CHECK(dtype_of(u, "u") != DType::kFloat64, "u must be float32, bfloat16 or float16 on CUDA");
  const GatedDwconvShape shape = checked_shape(u, weight, bias, act);
  STD_TORCH_CHECK(cuda::supported(shape), "u must have at most ", cuda::kMostChannels, " channels of gate, ",
                  cuda::kMostPixels, " pixels, and fewer than 2^31 values of gate in a row of pixels");
  return shape;
}

// Elements from one pixel to the next where all are evenly spaced; otherwise -1.
std::int64_t pixel_spacing(const Tensor& tensor) {
  std::int64_t spacing = -1, pixels = 1;
  for (int dim = 2; dim >= 0; --dim) {
    if (tensor.size(dim) == 1) continue;
    if (spacing < 0) spacing = tensor.stride(dim);
    if (tensor.stride(dim) != pixels * spacing) return -1;
    pixels *= tensor.size(dim);
  }
  return spacing < 0 ? tensor.size(3) : spacing;
}

bool readable(const Tensor& tensor, bool even) {
  if (tensor.size(3) > 1 && tensor.stride(3) != 1) return false;
  const std::int64_t spacing = pixel_spacing(tensor);
  const bool odd = tensor.element_size() == 2 && spacing % 2 != 0;
  return spacing >= 0 && spacing <= cuda::kMostSpacing && !(even && odd) &&
         reinterpret_cast<std::uintptr_t>(tensor.const_data_ptr()) % 4 == 0;
}

// As the kernels can read it (gated_dwconv_cuda.h): itself, or a copy. even: the spacing of two-byte types must be.
Tensor readable_form(const Tensor& tensor, bool even) {
  if (readable(tensor, even)) return tensor;
  return tensor.is_contiguous() ? torch::stable::clone(tensor) : torch::stable::contiguous(tensor);
}

NhwcView evenly_spaced(const Tensor& tensor) {
  const std::int64_t spacing = pixel_spacing(tensor), row = tensor.size(2) * spacing;
  return {tensor.const_data_ptr(), tensor.size(1) * row, row, spacing};
}

// The stable ABI of torch 2.10 has no way to a CUDA stream's handle but this function of libtorch_cuda, which is there
// whenever a CUDA tensor is.
void* current_stream(std::int32_t device) {
  using Function = AOTITorchError (*)(std::int32_t, void**);
  static const Function function = [] {
    void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(function != nullptr, "gated_dwconv: this torch has no CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(function(device, &stream) == 0, "gated_dwconv: no current CUDA stream");
  return stream;
}

// The CUDA runtime in this module is not torch's: what torch's guard has done has to be said to it too.
cuda::Device select(std::int32_t device) {
  cuda::Device result;
  STD_TORCH_CHECK(
      cudaSetDevice(device) == cudaSuccess &&
          cudaDeviceGetAttribute(&result.multiprocessors, cudaDevAttrMultiProcessorCount, device) == cudaSuccess &&
          cudaDeviceGetAttribute(&result.major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess,
      "gated_dwconv: CUDA device ", device, " does not answer");
  return result;
}

Tensor gated_dwconv(Tensor u, Tensor weight, Tensor bias, std::int64_t act) {
  const GatedDwconvShape shape = checked_cuda_shape(u, weight, bias, act);
  const std::int32_t device = u.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  u = readable_form(u, true);
  weight = dense(weight);
  bias = dense(bias);
  Tensor y = torch::stable::new_empty(u, {shape.N, shape.H, shape.W, shape.D});
  cuda::forward({shape, evenly_spaced(u), weight.const_data_ptr(), bias.const_data_ptr(), y.mutable_data_ptr()},
                select(device), current_stream(device));
  return y;
}

std::tuple<Tensor, Tensor, Tensor> gated_dwconv_backward(Tensor dy, Tensor u, Tensor weight, Tensor bias,
                                                         std::int64_t act) {
  const GatedDwconvShape shape = checked_cuda_shape(u, weight, bias, act);
  const std::int32_t device = u.get_device_index();
  check_cuda(dy, "dy", device);
  check_gradient(dy, shape);
  const torch::stable::accelerator::DeviceGuard guard(device);
  dy = readable_form(dy, false);
  u = readable_form(u, true);
  weight = dense(weight);
  bias = dense(bias);
  Tensor du = torch::stable::new_empty(u, {shape.N, shape.H, shape.W, 2 * shape.D});
  Tensor dweight = torch::stable::new_empty(weight, {shape.C, 1, shape.K, shape.K});
  Tensor dbias = torch::stable::new_empty(bias, {shape.C});
  if (u.numel() == 0) {
    torch::stable::zero_(dweight);
    torch::stable::zero_(dbias);
    return {du, dweight, dbias};
  }
  Tensor workspace = torch::stable::new_empty(u, {cuda::backward_workspace_bytes(shape) / 4}, ScalarType::Float);
  select(device);
  cuda::backward({shape, evenly_spaced(dy), evenly_spaced(u), weight.const_data_ptr(), bias.const_data_ptr(),
                  du.mutable_data_ptr(), dweight.mutable_data_ptr(), dbias.mutable_data_ptr()},
                 workspace.mutable_data_ptr(), current_stream(device));
  return {du, dweight, dbias};
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = MAMBAOUT_CUDA_COMPILER;
  info["architectures"] = MAMBAOUT_CUDA_ARCHITECTURES;
  info["torch_built_with"] = MAMBAOUT_TORCH_VERSION;
  info["torch_at_least"] = "2.10";
  return info;
}

// {"forward": {...}, "backward": {...}} of a contiguous u in bytes and counts; for the audit.
pybind11::dict launch_plans(const std::array<std::int64_t, 6>& sizes, int element_bytes, int multiprocessors,
                            int major) {
  GatedDwconvShape shape{sizes[0],        sizes[1],
                         sizes[2],        sizes[3],
                         sizes[4],        static_cast<int>(sizes[5]),
                         Act::kGelu,      element_bytes == 4 ? DType::kFloat32 : DType::kBFloat16,
                         DType::kFloat32, DType::kFloat32};
  if (!cuda::supported(shape)) throw pybind11::value_error("sizes are beyond what the kernels take");
  const auto described = [](const cuda::LaunchPlan& plan) {
    pybind11::dict result;
    const cuda::Tiling& t = plan.tiling;
    result["blocks"] = t.blocks();
    result["strip"] = plan.strip;
    result["strips"] = t.strips;
    result["chunks"] = t.chunks;
    result["w_tiles"] = t.w_tiles;
    result["chunk_groups"] = t.chunk_groups;
    result["segments"] = t.segments;
    result["segment_rows"] = t.segment_rows;
    result["images_per_block"] = t.images_per_block;
    result["threads"] = plan.threads;
    result["shared_bytes"] = plan.shared_bytes;
    result["bytes_ahead"] = plan.bytes_ahead;
    return result;
  };
  pybind11::dict plans;
  plans["forward"] = described(cuda::forward_plan(shape, {multiprocessors, major}));
  plans["backward"] = described(cuda::backward_plan(shape));
  return plans;
}

}  // namespace
}  // namespace mambaout_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(mambaout_kernels, m) {
  m.def("gated_dwconv_cuda(Tensor u, Tensor weight, Tensor bias, int act) -> Tensor");
  m.def(
      "gated_dwconv_backward_cuda(Tensor dy, Tensor u, Tensor weight, Tensor bias, int act) -> (Tensor, Tensor, "
      "Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mambaout_kernels, CUDA, m) {
  m.impl("gated_dwconv_cuda", TORCH_BOX(&mambaout_kernels::gated_dwconv));
  m.impl("gated_dwconv_backward_cuda", TORCH_BOX(&mambaout_kernels::gated_dwconv_backward));
}

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "Native CUDA kernels of mambaout_kernels.";
  m.def("build_info", &mambaout_kernels::build_info, "nvcc, architectures and torch of this build.");
  m.def("launch_plans", &mambaout_kernels::launch_plans, pybind11::arg("sizes"), pybind11::arg("element_bytes"),
        pybind11::arg("multiprocessors"), pybind11::arg("major"),
        "What a forward and a backward launch with sizes (N, H, W, D, C, K) are made of on a device.");
}
