// A 3 x 3 convolution of stride 2 with its norm and activation on the CPU, for inference, on packed weights.
#include "../cpu/conv3x3s2/arguments.h"

#include "packed.h"
#include "registration.h"

namespace mambaout_kernels {
namespace {

constexpr const char* kMaker = "pack_conv3x3s2";

std::int64_t packed_bytes(const Conv3x3s2Shape& shape, cpu::PackedFormat format) {
  return static_cast<std::int64_t>(sizeof(PackedHeader)) + cpu::conv3x3s2_packed_bytes(shape, format);
}

Tensor pack(const Tensor& like, const Conv3x3s2Shape& shape, const Conv3x3s2Parameters& parameters) {
  const cpu::PackedFormat format = cpu::conv3x3s2_packed_format(shape);
  Tensor packed = new_packed(like, PackedOp::kConv3x3s2, shape, format, packed_bytes(shape, format),
                             {shape.in_channels, shape.out_channels, shape.normed, 0});
  cpu::pack_conv3x3s2(shape, parameters, static_cast<PackedHeader*>(packed.mutable_data_ptr()) + 1);
  return packed;
}

Tensor pack_conv3x3s2(Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> norm_weight,
                      std::optional<Tensor> norm_bias, bool normed, double eps, std::string act, bool bf16) {
  check_cpu(weight, "weight");
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3 && weight.numel() > 0,
                  "weight must be (out_channels, in_channels, 3, 3); got ", text_of(weight.sizes()));
  Conv3x3s2Shape shape{};
  shape.in_channels = weight.size(1);
  shape.out_channels = weight.size(0);
  shape.normed = normed;
  checked_compute(shape, act, eps, bf16);
  Weights weights;
  return pack(
      weight, shape,
      {weights(weight, weight.sizes(), "weight"), weights(bias, shape.out_channels, "bias"),
       weights(norm_weight, shape.out_channels, "norm_weight"), weights(norm_bias, shape.out_channels, "norm_bias")});
}

// Every size is checked against the number of bytes that belongs to it.
Conv3x3s2Shape shape_of(const PackedHeader& header) {
  Conv3x3s2Shape shape{};
  shape.in_channels = header.sizes[0];
  shape.out_channels = header.sizes[1];
  shape.normed = header.sizes[2] != 0;
  read_compute(shape, header);
  STD_TORCH_CHECK(
      shape.in_channels > 0 && shape.out_channels > 0 && header.bytes == packed_bytes(shape, format_of(header)),
      "packed is damaged");
  return shape;
}

const PackedHeader& header_of(const Tensor& packed) {
  const PackedHeader& header = header_at(packed, 0, PackedOp::kConv3x3s2, kMaker);
  STD_TORCH_CHECK(header.bytes == packed.numel(), "packed is damaged");
  return header;
}

Tensor conv3x3s2(Tensor x, Tensor packed, std::int64_t out_channels, ScalarType dtype) {
  check_cpu(x, "x");
  packed = aligned(packed);
  const PackedHeader& header = header_of(packed);
  Conv3x3s2Call call{};
  call.shape = shape_of(header);
  check_compute_dtype(call.shape.compute_dtype);
  check_format(header, cpu::conv3x3s2_packed_format(call.shape));
  STD_TORCH_CHECK(out_channels == call.shape.out_channels, "out_channels must be ", call.shape.out_channels,
                  ", as the packed convolution's; got ", out_channels);
  STD_TORCH_CHECK(x.dim() == 4 && x.size(3) == call.shape.in_channels, "x must be (N, H, W, ", call.shape.in_channels,
                  "), as the packed convolution; got ", text_of(x.sizes()));
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
                  "dtype must be float32 or bfloat16; got ", dtype);
  call.in_dtype = float_or_bfloat16(x, "x");
  call.out_dtype = dtype == ScalarType::BFloat16 ? DType::kBFloat16 : DType::kFloat32;
  call.N = x.size(0);
  call.H = x.size(1);
  call.W = x.size(2);
  Tensor out = new_result(x, {call.N, call.out_height(), call.out_width(), out_channels}, "the result", dtype);
  if (out.numel() == 0) return out;
  call.x = view(x);
  call.x_stride_c = x.stride(3);
  call.packed = &header + 1;
  call.out = out.mutable_data_ptr();
  const int num_threads = static_cast<int>(torch::stable::get_num_threads());
  const Workspace workspace(cpu::conv3x3s2_workspace_bytes(call, num_threads));
  cpu::conv3x3s2_forward(call, num_threads, workspace.data(), parallel_for);
  return out;
}

// The same convolution for the instruction set in use.
Tensor repack_conv3x3s2(Tensor packed) {
  packed = aligned(packed);
  const PackedHeader& header = header_of(packed);
  Conv3x3s2Shape shape = shape_of(header);
  const auto floats = [&](std::vector<std::int64_t> sizes) {
    return torch::stable::new_empty(packed, sizes, ScalarType::Float);
  };
  Tensor weight = floats({shape.out_channels, shape.in_channels, 3, 3}), bias = floats({shape.out_channels}),
         norm_weight = floats({shape.out_channels}), norm_bias = floats({shape.out_channels});
  const auto data = [](Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); };
  cpu::unpack_conv3x3s2(shape, format_of(header), &header + 1,
                        {data(weight), data(bias), data(norm_weight), data(norm_bias)});
  fit_compute(shape);
  return pack(packed, shape, {data(weight), data(bias), data(norm_weight), data(norm_bias)});
}

// Whether the instruction set in use reads it.
bool runs_packed_conv3x3s2(Tensor packed) {
  packed = aligned(packed);
  const PackedHeader& header = header_of(packed);
  const Conv3x3s2Shape shape = shape_of(header);
  return cpu::conv3x3s2_supports(shape.compute_dtype) && same_format(header, cpu::conv3x3s2_packed_format(shape));
}

}  // namespace

void register_conv3x3s2(const std::string& ops_namespace) {
  register_ops(
      ops_namespace, "CPU",
      [](StableLibrary& m) {
        m.def(
            "pack_conv3x3s2(Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, bool normed, float "
            "eps, str act, bool bf16) -> Tensor");
        m.def("conv3x3s2(Tensor x, Tensor packed, int out_channels, ScalarType dtype) -> Tensor");
        m.def("repack_conv3x3s2(Tensor packed) -> Tensor");
        m.def("runs_packed_conv3x3s2(Tensor packed) -> bool");
      },
      [](StableLibrary& m) {
        m.impl("pack_conv3x3s2", TORCH_BOX(&pack_conv3x3s2));
        m.impl("conv3x3s2", TORCH_BOX(&conv3x3s2));
        m.impl("runs_packed_conv3x3s2", TORCH_BOX(&runs_packed_conv3x3s2));
        m.impl("repack_conv3x3s2", TORCH_BOX(&repack_conv3x3s2));
      });
}

}  // namespace mambaout_kernels
