#include "backward.cuh"

#include "backward_tiling.h"
#include "generic_kernel_size.cuh"
#include "launch.cuh"
#include "partials.cuh"
#include "split_backward.h"

namespace mambaout_kernels::cuda {
namespace {

template <typename Traits>
Tiling tiling_of(const GatedDwconvShape& shape) {
  using P = Packet<typename Traits::T, Traits::kAligned>;
  static_assert(Traits::kStrip == kBackwardStrip && Traits::kMaxGroups == kBackwardGroups);
  return backward_tiling(static_cast<int>(shape.N), static_cast<int>(shape.H), static_cast<int>(shape.W),
                         static_cast<int>(shape.C), static_cast<int>(shape.D - shape.C) / P::kChannels,
                         2 * Traits::kMaxThreads);
}

// f(traits) of the kernel for a filter; false where it has none of its own.
template <typename T, int K, typename F>
bool with_filter(bool aligned, F f) {
  if (aligned) {
    f(BackwardTraits<T, K, true, kBackwardStrip>{});
  } else {
    f(BackwardTraits<T, K, false, kBackwardStrip>{});
  }
  return true;
}
template <typename T, typename F>
bool with_traits(const GatedDwconvShape& shape, bool aligned, F f) {
  switch (shape.C == 0 ? 3 : shape.K) {
    case 3: return with_filter<T, 3>(aligned, f);
    case 5: return with_filter<T, 5>(aligned, f);
    case 7: return with_filter<T, 7>(aligned, f);
    default: return false;
  }
}

template <typename T>
void sum_slots(const GatedDwconvBackward& call, const float* partials, int slots, cudaStream_t stream) {
  const GatedDwconvShape& shape = call.shape;
  SumPartialsArgs<T> sums;
  sums.partials = partials;
  sums.slots = slots;
  sums.taps = shape.K * shape.K + 1;
  sums.C = static_cast<int>(shape.C);
  sums.dweight = call.dweight;
  sums.dbias = call.dbias;
  sums.weight_is_float32 = shape.weight_dtype == DType::kFloat32;
  sums.bias_is_float32 = shape.bias_dtype == DType::kFloat32;
  sum_partials(sums, stream);
}

template <typename T>
void split_backward(const GatedDwconvBackward& call, void* workspace, const Device& device, void* stream) {
  constexpr DType kDType = DType::MAMBAOUT_DTYPE;
  const GatedDwconvShape& shape = call.shape;
  const DepthwiseShape conv{shape.N,         shape.H, shape.W, shape.C, shape.K, shape.dtype, shape.weight_dtype,
                            shape.bias_dtype};
  const T* const c = static_cast<const T*>(call.u.data) + (2 * shape.D - shape.C);
  T* const dc = static_cast<T*>(call.du) + (2 * shape.D - shape.C);
  auto* const partials = reinterpret_cast<float*>(static_cast<unsigned char*>(workspace) + split_buffer_bytes(shape));
  depthwise_as<kDType>({conv, c, call.u.stride_w, call.weight, call.bias, workspace, shape.C, false}, device, stream);
  gate_backward_as<kDType>(call, workspace, stream);
  depthwise_as<kDType>({conv, workspace, shape.C, call.weight, nullptr, dc, 2 * shape.D, true}, device, stream);
  weight_gradient_as<kDType>(call, workspace, partials, stream);
  sum_slots<T>(call, partials, weight_gradient_slots(shape), static_cast<cudaStream_t>(stream));
}

}  // namespace

template <>
void backward_as<DType::MAMBAOUT_DTYPE>(const GatedDwconvBackward& call, void* workspace, const Device& device,
                                        void* stream_, BackwardPath path) {
  using T = ElementOf<DType::MAMBAOUT_DTYPE>::type;
  const GatedDwconvShape& shape = call.shape;
  const auto stream = static_cast<cudaStream_t>(stream_);
  const bool aligned = aligned_16<T>(shape) && aligned_16<T>(call.u.data, call.u.stride_w) &&
                       aligned_16<T>(call.dy.data, call.dy.stride_w) && aligned_16<T>(call.du, 2 * shape.D);
  if (path == BackwardPath::kSplit && !(aligned && can_split(shape))) {
    throw std::runtime_error("gated_dwconv: the split backward does not take this call");
  }
  if (path == BackwardPath::kSplit || (path == BackwardPath::kChosen && aligned && prefers_split(shape))) {
    return split_backward<T>(call, workspace, device, stream_);
  }
  BackwardArgs<T> args{};
  args.N = static_cast<int>(shape.N);
  args.H = static_cast<int>(shape.H);
  args.W = static_cast<int>(shape.W);
  args.D = static_cast<int>(shape.D);
  args.C = static_cast<int>(shape.C);
  args.act = shape.act;
  args.u = static_cast<const T*>(call.u.data);
  args.u_pitch = static_cast<int>(call.u.stride_w);
  args.dy = static_cast<const T*>(call.dy.data);
  args.dy_pitch = static_cast<int>(call.dy.stride_w);
  args.weight = call.weight;
  args.bias = call.bias;
  args.weight_is_float32 = shape.weight_dtype == DType::kFloat32;
  args.bias_is_float32 = shape.bias_dtype == DType::kFloat32;
  args.du = static_cast<T*>(call.du);
  args.partials = static_cast<float*>(workspace);
  const bool own = with_traits<T>(shape, aligned, [&](auto traits) {
    using Traits = decltype(traits);
    args.tiling = tiling_of<Traits>(shape);
    launch_kernel(gated_dwconv_bwd_kernel<Traits>, args.tiling.blocks(), Traits::threads(args.tiling),
                  Traits::shared_bytes(args.tiling), stream, args);
  });
  if (!own) generic_kernel_size_backward(args, shape.K, stream);
  if (shape.C > 0) sum_slots<T>(call, args.partials, partial_slots(shape), stream);
}

template <>
LaunchPlan backward_plan_as<DType::MAMBAOUT_DTYPE>(const GatedDwconvShape& shape) {
  using T = ElementOf<DType::MAMBAOUT_DTYPE>::type;
  LaunchPlan plan{};
  with_traits<T>(shape, aligned_16<T>(shape), [&](auto traits) {
    using Traits = decltype(traits);
    const Tiling t = tiling_of<Traits>(shape);
    const int row_bytes = 3 * t.chunks * Traits::row_elements(t) * static_cast<int>(sizeof(T));
    const int identity = static_cast<int>((shape.D - shape.C) * sizeof(T)) * t.strips * Traits::kStrip / t.chunk_groups;
    const int batch = Traits::kBatch * Traits::threads(t) * (Traits::kAligned ? 16 : static_cast<int>(sizeof(T)));
    plan = {t, Traits::kStrip, Traits::threads(t), Traits::shared_bytes(t),
            Traits::kAhead * row_bytes + 3 * std::min(identity, batch)};
  });
  return plan;
}

}  // namespace mambaout_kernels::cuda
