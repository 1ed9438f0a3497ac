// Runs one call of csrc/cuda's entry points on the CPU: the call, u, dy, weight and bias from standard input; y, du,
// dweight and dbias to standard output. What lies beside a tensor is guarded, as memory.h says. What is
// found wrong goes to standard error, and the process fails: host.py makes it an error of the test.
//
// Images of zeros may go before those that are read and written: so many that only their first and last pages exist.
#include <cstdio>

#include "gated_dwconv_cuda.h"
#include "memory.h"
#include "shim.h"
#include "watch.h"

namespace {

using namespace mambaout_kernels;
using cuda_host::Memory;

// As host.py packs it.
struct Call {
  std::int64_t N, H, W, D, C, K, act, dtype, weight_dtype, bias_dtype;
  std::int64_t u_pitch, dy_pitch;          // elements from pixel to pixel
  std::int64_t u_offset, dy_offset;        // elements from an address that is a multiple of 16 bytes
  std::int64_t multiprocessors, major;     // of the device to pretend
  std::int64_t order, late_copies, error;  // cuda_host::Behaviour
  std::int64_t backward;                   // whether to run it too
  std::int64_t images_before;              // of N: zeros, neither read nor written here
  std::int64_t last_blocks;                // cuda_host::Behaviour
  std::int64_t weight_offset;              // elements from an address that is a multiple of 16 bytes
  std::int64_t path;                       // cuda::BackwardPath
};

}  // namespace

int main() {
  Call call;
  if (std::fread(&call, sizeof(call), 1, stdin) != 1) cuda_host::fail("no call");
  cuda_host::behaviour() = {static_cast<cuda_host::Order>(call.order), call.late_copies != 0,
                            static_cast<int>(call.error), static_cast<int>(call.last_blocks)};
  const GatedDwconvShape shape{call.N,
                               call.H,
                               call.W,
                               call.D,
                               call.C,
                               static_cast<int>(call.K),
                               static_cast<Act>(call.act),
                               static_cast<DType>(call.dtype),
                               static_cast<DType>(call.weight_dtype),
                               static_cast<DType>(call.bias_dtype)};
  const std::int64_t element = cuda_host::bytes_of(shape.dtype), pixels = shape.N * shape.H * shape.W;
  const auto tensor_bytes = [&](std::int64_t pitch, std::int64_t channels) {
    return pixels == 0 ? 0 : ((pixels - 1) * pitch + channels) * element;
  };
  if (!cuda::supported(shape)) cuda_host::fail("this shape is not supported");
  const std::int64_t before = call.images_before * shape.H * shape.W * element;
  const Memory u(tensor_bytes(call.u_pitch, 2 * shape.D), call.u_offset * element, before * call.u_pitch);
  const Memory dy(tensor_bytes(call.dy_pitch, shape.D), call.dy_offset * element, before * call.dy_pitch);
  const std::int64_t weight_element = cuda_host::bytes_of(shape.weight_dtype);
  const Memory weight(shape.C * shape.K * shape.K * weight_element, call.weight_offset * weight_element);
  const Memory bias(shape.C * cuda_host::bytes_of(shape.bias_dtype), 0);
  for (const Memory* input : {&u, &dy, &weight, &bias}) input->read();
  const auto view = [&](const Memory& memory, std::int64_t pitch) {
    return NhwcView{memory.data(), shape.H * shape.W * pitch, shape.W * pitch, pitch};
  };

  const Memory y(pixels * shape.D * element, 0, before * shape.D);
  const Memory du(pixels * 2 * shape.D * element, 0, before * 2 * shape.D);
  const Memory dweight(weight.bytes(), 0), dbias(bias.bytes(), 0);
  const auto path = static_cast<cuda::BackwardPath>(call.path);
  const std::int64_t workspace_bytes = cuda::backward_workspace_bytes(shape, path);
  // Under images of zeros e is as far from its beginning as they are in u.
  const Memory workspace(workspace_bytes, 0, call.images_before > 0 ? workspace_bytes : 0);
  for (const Memory* output : {&y, &du, &dweight, &dbias, &workspace}) {
    if (before == 0) cuda_host::watch::observe(output->data(), output->bytes());
  }
  const cuda::Device device{static_cast<int>(call.multiprocessors), static_cast<int>(call.major)};
  cuda::forward({shape, view(u, call.u_pitch), weight.data(), bias.data(), y.data()}, device, nullptr);
  if (call.backward != 0) {
    cuda::backward({shape, view(dy, call.dy_pitch), view(u, call.u_pitch), weight.data(), bias.data(), du.data(),
                    dweight.data(), dbias.data()},
                   workspace.data(), device, nullptr, path);
  }
  for (const Memory* output : {&y, &du, &dweight, &dbias}) output->write();
  if (cuda_host::watch::conflicts() > 0) {
    std::fprintf(stderr, "%d races; the first: %s\n", cuda_host::watch::conflicts(), cuda_host::watch::message());
    return 1;
  }
}
