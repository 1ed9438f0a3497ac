#include "gate_backward.cuh"

#include <algorithm>

#include "launch.cuh"
#include "tiling.h"

namespace mambaout_kernels::cuda {

template <>
void gate_backward_as<DType::MAMBAOUT_DTYPE>(const GatedDwconvBackward& call, void* e, void* stream) {
  using T = ElementOf<DType::MAMBAOUT_DTYPE>::type;
  const GatedDwconvShape& shape = call.shape;
  const int packets = static_cast<int>(shape.D) / Packet<T, true>::kChannels;
  GateBackwardArgs<T> args{};
  args.pixels = static_cast<int>(shape.N * shape.H * shape.W);
  args.D = static_cast<int>(shape.D);
  args.C = static_cast<int>(shape.C);
  args.block_pixels = std::max(1, kGatePackets / packets);
  args.reciprocal = args.block_pixels == 1 ? 0 : 0xffffffffu / packets + 1;
  args.act = shape.act;
  args.u = static_cast<const T*>(call.u.data);
  args.u_pitch = static_cast<int>(call.u.stride_w);
  args.dy = static_cast<const T*>(call.dy.data);
  args.dy_pitch = static_cast<int>(call.dy.stride_w);
  args.du = static_cast<T*>(call.du);
  args.e = static_cast<T*>(e);
  launch_kernel(gate_backward_kernel<T>, ceil_div(args.pixels, args.block_pixels), kGateThreads, 0,
                static_cast<cudaStream_t>(stream), args);
}

}  // namespace mambaout_kernels::cuda
