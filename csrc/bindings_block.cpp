// The whole block on the CPU, for inference.
#include "bindings_common.h"
#include "bindings_pack.h"
#include "cpu/gated_cnn_block/arguments.h"

namespace mambaout_kernels {
namespace {

// Before the packed parameters, in the same tensor.
struct alignas(64) PackHeader {
  std::int64_t magic, id, dim, D, C, K, multiplied;
};
constexpr std::int64_t kMagic = 0x4d616d62614f7574;

GatedCnnBlockShape shape_of(const Tensor& fc1_weight, const Tensor& conv_weight, bool bf16) {
  STD_TORCH_CHECK(fc1_weight.dim() == 2 && fc1_weight.size(0) % 2 == 0 && fc1_weight.numel() > 0,
                  "fc1_weight must be (2 * hidden, dim)");
  STD_TORCH_CHECK(conv_weight.dim() == 4 && conv_weight.size(1) == 1 && conv_weight.size(2) == conv_weight.size(3) &&
                      conv_weight.size(2) % 2 == 1 && conv_weight.size(2) <= kMaxKernelSize,
                  "conv_weight must be (conv_channels, 1, K, K) with K odd, 1 to 31");
  GatedCnnBlockShape shape{};
  shape.dim = fc1_weight.size(1);
  shape.D = fc1_weight.size(0) / 2;
  shape.C = conv_weight.size(0);
  shape.K = static_cast<int>(conv_weight.size(2));
  shape.compute_dtype = bf16 ? DType::kBFloat16 : DType::kFloat32;
  STD_TORCH_CHECK(shape.C <= shape.D, "conv_weight must have at most hidden channels");
  STD_TORCH_CHECK(cpu::block_supports(shape.compute_dtype), "this processor multiplies no bfloat16");
  return shape;
}

std::int64_t pack_bytes(const GatedCnnBlockShape& shape) {
  return static_cast<std::int64_t>(sizeof(PackHeader)) +
         cpu::block_packed_bytes(shape, cpu::block_packed_format(shape));
}
std::int64_t pack_bytes_for(Tensor fc1_weight, Tensor conv_weight, bool bf16) {
  return pack_bytes(shape_of(fc1_weight, conv_weight, bf16));
}

void pack(Tensor norm_weight, Tensor norm_bias, Tensor fc1_weight, Tensor fc1_bias, Tensor conv_weight,
          Tensor conv_bias, Tensor fc2_weight, Tensor fc2_bias, Tensor scale, bool bf16, Tensor packed) {
  const GatedCnnBlockShape shape = shape_of(fc1_weight, conv_weight, bf16);
  GatedCnnBlockParameters p;
  p.norm_weight = optional_parameter(norm_weight, shape.dim, "norm_weight");
  p.norm_bias = optional_parameter(norm_bias, shape.dim, "norm_bias");
  p.fc1_weight = parameter(fc1_weight, 2 * shape.D * shape.dim, "fc1_weight");
  p.fc1_bias = optional_parameter(fc1_bias, 2 * shape.D, "fc1_bias");
  p.conv_weight = parameter(conv_weight, shape.C * shape.K * shape.K, "conv_weight");
  p.conv_bias = parameter(conv_bias, shape.C, "conv_bias");
  p.fc2_weight = parameter(fc2_weight, shape.dim * shape.D, "fc2_weight");
  p.fc2_bias = optional_parameter(fc2_bias, shape.dim, "fc2_bias");
  p.scale = optional_parameter(scale, shape.dim, "scale");

  auto* header = pack_memory<PackHeader>(packed, pack_bytes(shape));
  cpu::pack_block(shape, p, header + 1);
  *header = {kMagic,  format_id(cpu::block_packed_format(shape)),    shape.dim, shape.D, shape.C,
             shape.K, static_cast<std::int64_t>(shape.compute_dtype)};
}

// The shape that was packed; nothing of it is believed that the size of the tensor does not bear out.
GatedCnnBlockShape packed_shape(const Tensor& packed) {
  const auto* header = pack_header<PackHeader>(packed, kMagic, "gated_cnn_block_pack_cpu");
  GatedCnnBlockShape shape{};
  shape.dim = header->dim;
  shape.D = header->D;
  shape.C = header->C;
  shape.K = static_cast<int>(header->K);
  shape.compute_dtype = static_cast<DType>(header->multiplied);
  const bool multiplied_known = shape.compute_dtype == DType::kFloat32 || shape.compute_dtype == DType::kBFloat16;
  STD_TORCH_CHECK(multiplied_known && cpu::block_supports(shape.compute_dtype) &&
                      header->id == format_id(cpu::block_packed_format(shape)),
                  "packed is for another instruction set than the one in use; pack again");
  STD_TORCH_CHECK(packed.numel() == pack_bytes(shape), "packed has the wrong size");
  return shape;
}

Tensor gated_cnn_block(Tensor x, Tensor packed, double eps, std::int64_t act) {
  check_cpu(x, "x");
  GatedCnnBlockCall call{};
  call.shape = packed_shape(packed);
  STD_TORCH_CHECK(act >= 0 && act <= 3, "act must be 0 to 3");
  call.shape.act = static_cast<Act>(act);
  call.shape.eps = static_cast<float>(eps);
  STD_TORCH_CHECK(x.dim() == 4 && x.size(3) == call.shape.dim, "x must be (N, H, W, dim) with the dim that was packed");
  call.dtype = float_or_bfloat16(x, "x");
  call.N = x.size(0);
  call.H = x.size(1);
  call.W = x.size(2);
  x = last_dense(x);
  Tensor out = torch::stable::new_empty(x, {call.N, call.H, call.W, call.shape.dim});
  advise_huge_pages(out);
  call.x = view(x);
  call.packed = static_cast<const PackHeader*>(packed.const_data_ptr()) + 1;
  call.out = out.mutable_data_ptr();
  const int num_threads = static_cast<int>(torch::stable::get_num_threads());
  const Workspace workspace(cpu::block_workspace_bytes(call, num_threads));
  cpu::block_forward(call, num_threads, workspace.data(), parallel_for);
  return out;
}

}  // namespace
}  // namespace mambaout_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(mambaout_kernels_native, m) {
  m.def("gated_cnn_block_pack_bytes_cpu(Tensor fc1_weight, Tensor conv_weight, bool bf16) -> int");
  m.def(
      "gated_cnn_block_pack_cpu(Tensor norm_weight, Tensor norm_bias, Tensor fc1_weight, Tensor fc1_bias, Tensor "
      "conv_weight, Tensor conv_bias, Tensor fc2_weight, Tensor fc2_bias, Tensor scale, bool bf16, Tensor(a!) packed) "
      "-> ()");
  m.def("gated_cnn_block_cpu(Tensor x, Tensor packed, float eps, int act) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mambaout_kernels_native, CPU, m) {
  m.impl("gated_cnn_block_pack_bytes_cpu", TORCH_BOX(&mambaout_kernels::pack_bytes_for));
  m.impl("gated_cnn_block_pack_cpu", TORCH_BOX(&mambaout_kernels::pack));
  m.impl("gated_cnn_block_cpu", TORCH_BOX(&mambaout_kernels::gated_cnn_block));
}
