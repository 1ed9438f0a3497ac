// Gated CNN blocks on the CPU, for inference, on packed weights.
#include <algorithm>

#include "packed.h"
#include "registration.h"

namespace mambaout_kernels {
namespace {

constexpr const char* kMaker = "pack_gated_cnn_block";

std::int64_t packed_bytes(const GatedCnnBlockShape& shape, cpu::PackedFormat format) {
  return static_cast<std::int64_t>(sizeof(PackedHeader)) + cpu::block_packed_bytes(shape, format);
}

Tensor pack(const Tensor& like, const GatedCnnBlockShape& shape, const GatedCnnBlockParameters& parameters) {
  const cpu::PackedFormat format = cpu::block_packed_format(shape);
  Tensor packed = new_packed(like, PackedOp::kGatedCnnBlock, shape, format, packed_bytes(shape, format),
                             {shape.dim, shape.D, shape.C, shape.K});
  cpu::pack_block(shape, parameters, static_cast<PackedHeader*>(packed.mutable_data_ptr()) + 1);
  return packed;
}

// The weights of one block, those that are left out null.
Tensor pack_gated_cnn_block(std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias, Tensor fc1_weight,
                            std::optional<Tensor> fc1_bias, std::optional<Tensor> conv_weight,
                            std::optional<Tensor> conv_bias, Tensor fc2_weight, std::optional<Tensor> fc2_bias,
                            std::optional<Tensor> scale, double eps, std::string act, bool bf16) {
  check_cpu(fc1_weight, "fc1_weight");
  STD_TORCH_CHECK(fc1_weight.dim() == 2 && fc1_weight.size(0) % 2 == 0 && fc1_weight.numel() > 0,
                  "fc1_weight must be (2 * hidden, dim); got ", text_of(fc1_weight.sizes()));
  GatedCnnBlockShape shape{};
  shape.dim = fc1_weight.size(1);
  shape.D = fc1_weight.size(0) / 2;
  shape.C = 0;
  shape.K = 1;
  if (conv_weight.has_value()) {
    const Tensor& w = *conv_weight;
    check_cpu(w, "conv_weight");
    STD_TORCH_CHECK(
        w.dim() == 4 && w.size(1) == 1 && w.size(2) == w.size(3) && w.size(2) % 2 == 1 && w.size(2) <= kMaxKernelSize,
        "conv_weight must be (conv_channels, 1, K, K) with K odd, 1 to ", kMaxKernelSize, "; got ", text_of(w.sizes()));
    shape.C = w.size(0);
    shape.K = static_cast<int>(w.size(2));
  }
  STD_TORCH_CHECK(shape.C <= shape.D, "conv_weight must have at most hidden = ", shape.D, " channels, has ", shape.C);
  checked_compute(shape, act, eps, bf16);

  Weights weights;
  GatedCnnBlockParameters p{};
  p.norm_weight = weights(norm_weight, shape.dim, "norm_weight");
  p.norm_bias = weights(norm_bias, shape.dim, "norm_bias");
  p.fc1_weight = weights(fc1_weight, {2 * shape.D, shape.dim}, "fc1_weight");
  p.fc1_bias = weights(fc1_bias, 2 * shape.D, "fc1_bias");
  p.conv_weight = weights(conv_weight, {shape.C, 1, shape.K, shape.K}, "conv_weight");
  p.conv_bias = weights(conv_bias, shape.C, "conv_bias");
  p.fc2_weight = weights(fc2_weight, {shape.dim, shape.D}, "fc2_weight");
  p.fc2_bias = weights(fc2_bias, shape.dim, "fc2_bias");
  p.scale = weights(scale, shape.dim, "scale");
  return pack(fc1_weight, shape, p);
}

// Every size is checked against the number of bytes that belongs to it.
GatedCnnBlockShape shape_of(const PackedHeader& header) {
  GatedCnnBlockShape shape{};
  shape.dim = header.sizes[0];
  shape.D = header.sizes[1];
  shape.C = header.sizes[2];
  shape.K = static_cast<int>(header.sizes[3]);
  read_compute(shape, header);
  STD_TORCH_CHECK(shape.dim > 0 && shape.D > 0 && shape.C <= shape.D && shape.K % 2 == 1 && shape.K <= kMaxKernelSize &&
                      header.bytes == packed_bytes(shape, format_of(header)),
                  "packed is damaged");
  return shape;
}

// Calls body(header, offset) for each of the blocks whose packed weights follow each other.
template <typename Body>
void for_each_block(const Tensor& packed, const Body& body) {
  STD_TORCH_CHECK(packed.numel() > 0, "packed must come from ", kMaker, "; got 0 bytes");
  for (std::int64_t offset = 0; offset < packed.numel();) {
    const PackedHeader& header = header_at(packed, offset, PackedOp::kGatedCnnBlock, kMaker);
    body(header, offset);
    offset += header.bytes;
  }
}

// x (N, H, W, dim) through the blocks whose packed weights follow each other in `packed`.
Tensor gated_cnn_blocks(Tensor x, Tensor packed) {
  check_cpu(x, "x");
  packed = aligned(packed);
  GatedCnnBlockCall call{};
  call.dtype = float_or_bfloat16(x, "x");
  const int num_threads = static_cast<int>(torch::stable::get_num_threads());
  std::vector<Tensor> free;  // outputs that the next block no longer reads
  for_each_block(packed, [&](const PackedHeader& header, std::int64_t offset) {
    call.shape = shape_of(header);
    check_compute_dtype(call.shape.compute_dtype);
    check_format(header, cpu::block_packed_format(call.shape));
    STD_TORCH_CHECK(x.dim() == 4 && x.size(3) == call.shape.dim, "x must be (N, H, W, ", call.shape.dim,
                    "), as the packed block; got ", text_of(x.sizes()));
    call.N = x.size(0);
    call.H = x.size(1);
    call.W = x.size(2);
    const Tensor in = last_dense(x);
    Tensor out = free.empty() ? new_result(in, {call.N, call.H, call.W, call.shape.dim}, "the result") : free.back();
    if (!free.empty()) free.pop_back();
    if (out.numel() > 0) {
      call.x = view(in);
      call.packed = &header + 1;
      call.out = out.mutable_data_ptr();
      const Workspace workspace(cpu::block_workspace_bytes(call, num_threads));
      cpu::block_forward(call, num_threads, workspace.data(), parallel_for);
    }
    if (offset > 0) free.push_back(x);
    x = out;
  });
  return x;
}

// One block's weights as pack_gated_cnn_block takes them, in its order, but those that were left out are there.
std::vector<Tensor> unpack_at(const Tensor& packed, const PackedHeader& header) {
  const GatedCnnBlockShape shape = shape_of(header);
  const auto floats = [&](std::vector<std::int64_t> sizes) {
    return torch::stable::new_empty(packed, sizes, ScalarType::Float);
  };
  std::vector<Tensor> to{floats({shape.dim}),
                         floats({shape.dim}),
                         floats({2 * shape.D, shape.dim}),
                         floats({2 * shape.D}),
                         floats({shape.C, 1, shape.K, shape.K}),
                         floats({shape.C}),
                         floats({shape.dim, shape.D}),
                         floats({shape.dim}),
                         floats({shape.dim})};
  const auto data = [&](int i) { return static_cast<float*>(to[i].mutable_data_ptr()); };
  cpu::unpack_block(shape, format_of(header), &header + 1,
                    {data(0), data(1), data(2), data(3), data(4), data(5), data(6), data(7), data(8)});
  return to;
}

// Blocks that run one after the other, as one packed tensor.
Tensor join_packed(std::vector<Tensor> parts) {
  std::int64_t bytes = 0;
  for (Tensor& part : parts) {
    part = aligned(part);
    bytes += part.numel();
  }
  STD_TORCH_CHECK(bytes > 0, "packed must have at least one element");
  Tensor all = new_packed(parts.front(), bytes);
  auto* to = static_cast<char*>(all.mutable_data_ptr());
  for (const Tensor& part : parts) {
    to = std::copy_n(static_cast<const char*>(part.const_data_ptr()), part.numel(), to);
  }
  return all;
}

// The same blocks for the instruction set in use.
Tensor repack_gated_cnn_blocks(Tensor packed) {
  packed = aligned(packed);
  std::vector<Tensor> parts;
  for_each_block(packed, [&](const PackedHeader& header, std::int64_t) {
    GatedCnnBlockShape shape = shape_of(header);
    const std::vector<Tensor> from = unpack_at(packed, header);
    fit_compute(shape);
    const auto data = [&](int i) { return static_cast<const float*>(from[i].const_data_ptr()); };
    parts.push_back(
        pack(packed, shape, {data(0), data(1), data(2), data(3), data(4), data(5), data(6), data(7), data(8)}));
  });
  return join_packed(parts);
}

// Whether the instruction set in use reads them.
bool runs_packed_gated_cnn_blocks(Tensor packed) {
  packed = aligned(packed);
  bool runs = true;
  for_each_block(packed, [&](const PackedHeader& header, std::int64_t) {
    const GatedCnnBlockShape shape = shape_of(header);
    runs = runs && cpu::block_supports(shape.compute_dtype) && same_format(header, cpu::block_packed_format(shape));
  });
  return runs;
}

}  // namespace

void register_gated_cnn_blocks(const std::string& ops_namespace) {
  register_ops(
      ops_namespace, "CPU",
      [](StableLibrary& m) {
        m.def(
            "pack_gated_cnn_block(Tensor? norm_weight, Tensor? norm_bias, Tensor fc1_weight, Tensor? fc1_bias, "
            "Tensor? conv_weight, Tensor? conv_bias, Tensor fc2_weight, Tensor? fc2_bias, Tensor? scale, float eps, "
            "str act, bool bf16) -> Tensor");
        m.def("gated_cnn_blocks(Tensor x, Tensor packed) -> Tensor");
        m.def("join_packed(Tensor[] packed) -> Tensor");
        m.def("repack_gated_cnn_blocks(Tensor packed) -> Tensor");
        m.def("runs_packed_gated_cnn_blocks(Tensor packed) -> bool");
      },
      [](StableLibrary& m) {
        m.impl("pack_gated_cnn_block", TORCH_BOX(&pack_gated_cnn_block));
        m.impl("gated_cnn_blocks", TORCH_BOX(&gated_cnn_blocks));
        m.impl("join_packed", TORCH_BOX(&join_packed));
        m.impl("runs_packed_gated_cnn_blocks", TORCH_BOX(&runs_packed_gated_cnn_blocks));
        m.impl("repack_gated_cnn_blocks", TORCH_BOX(&repack_gated_cnn_blocks));
      });
}

}  // namespace mambaout_kernels
