#include "forward.cuh"

#include "generic_kernel_size.cuh"
#include "launch.cuh"

namespace mambaout_kernels::cuda {
namespace {

template <typename Traits>
Tiling tiling_of(const GatedDwconvShape& shape, const Device& device) {
  using P = Packet<typename Traits::T, Traits::kAligned>;
  TilingRequest request;
  request.N = static_cast<int>(shape.N), request.H = static_cast<int>(shape.H), request.W = static_cast<int>(shape.W);
  request.C = static_cast<int>(shape.C);
  request.identity_packets = static_cast<int>(shape.D - shape.C) / P::kChannels;
  request.strip = Traits::kStrip;
  request.max_groups = Traits::kMaxGroups;
  request.packets_per_block = (P::kChannels == 1 ? 8 : 4) * Traits::kMaxThreads;
  request.multiprocessors = device.multiprocessors;
  request.wanted_blocks = Traits::kMinBlocks * device.multiprocessors;
  request.waves = 4;
  request.most_rows = 28;
  return choose_tiling(request);
}

// f(traits) of the kernel for a filter; false where it has none of its own. At compute capability 10 one instruction
// does two multiply-adds: there, two channels to a thread. At 12 it is two instructions again.
template <typename T, int K, typename F>
bool with_filter(bool aligned, const Device& device, F f) {
  if (!aligned) {
    f(ForwardTraits<T, K, false, 1, 7>{});
  } else if (device.major != 10) {
    f(ForwardTraits<T, K, true, 1, 7>{});
  } else {
    f(ForwardTraits<T, K, true, 2, 4>{});
  }
  return true;
}
template <typename T, typename F>
bool with_traits(const GatedDwconvShape& shape, bool aligned, const Device& device, F f) {
  switch (shape.C == 0 ? 3 : shape.K) {
    case 3: return with_filter<T, 3>(aligned, device, f);
    case 5: return with_filter<T, 5>(aligned, device, f);
    case 7: return with_filter<T, 7>(aligned, device, f);
    default: return false;
  }
}

}  // namespace

template <>
void forward_as<DType::MAMBAOUT_DTYPE>(const GatedDwconvForward& call, const Device& device, void* stream_) {
  using T = ElementOf<DType::MAMBAOUT_DTYPE>::type;
  const GatedDwconvShape& shape = call.shape;
  const auto stream = static_cast<cudaStream_t>(stream_);
  ForwardArgs<T> args{};
  args.N = static_cast<int>(shape.N);
  args.H = static_cast<int>(shape.H);
  args.W = static_cast<int>(shape.W);
  args.D = static_cast<int>(shape.D);
  args.C = static_cast<int>(shape.C);
  args.act = shape.act;
  args.u = static_cast<const T*>(call.u.data);
  args.u_pitch = static_cast<int>(call.u.stride_w);
  args.weight = call.weight;
  args.bias = call.bias;
  args.weight_is_float32 = shape.weight_dtype == DType::kFloat32;
  args.bias_is_float32 = shape.bias_dtype == DType::kFloat32;
  args.y = static_cast<T*>(call.y);
  const bool aligned = aligned_16<T>(shape) && aligned_16<T>(args.u, args.u_pitch) && aligned_16<T>(args.y, shape.D);
  const bool own = with_traits<T>(shape, aligned, device, [&](auto traits) {
    using Traits = decltype(traits);
    args.tiling = tiling_of<Traits>(shape, device);
    launch_kernel(gated_dwconv_fwd_kernel<Traits>, args.tiling.blocks(), Traits::threads(args.tiling),
                  Traits::shared_bytes(args.tiling), stream, args);
  });
  if (!own) generic_kernel_size_forward(args, shape.K, stream);
}

template <>
LaunchPlan forward_plan_as<DType::MAMBAOUT_DTYPE>(const GatedDwconvShape& shape, const Device& device) {
  using T = ElementOf<DType::MAMBAOUT_DTYPE>::type;
  LaunchPlan plan{};
  with_traits<T>(shape, aligned_16<T>(shape), device, [&](auto traits) {
    using Traits = decltype(traits);
    const Tiling t = tiling_of<Traits>(shape, device);
    const int stage_bytes = t.chunks * Traits::chunk_elements(t) * static_cast<int>(sizeof(T));
    const int identity = static_cast<int>((shape.D - shape.C) * sizeof(T)) * t.strips * Traits::kStrip / t.chunk_groups;
    const int batch = Traits::kBatch * Traits::threads(t) * (Traits::kAligned ? 16 : static_cast<int>(sizeof(T)));
    plan = {t, Traits::kStrip, Traits::threads(t), Traits::shared_bytes(t),
            (Traits::kStages - 1) * stage_bytes + 2 * std::min(identity, batch)};
  });
  return plan;
}

}  // namespace mambaout_kernels::cuda
