// The Python module of the CUDA kernels: ops, the plans of their launches, and how this was built.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>

#include "../cuda/depthwise.h"
#include "../cuda/gated_dwconv_cuda.h"
#include "registration.h"

namespace mambaout_kernels {
namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = MAMBAOUT_CUDA_COMPILER;
  info["architectures"] = MAMBAOUT_CUDA_ARCHITECTURES;
  info["torch_built_with"] = MAMBAOUT_TORCH_VERSION;
  info["torch_at_least"] = "2.10";
  return info;
}

pybind11::dict described(const cuda::LaunchPlan& plan) {
  pybind11::dict result;
  const cuda::Tiling& t = plan.tiling;
  result["blocks"] = t.blocks();
  result["strip"] = plan.strip;
  result["strips"] = t.strips;
  result["chunks"] = t.chunks;
  result["w_tiles"] = t.w_tiles;
  result["chunk_groups"] = t.chunk_groups;
  result["segments"] = t.segments;
  result["segment_rows"] = t.segment_rows;
  result["images_per_block"] = t.images_per_block;
  result["threads"] = plan.threads;
  result["shared_bytes"] = plan.shared_bytes;
  result["bytes_ahead"] = plan.bytes_ahead;
  return result;
}

// {"forward": {...}, "backward": {...}} of a contiguous u in bytes and counts, backward by the one kernel; for the
// audit. Where there is a split backward, "weight_gradient" too.
pybind11::dict launch_plans(const std::array<std::int64_t, 6>& sizes, int element_bytes, int multiprocessors,
                            int major) {
  GatedDwconvShape shape{sizes[0],        sizes[1],
                         sizes[2],        sizes[3],
                         sizes[4],        static_cast<int>(sizes[5]),
                         Act::kGelu,      element_bytes == 4 ? DType::kFloat32 : DType::kBFloat16,
                         DType::kFloat32, DType::kFloat32};
  if (!cuda::supported(shape)) throw pybind11::value_error("sizes are beyond what the kernels take");
  pybind11::dict plans;
  plans["forward"] = described(cuda::forward_plan(shape, {multiprocessors, major}));
  plans["backward"] = described(cuda::backward_plan(shape));
  const cuda::LaunchPlan weight_gradient = cuda::weight_gradient_plan(shape);
  if (weight_gradient.threads > 0) plans["weight_gradient"] = described(weight_gradient);
  return plans;
}

pybind11::dict depthwise_plan(const std::array<std::int64_t, 4>& sizes, int element_bytes, int multiprocessors,
                              int major) {
  const cuda::DepthwiseShape shape{sizes[0],
                                   sizes[1],
                                   sizes[2],
                                   sizes[3],
                                   cuda::kDepthwiseKernelSize,
                                   element_bytes == 4 ? DType::kFloat32 : DType::kBFloat16,
                                   DType::kFloat32,
                                   DType::kFloat32};
  if (!cuda::supported(shape)) throw pybind11::value_error("sizes are beyond what the kernels take");
  return described(cuda::depthwise_plan(shape, {multiprocessors, major}));
}

}  // namespace
}  // namespace mambaout_kernels

PYBIND11_MODULE(_C_cuda, m) {
  using namespace mambaout_kernels;
  m.doc() = "Native CUDA kernels of mambaout_kernels.";
  register_gated_dwconv_cuda(namespace_of(m.attr("__name__").cast<std::string>()));
  m.def("build_info", &build_info, "nvcc, architectures and torch of this build.");
  m.def("launch_plans", &launch_plans, pybind11::arg("sizes"), pybind11::arg("element_bytes"),
        pybind11::arg("multiprocessors"), pybind11::arg("major"),
        "What a forward and a backward launch with sizes (N, H, W, D, C, K) are made of on a device.");
  m.def("depthwise_plan", &depthwise_plan, pybind11::arg("sizes"), pybind11::arg("element_bytes"),
        pybind11::arg("multiprocessors"), pybind11::arg("major"),
        "What a launch of the depthwise convolution with sizes (N, H, W, C) is made of on a device.");
}
