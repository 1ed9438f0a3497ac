#include "weight_gradient.cuh"

#include "launch.cuh"

namespace mambaout_kernels::cuda {

template <>
void weight_gradient_as<DType::MAMBAOUT_DTYPE>(const GatedDwconvBackward& call, const void* e, float* partials,
                                               void* stream) {
  using T = ElementOf<DType::MAMBAOUT_DTYPE>::type;
  using Traits = WeightGradientTraits<T>;
  const GatedDwconvShape& shape = call.shape;
  WeightGradientArgs<T> args{};
  args.tiling = weight_gradient_tiling(shape);
  args.N = static_cast<int>(shape.N);
  args.H = static_cast<int>(shape.H);
  args.W = static_cast<int>(shape.W);
  args.C = static_cast<int>(shape.C);
  args.x_elements = Traits::x_elements(args.tiling);
  args.stage_elements = args.tiling.chunks * Traits::chunk_elements(args.tiling);
  args.x_row = shape.W * call.u.stride_w;
  args.e_row = shape.W * shape.C;
  args.x = static_cast<const T*>(call.u.data) + (2 * shape.D - shape.C);
  args.x_pitch = static_cast<int>(call.u.stride_w);
  args.e = static_cast<const T*>(e);
  args.partials = partials;
  launch_kernel(weight_gradient_kernel<T>, args.tiling.blocks(), Traits::threads(args.tiling),
                Traits::shared_bytes(args.tiling), static_cast<cudaStream_t>(stream), args);
}

template <>
LaunchPlan weight_gradient_plan_as<DType::MAMBAOUT_DTYPE>(const GatedDwconvShape& shape) {
  using T = ElementOf<DType::MAMBAOUT_DTYPE>::type;
  using Traits = WeightGradientTraits<T>;
  const Tiling t = weight_gradient_tiling(shape);
  const int stage_bytes = t.chunks * Traits::chunk_elements(t) * static_cast<int>(sizeof(T));
  return {t, Traits::kStrip, Traits::threads(t), Traits::shared_bytes(t), (Traits::kStages - 1) * stage_bytes};
}

}  // namespace mambaout_kernels::cuda
