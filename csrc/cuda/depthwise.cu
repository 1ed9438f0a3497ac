#include "depthwise.cuh"

#include "launch.cuh"

namespace mambaout_kernels::cuda {
namespace {

template <typename Traits>
Tiling tiling_of(const DepthwiseShape& shape, const Device& device) {
  TilingRequest request{};
  request.N = static_cast<int>(shape.N), request.H = static_cast<int>(shape.H), request.W = static_cast<int>(shape.W);
  request.C = static_cast<int>(shape.C);
  request.packets_per_block = 1;  // of which there are none
  request.strip = Traits::kStrip;
  request.max_groups = Traits::kMaxGroups;
  request.multiprocessors = device.multiprocessors;
  // Small images go two or more to a block, where that leaves a multiprocessor two blocks: all are resident then, and
  // bringing 49 weights for each channel takes the time of several rows.
  request.wanted_blocks = 2 * device.multiprocessors;
  request.waves = 1;
  request.most_rows = 28;
  return choose_tiling(request);
}

// f(traits). At compute capability 10 one instruction does two multiply-adds: there, two channels to a thread.
template <typename T, typename F>
void with_traits(const Device& device, F f) {
  if (device.major != 10) {
    f(DepthwiseTraits<T, kDepthwiseKernelSize, 1, 7>{});
  } else {
    f(DepthwiseTraits<T, kDepthwiseKernelSize, 2, 7>{});
  }
}

}  // namespace

template <>
void depthwise_as<DType::MAMBAOUT_DTYPE>(const Depthwise& call, const Device& device, void* stream) {
  using T = ElementOf<DType::MAMBAOUT_DTYPE>::type;
  const DepthwiseShape& shape = call.shape;
  DepthwiseArgs<T> args{};
  args.N = static_cast<int>(shape.N);
  args.H = static_cast<int>(shape.H);
  args.W = static_cast<int>(shape.W);
  args.C = static_cast<int>(shape.C);
  args.x = static_cast<const T*>(call.x);
  args.x_pitch = static_cast<int>(call.x_spacing);
  args.weight = call.weight;
  args.bias = call.bias;
  args.weight_is_float32 = shape.weight_dtype == DType::kFloat32;
  args.bias_is_float32 = shape.bias_dtype == DType::kFloat32;
  args.flipped = call.flipped;
  args.s = static_cast<T*>(call.s);
  args.s_pitch = static_cast<int>(call.s_spacing);
  with_traits<T>(device, [&](auto traits) {
    using Traits = decltype(traits);
    args.tiling = tiling_of<Traits>(shape, device);
    launch_kernel(depthwise_kernel<Traits>, args.tiling.blocks(), Traits::threads(args.tiling),
                  Traits::shared_bytes(args.tiling), static_cast<cudaStream_t>(stream), args);
  });
}

template <>
LaunchPlan depthwise_plan_as<DType::MAMBAOUT_DTYPE>(const DepthwiseShape& shape, const Device& device) {
  using T = ElementOf<DType::MAMBAOUT_DTYPE>::type;
  LaunchPlan plan{};
  with_traits<T>(device, [&](auto traits) {
    using Traits = decltype(traits);
    const Tiling t = tiling_of<Traits>(shape, device);
    const int stage_bytes = t.chunks * Traits::chunk_elements(t) * static_cast<int>(sizeof(T));
    plan = {t, Traits::kStrip, Traits::threads(t), Traits::shared_bytes(t), (Traits::kStages - 1) * stage_bytes};
  });
  return plan;
}

}  // namespace mambaout_kernels::cuda
