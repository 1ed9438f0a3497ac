// Runs one call of cuda::depthwise on the CPU, as program.cpp does those of the op: the call, x, weight and bias from
// standard input; s to standard output.
#include <cstdio>

#include "depthwise.h"
#include "memory.h"
#include "shim.h"
#include "watch.h"

namespace {

using namespace mambaout_kernels;
using cuda_host::Memory;

// As depthwise.py packs it; the names are those of program.cpp.
struct Call {
  std::int64_t N, H, W, C, dtype, weight_dtype, bias_dtype, x_pitch, multiprocessors, major, order, late_copies;
  std::int64_t images_before, last_blocks, weight_offset;
};

}  // namespace

int main() {
  Call call;
  if (std::fread(&call, sizeof(call), 1, stdin) != 1) cuda_host::fail("no call");
  cuda_host::behaviour() = {static_cast<cuda_host::Order>(call.order), call.late_copies != 0, 0,
                            static_cast<int>(call.last_blocks)};
  const cuda::DepthwiseShape shape{call.N,
                                   call.H,
                                   call.W,
                                   call.C,
                                   cuda::kDepthwiseKernelSize,
                                   static_cast<DType>(call.dtype),
                                   static_cast<DType>(call.weight_dtype),
                                   static_cast<DType>(call.bias_dtype)};
  if (!cuda::supported(shape)) cuda_host::fail("this shape is not supported");
  const std::int64_t element = cuda_host::bytes_of(shape.dtype), pixels = shape.N * shape.H * shape.W;
  const std::int64_t before = call.images_before * shape.H * shape.W * element;
  const std::int64_t weight_element = cuda_host::bytes_of(shape.weight_dtype);
  const Memory x(pixels == 0 ? 0 : ((pixels - 1) * call.x_pitch + shape.C) * element, 0, before * call.x_pitch);
  const Memory weight(shape.C * shape.K * shape.K * weight_element, call.weight_offset * weight_element);
  const Memory bias(shape.C * cuda_host::bytes_of(shape.bias_dtype), 0);
  for (const Memory* input : {&x, &weight, &bias}) input->read();
  const Memory s(pixels * shape.C * element, 0, before * shape.C);
  if (before == 0) cuda_host::watch::observe(s.data(), s.bytes());
  if (!cuda::aligned(shape, x.data(), call.x_pitch)) cuda_host::fail("x is not aligned");
  cuda::depthwise({shape, x.data(), call.x_pitch, weight.data(), bias.data(), s.data(), shape.C, false},
                  {static_cast<int>(call.multiprocessors), static_cast<int>(call.major)}, nullptr);
  s.write();
  if (cuda_host::watch::conflicts() > 0) {
    std::fprintf(stderr, "%d races; the first: %s\n", cuda_host::watch::conflicts(), cuda_host::watch::message());
    return 1;
  }
}
