// The op on CUDA, and the depthwise convolution alone. No symbol of libtorch_cuda: the module loads under any torch,
// with CUDA or without, with a GPU or without.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <string>
#include <tuple>

#include "../cuda/depthwise.h"
#include "../cuda/gated_dwconv_cuda.h"
#include "gated_dwconv_checks.h"
#include "registration.h"

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

std::tuple<Tensor, Tensor, Tensor> backward_by(Tensor dy, Tensor u, Tensor weight, Tensor bias, std::int64_t act,
                                               cuda::BackwardPath path) {
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
  Tensor workspace = torch::stable::new_empty(u, {cuda::backward_workspace_bytes(shape, path) / 4}, ScalarType::Float);
  cuda::backward({shape, evenly_spaced(dy), evenly_spaced(u), weight.const_data_ptr(), bias.const_data_ptr(),
                  du.mutable_data_ptr(), dweight.mutable_data_ptr(), dbias.mutable_data_ptr()},
                 workspace.mutable_data_ptr(), select(device), current_stream(device), path);
  return {du, dweight, dbias};
}

std::tuple<Tensor, Tensor, Tensor> gated_dwconv_backward(Tensor dy, Tensor u, Tensor weight, Tensor bias,
                                                         std::int64_t act) {
  return backward_by(dy, u, weight, bias, act, cuda::BackwardPath::kChosen);
}

// By the path that is named, for measurements and tests.
std::tuple<Tensor, Tensor, Tensor> gated_dwconv_backward_by(Tensor dy, Tensor u, Tensor weight, Tensor bias,
                                                            std::int64_t act, std::int64_t path) {
  STD_TORCH_CHECK(path >= 0 && path <= 2, "path must be 0 (chosen), 1 (fused) or 2 (split); got ", path);
  return backward_by(dy, u, weight, bias, act, static_cast<cuda::BackwardPath>(path));
}

const char* name_of(DType dtype) {
  constexpr const char* kNames[] = {"float32", "bfloat16", "float16", "float64"};
  return kNames[static_cast<int>(dtype)];
}

std::string sizes_of(const Tensor& tensor) {
  std::string listed;
  for (std::int64_t dim = 0; dim < tensor.dim(); ++dim) {
    listed += (dim == 0 ? "" : ", ") + std::to_string(tensor.size(dim));
  }
  return "(" + listed + ")";
}

void check_parameter_of_x(const Tensor& tensor, const Tensor& x, DType dtype, const char* name) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == x.get_device_index(), name,
                  " must be on the CUDA device of x, ", x.get_device_index(), "; got ",
                  tensor.is_cuda() ? std::to_string(tensor.get_device_index()) : "another kind of device");
  const DType own = dtype_of(tensor, name);
  STD_TORCH_CHECK(own == dtype || own == DType::kFloat32, name, " must be float32 or have the dtype of x, ",
                  name_of(dtype), "; got ", name_of(own));
}

cuda::DepthwiseShape checked_depthwise(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  constexpr int K = cuda::kDepthwiseKernelSize;
  STD_TORCH_CHECK(x.is_cuda(), "x must be on a CUDA device");
  STD_TORCH_CHECK(x.dim() == 4, "x must be (N, H, W, C); got ", sizes_of(x));
  const DType dtype = dtype_of(x, "x");
  STD_TORCH_CHECK(dtype != DType::kFloat64, "x must be float32, bfloat16 or float16 on CUDA; got float64");
  check_parameter_of_x(weight, x, dtype, "weight");
  check_parameter_of_x(bias, x, dtype, "bias");
  const std::int64_t C = x.size(3);
  STD_TORCH_CHECK(
      weight.dim() == 4 && weight.size(0) == C && weight.size(1) == 1 && weight.size(2) == K && weight.size(3) == K,
      "weight must be (C, 1, ", K, ", ", K, ") for the ", C, " channels of x; got ", sizes_of(weight));
  STD_TORCH_CHECK(bias.dim() == 1 && bias.size(0) == C, "bias must be (C,) for the ", C, " channels of x; got ",
                  sizes_of(bias));
  const cuda::DepthwiseShape shape{
      x.size(0), x.size(1), x.size(2), C, K, dtype, dtype_of(weight, "weight"), dtype_of(bias, "bias")};
  STD_TORCH_CHECK(cuda::supported(shape), "x must have at most ", cuda::kMostChannels, " channels, ", cuda::kMostPixels,
                  " pixels, and fewer than 2^31 values in a row of pixels; got ", sizes_of(x));
  return shape;
}

// Only what the kernel can read as it lies: a copy would cost as much as the convolution.
std::int64_t checked_spacing(const Tensor& x, const cuda::DepthwiseShape& shape) {
  STD_TORCH_CHECK(x.size(3) <= 1 || x.stride(3) == 1, "x must have its channels side by side; got a stride of ",
                  x.stride(3));
  const std::int64_t spacing = pixel_spacing(x);
  STD_TORCH_CHECK(spacing >= 0 && spacing <= cuda::kMostSpacing, "x must have its pixels evenly spaced, at most ",
                  cuda::kMostSpacing, " elements apart; got strides ", x.stride(0), ", ", x.stride(1), ", ",
                  x.stride(2));
  const void* const data = x.const_data_ptr();
  STD_TORCH_CHECK(cuda::aligned(shape, data, spacing),
                  "x must have pixels that begin and end at multiples of 16 bytes; got ", shape.C, " channels, ",
                  spacing, " elements from pixel to pixel, of ", x.element_size(), " bytes, the first at ",
                  reinterpret_cast<std::uintptr_t>(data) % 16, " bytes beyond such a multiple");
  return spacing;
}

Tensor depthwise(Tensor x, Tensor weight, Tensor bias) {
  const cuda::DepthwiseShape shape = checked_depthwise(x, weight, bias);
  const bool empty = x.numel() == 0;
  const std::int64_t spacing = empty ? 0 : checked_spacing(x, shape);
  const std::int32_t device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  weight = dense(weight);
  bias = dense(bias);
  Tensor s = torch::stable::new_empty(x, {shape.N, shape.H, shape.W, shape.C});
  if (empty) return s;
  const cuda::Depthwise call{
      shape, x.const_data_ptr(), spacing, weight.const_data_ptr(), bias.const_data_ptr(), s.mutable_data_ptr(), shape.C,
      false};
  cuda::depthwise(call, select(device), current_stream(device));
  return s;
}

}  // namespace

void register_gated_dwconv_cuda(const std::string& ops_namespace) {
  register_ops(
      ops_namespace, "CUDA",
      [](StableLibrary& m) {
        m.def("gated_dwconv_cuda(Tensor u, Tensor weight, Tensor bias, int act) -> Tensor");
        m.def(
            "gated_dwconv_backward_cuda(Tensor dy, Tensor u, Tensor weight, Tensor bias, int act) -> (Tensor, "
            "Tensor, Tensor)");
        m.def(
            "gated_dwconv_backward_cuda_by(Tensor dy, Tensor u, Tensor weight, Tensor bias, int act, int path) -> "
            "(Tensor, Tensor, Tensor)");
        m.def("depthwise_cuda(Tensor x, Tensor weight, Tensor bias) -> Tensor");
      },
      [](StableLibrary& m) {
        m.impl("gated_dwconv_cuda", TORCH_BOX(&gated_dwconv));
        m.impl("gated_dwconv_backward_cuda", TORCH_BOX(&gated_dwconv_backward));
        m.impl("gated_dwconv_backward_cuda_by", TORCH_BOX(&gated_dwconv_backward_by));
        m.impl("depthwise_cuda", TORCH_BOX(&depthwise));
      });
}

}  // namespace mambaout_kernels
