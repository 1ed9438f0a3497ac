// The downsampling on the CPU, for inference.
#include "bindings_common.h"
#include "bindings_pack.h"
#include "cpu/conv3x3s2/arguments.h"

namespace mambaout_kernels {
namespace {

// Before the packed parameters, in the same tensor.
struct alignas(64) PackHeader {
  std::int64_t magic, id, in_channels, out_channels, multiplied;
};
constexpr std::int64_t kMagic = 0x446f776e4d616d62;

Conv3x3s2Shape shape_of(const Tensor& weight, bool bf16) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3 && weight.numel() > 0,
                  "weight must be (out_channels, in_channels, 3, 3)");
  Conv3x3s2Shape shape{};
  shape.in_channels = weight.size(1);
  shape.out_channels = weight.size(0);
  shape.compute_dtype = bf16 ? DType::kBFloat16 : DType::kFloat32;
  STD_TORCH_CHECK(cpu::conv3x3s2_supports(shape.compute_dtype), "this processor multiplies no bfloat16");
  return shape;
}

std::int64_t pack_bytes(const Conv3x3s2Shape& shape) {
  return static_cast<std::int64_t>(sizeof(PackHeader)) +
         cpu::conv3x3s2_packed_bytes(shape, cpu::conv3x3s2_packed_format(shape));
}
std::int64_t pack_bytes_for(Tensor weight, bool bf16) { return pack_bytes(shape_of(weight, bf16)); }

void pack(Tensor weight, Tensor bias, Tensor norm_weight, Tensor norm_bias, bool bf16, Tensor packed) {
  const Conv3x3s2Shape shape = shape_of(weight, bf16);
  Conv3x3s2Parameters p;
  p.weight = parameter(weight, weight.numel(), "weight");
  p.bias = optional_parameter(bias, shape.out_channels, "bias");
  p.norm_weight = optional_parameter(norm_weight, shape.out_channels, "norm_weight");
  p.norm_bias = optional_parameter(norm_bias, shape.out_channels, "norm_bias");
  auto* header = pack_memory<PackHeader>(packed, pack_bytes(shape));
  cpu::pack_conv3x3s2(shape, p, header + 1);
  *header = {kMagic, format_id(cpu::conv3x3s2_packed_format(shape)), shape.in_channels, shape.out_channels,
             static_cast<std::int64_t>(shape.compute_dtype)};
}

// The shape that was packed; nothing of it is believed that the size of the tensor does not bear out.
Conv3x3s2Shape packed_shape(const Tensor& packed) {
  const auto* header = pack_header<PackHeader>(packed, kMagic, "downsample_pack_cpu");
  Conv3x3s2Shape shape{};
  shape.in_channels = header->in_channels;
  shape.out_channels = header->out_channels;
  shape.compute_dtype = static_cast<DType>(header->multiplied);
  const bool multiplied_known = shape.compute_dtype == DType::kFloat32 || shape.compute_dtype == DType::kBFloat16;
  STD_TORCH_CHECK(multiplied_known && cpu::conv3x3s2_supports(shape.compute_dtype) &&
                      header->id == format_id(cpu::conv3x3s2_packed_format(shape)),
                  "packed is for another instruction set than the one in use; pack again");
  STD_TORCH_CHECK(packed.numel() == pack_bytes(shape), "packed has the wrong size");
  return shape;
}

Tensor downsample(Tensor x, Tensor packed, bool normed, double eps, std::int64_t act, bool bf16) {
  check_cpu(x, "x");
  Conv3x3s2Call call{};
  call.shape = packed_shape(packed);
  STD_TORCH_CHECK(act >= 0 && act <= 3, "act must be 0 to 3");
  call.shape.act = static_cast<Act>(act);
  call.shape.normed = normed;
  call.shape.eps = static_cast<float>(eps);
  STD_TORCH_CHECK(x.dim() == 4 && x.size(3) == call.shape.in_channels,
                  "x must be (N, H, W, in_channels) with the in_channels that was packed");
  call.in_dtype = float_or_bfloat16(x, "x");
  call.out_dtype = bf16 ? DType::kBFloat16 : DType::kFloat32;
  call.N = x.size(0);
  call.H = x.size(1);
  call.W = x.size(2);
  Tensor out = torch::stable::new_empty(x, {call.N, call.out_height(), call.out_width(), call.shape.out_channels},
                                        bf16 ? ScalarType::BFloat16 : ScalarType::Float);
  advise_huge_pages(out);
  call.x = view(x);
  call.x_stride_c = x.stride(3);
  call.packed = static_cast<const PackHeader*>(packed.const_data_ptr()) + 1;
  call.out = out.mutable_data_ptr();
  const int num_threads = static_cast<int>(torch::stable::get_num_threads());
  const Workspace workspace(cpu::conv3x3s2_workspace_bytes(call, num_threads));
  cpu::conv3x3s2_forward(call, num_threads, workspace.data(), parallel_for);
  return out;
}

}  // namespace
}  // namespace mambaout_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(mambaout_kernels_native, m) {
  m.def("downsample_pack_bytes_cpu(Tensor weight, bool bf16) -> int");
  m.def(
      "downsample_pack_cpu(Tensor weight, Tensor bias, Tensor norm_weight, Tensor norm_bias, bool bf16, Tensor(a!) "
      "packed) -> ()");
  m.def("downsample_cpu(Tensor x, Tensor packed, bool normed, float eps, int act, bool bf16) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mambaout_kernels_native, CPU, m) {
  m.impl("downsample_pack_bytes_cpu", TORCH_BOX(&mambaout_kernels::pack_bytes_for));
  m.impl("downsample_pack_cpu", TORCH_BOX(&mambaout_kernels::pack));
  m.impl("downsample_cpu", TORCH_BOX(&mambaout_kernels::downsample));
}
