#include <stdexcept>
#include <type_traits>

#include "backward_tiling.h"
#include "depthwise.h"
#include "gated_dwconv_cuda.h"
#include "split_backward.h"
#include "typed_launch.h"

namespace mambaout_kernels::cuda {

bool supported(const GatedDwconvShape& shape) {
  // Distances within a tile, and numbers of pixels and of partial sums, are 32-bit in the kernels.
  return shape.dtype != DType::kFloat64 && shape.D <= kMostChannels && shape.N * shape.H * shape.W <= kMostPixels &&
         shape.W * shape.D < std::int64_t{1} << 31;
}

namespace {
bool empty(const GatedDwconvShape& shape) { return shape.N == 0 || shape.H == 0 || shape.W == 0 || shape.D == 0; }
std::int64_t partials_bytes(const GatedDwconvShape& shape, int slots) {
  return std::int64_t{slots} * (shape.K * shape.K + 1) * shape.C * 4;
}
}  // namespace

std::int64_t backward_workspace_bytes(const GatedDwconvShape& shape, BackwardPath path) {
  if (empty(shape) || shape.C == 0) return 0;
  const std::int64_t fused = partials_bytes(shape, partial_slots(shape));
  const bool split =
      path == BackwardPath::kSplit ? can_split(shape) : path == BackwardPath::kChosen && prefers_split(shape);
  if (!split) return fused;
  // Pointers decide too, which are not known here.
  return std::max(fused, split_buffer_bytes(shape) + partials_bytes(shape, weight_gradient_slots(shape)));
}

namespace {
// f(the dtype as a constant)
template <typename F>
auto with_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32: return f(std::integral_constant<DType, DType::kFloat32>{});
    case DType::kBFloat16: return f(std::integral_constant<DType, DType::kBFloat16>{});
    case DType::kFloat16: return f(std::integral_constant<DType, DType::kFloat16>{});
    default: throw std::runtime_error("gated_dwconv: no float64 on CUDA");
  }
}
}  // namespace

void forward(const GatedDwconvForward& args, const Device& device, void* stream) {
  if (empty(args.shape)) return;
  with_dtype(args.shape.dtype, [&](auto dtype) { forward_as<dtype.value>(args, device, stream); });
}

void backward(const GatedDwconvBackward& args, void* workspace, const Device& device, void* stream, BackwardPath path) {
  if (empty(args.shape)) return;
  with_dtype(args.shape.dtype, [&](auto dtype) { backward_as<dtype.value>(args, workspace, device, stream, path); });
}

LaunchPlan forward_plan(const GatedDwconvShape& shape, const Device& device) {
  if (empty(shape)) return {};
  return with_dtype(shape.dtype, [&](auto dtype) { return forward_plan_as<dtype.value>(shape, device); });
}

LaunchPlan backward_plan(const GatedDwconvShape& shape) {
  if (empty(shape)) return {};
  return with_dtype(shape.dtype, [&](auto dtype) { return backward_plan_as<dtype.value>(shape); });
}

LaunchPlan weight_gradient_plan(const GatedDwconvShape& shape) {
  if (empty(shape) || !can_split(shape)) return {};
  return with_dtype(shape.dtype, [&](auto dtype) { return weight_gradient_plan_as<dtype.value>(shape); });
}

bool supported(const DepthwiseShape& shape) {
  return shape.dtype != DType::kFloat64 && shape.K == kDepthwiseKernelSize && shape.C <= kMostChannels &&
         shape.N * shape.H * shape.W <= kMostPixels && shape.W * shape.C < std::int64_t{1} << 31;
}

bool aligned(const DepthwiseShape& shape, const void* x, std::int64_t x_spacing) {
  const std::int64_t element = shape.dtype == DType::kFloat32 ? 4 : 2;
  return shape.C * element % 16 == 0 && x_spacing * element % 16 == 0 && reinterpret_cast<std::uintptr_t>(x) % 16 == 0;
}

namespace {
bool empty(const DepthwiseShape& shape) { return shape.N == 0 || shape.H == 0 || shape.W == 0 || shape.C == 0; }
}  // namespace

void depthwise(const Depthwise& call, const Device& device, void* stream) {
  if (empty(call.shape)) return;
  with_dtype(call.shape.dtype, [&](auto dtype) { depthwise_as<dtype.value>(call, device, stream); });
}

LaunchPlan depthwise_plan(const DepthwiseShape& shape, const Device& device) {
  if (empty(shape)) return {};
  return with_dtype(shape.dtype, [&](auto dtype) { return depthwise_plan_as<dtype.value>(shape, device); });
}

}  // namespace mambaout_kernels::cuda
