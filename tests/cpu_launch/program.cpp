// Calls the launch interface of csrc/cpu, without torch or Python: calls from standard input, one after the other,
// each with its tensors; what it wrote to standard output. launch.py speaks to it.
//
// Every tensor has exactly the memory it needs. Under a sanitizer that is the heap; otherwise pages of its own between
// two that no access survives, at the end of its pages or at their begin: masked vector loads and stores, which
// AddressSanitizer does not see, fault there too.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "../../csrc/cpu/conv3x3s2/arguments.h"
#include "../../csrc/cpu/gated_cnn_block/arguments.h"
#include "../../csrc/cpu/gated_dwconv/arguments.h"
#include "../../csrc/cpu/head/arguments.h"
#include "../../csrc/cpu/isa.h"
#include "../../csrc/cpu/linear/arguments.h"
#include "../../csrc/cpu/selective_scan/arguments.h"
#include "../../csrc/cpu/simd/convert.h"

namespace {

using namespace mambaout_kernels;

// As launch.py packs it.
struct Call {
  std::int64_t kind;  // 0: forward, 1: backward, 2: the whole block, 3: conv3x3s2, 4: matmul, 5: gemm_nt,
                      // 6: the head, 7: a selective scan, 8: its backward
  std::int64_t isa, threads, at_begin;
  std::int64_t N, H, W, D, C, K, act, dtype, weight_dtype, bias_dtype;
  std::int64_t dim, compute_dtype;  // of the block; of conv3x3s2 dim to D channels, normed if C is 1
  double eps;                       // of a product M, N, K are N, H, W; row sums if C is 2; of the head D is hidden, C
                                    // classes, K whether there is a norm between, bias_dtype the result's
                                    // Of a scan H, W, C are G, L, S, K whether all scans share x
  std::int64_t strides[2][3];       // of u, or x; and of dy, or x's from channel to channel, or delta
};

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "cpu_launch: %s\n", what);
  std::exit(2);
}

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kHeap = true;
#else
constexpr bool kHeap = false;
#endif

constexpr int kCanary = 0xa5, kUnwritten = 0xff;  // the latter is NaN in every element type

class Memory {
 public:
  // offset: bytes that it lies away from where it would be well aligned.
  Memory(std::int64_t bytes, bool at_begin, std::int64_t alignment = 1, std::int64_t offset = 0) : bytes_(bytes) {
    if (kHeap) {
      if (posix_memalign(&base_, alignment < 16 ? 16 : alignment, bytes + offset) != 0) fail("out of memory");
      data_ = static_cast<char*>(base_) + offset;
    } else {
      const std::int64_t page = sysconf(_SC_PAGESIZE);
      inner_ = (bytes + offset + page - 1) / page * page;
      base_ = mmap(nullptr, inner_ + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (base_ == MAP_FAILED) fail("out of memory");
      pages_ = static_cast<char*>(base_) + page;
      if (inner_ > 0 && mprotect(pages_, inner_, PROT_READ | PROT_WRITE) != 0) fail("mprotect");
      std::memset(pages_, kCanary, inner_);
      data_ = at_begin ? pages_ + offset : pages_ + inner_ - offset - bytes;
    }
    if (bytes > 0) std::memset(data_, kUnwritten, bytes);
  }
  ~Memory() {
    if (kHeap) {
      std::free(base_);
    } else {
      munmap(base_, inner_ + 2 * sysconf(_SC_PAGESIZE));
    }
  }
  Memory(const Memory&) = delete;

  char* data() const { return data_; }
  const float* floats() const { return bytes_ == 0 ? nullptr : reinterpret_cast<const float*>(data_); }
  void write() const {
    if (static_cast<std::int64_t>(std::fwrite(data_, 1, bytes_, stdout)) != bytes_) fail("cannot write");
  }
  void check() const {
    for (const char* p = pages_; p < pages_ + inner_; ++p) {
      if ((p < data_ || p >= data_ + bytes_) && *p != static_cast<char>(kCanary)) fail("wrote beside a tensor");
    }
  }

 private:
  std::int64_t bytes_, inner_ = 0;
  void* base_ = nullptr;
  char *pages_ = nullptr, *data_ = nullptr;
};

// Scratch memory, which may have any alignment: a worse one than an allocator would give.
struct Scratch : Memory {
  Scratch(std::int64_t bytes, bool at_begin) : Memory(bytes, at_begin, 64, 8) {}
};

// A tensor of the call: its size in bytes, then its bytes. What was read must be the same when the call is over.
class Input {
 public:
  explicit Input(bool at_begin) : bytes_(size()), memory_(bytes_, at_begin), copy_(bytes_) {
    if (std::fread(memory_.data(), 1, bytes_, stdin) != bytes_) fail("input is too short");
    if (bytes_ > 0) std::memcpy(copy_.data(), memory_.data(), bytes_);
  }
  const Memory& operator*() const { return memory_; }
  char* data() const { return memory_.data(); }
  const float* floats() const { return memory_.floats(); }
  void check() const {
    memory_.check();
    if (bytes_ > 0 && std::memcmp(copy_.data(), memory_.data(), bytes_) != 0) fail("wrote to an input");
  }

 private:
  static std::size_t size() {
    std::int64_t bytes;
    if (std::fread(&bytes, sizeof(bytes), 1, stdin) != 1 || bytes < 0) fail("no size of a tensor");
    return static_cast<std::size_t>(bytes);
  }

  std::size_t bytes_;
  Memory memory_;
  std::vector<char> copy_;
};

// Threads of their own for every call: what they share, they share through the kernels.
void on_threads(std::int64_t count, cpu::RangeBody body, void* context) {
  std::vector<std::thread> threads;
  for (std::int64_t i = 1; i < count; ++i) threads.emplace_back([=] { body(context, i, i + 1); });
  body(context, 0, 1);
  for (auto& thread : threads) thread.join();
}

std::int64_t bytes_of(std::int64_t dtype) { return dtype == 3 ? 8 : dtype == 0 ? 4 : 2; }

NhwcView view(const Input& input, const std::int64_t (&strides)[3]) {
  return {input.data(), strides[0], strides[1], strides[2]};
}

void finish(std::initializer_list<const Input*> inputs, std::initializer_list<const Memory*> outputs) {
  for (const Input* input : inputs) input->check();
  for (const Memory* output : outputs) output->check();
}

void run_op(const Call& call) {
  const bool at_begin = call.at_begin != 0, backward = call.kind == 1;
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
  const int threads = static_cast<int>(call.threads);
  const std::int64_t pixels = call.N * call.H * call.W, element = bytes_of(call.dtype);
  const Input u(at_begin), weight(at_begin), bias(at_begin);
  if (!backward) {
    const Memory y(pixels * call.D * element, at_begin);
    const Scratch workspace(cpu::forward_workspace_bytes(shape, threads), at_begin);
    cpu::forward({shape, view(u, call.strides[0]), weight.data(), bias.data(), y.data()}, threads, workspace.data(),
                 on_threads);
    finish({&u, &weight, &bias}, {&y, &workspace});
    y.write();
    return;
  }
  const Input dy(at_begin);
  const Memory du(pixels * 2 * call.D * element, at_begin);
  const Memory dweight(call.C * call.K * call.K * bytes_of(call.weight_dtype), at_begin);
  const Memory dbias(call.C * bytes_of(call.bias_dtype), at_begin);
  const Scratch workspace(cpu::backward_workspace_bytes(shape, threads), at_begin);
  cpu::backward({shape, view(dy, call.strides[1]), view(u, call.strides[0]), weight.data(), bias.data(), du.data(),
                 dweight.data(), dbias.data()},
                threads, workspace.data(), on_threads);
  finish({&u, &weight, &bias, &dy}, {&du, &dweight, &dbias, &workspace});
  for (const Memory* output : {&du, &dweight, &dbias}) output->write();
}

// Memory to unpack a parameter to, which must then hold what was packed: `missing` for one that was left out, what a
// matrix is rounded to where its panels are bf16, and of three parts what the least number of bf16 leaves.
class Unpacked {
 public:
  Unpacked(std::int64_t count, bool at_begin) : count_(count), memory_(count * 4, at_begin) {}
  float* floats() const { return reinterpret_cast<float*>(memory_.data()); }
  void check(const Input& parameter, float missing, int parts = 0) const {
    memory_.check();
    for (std::int64_t i = 0; i < count_; ++i) {
      float expected = parameter.floats() == nullptr ? missing : parameter.floats()[i];
      if (parts == 1) {
        cpu::BFloat16 rounded;
        cpu::narrow(expected, &rounded);
        expected = cpu::widen(rounded);
      }
      const float left = parts == 3 ? 0x1p-134f : 0.0f;
      if (std::memcmp(&expected, floats() + i, 4) != 0 && !(__builtin_fabsf(expected - floats()[i]) <= left))
        fail("unpacked another value than was packed");
    }
  }

 private:
  std::int64_t count_;
  Memory memory_;
};

void run_block(const Call& call) {
  const bool at_begin = call.at_begin != 0;
  const int threads = static_cast<int>(call.threads);
  GatedCnnBlockCall block{};
  block.shape = {call.dim,
                 call.D,
                 call.C,
                 static_cast<int>(call.K),
                 static_cast<Act>(call.act),
                 static_cast<float>(call.eps),
                 static_cast<DType>(call.compute_dtype)};
  if (!cpu::block_supports(block.shape.compute_dtype)) fail("the block does not multiply this dtype here");
  const Input x(at_begin), norm_weight(at_begin), norm_bias(at_begin), fc1_weight(at_begin), fc1_bias(at_begin),
      conv_weight(at_begin), conv_bias(at_begin), fc2_weight(at_begin), fc2_bias(at_begin), scale(at_begin);
  const Memory packed(cpu::block_packed_bytes(block.shape, cpu::block_packed_format(block.shape)), at_begin, 64);
  const GatedCnnBlockParameters parameters{norm_weight.floats(), norm_bias.floats(),   fc1_weight.floats(),
                                           fc1_bias.floats(),    conv_weight.floats(), conv_bias.floats(),
                                           fc2_weight.floats(),  fc2_bias.floats(),    scale.floats()};
  cpu::pack_block(block.shape, parameters, packed.data());
  for (const cpu::PackedFormat format : cpu::kPackedFormats) {
    const std::int64_t dim = call.dim, D = call.D, C = call.C, taps = call.K * call.K;
    const Unpacked norm_weights(dim, at_begin), norm_biases(dim, at_begin), fc1_weights(2 * D * dim, at_begin),
        fc1_biases(2 * D, at_begin), conv_weights(C * taps, at_begin), conv_biases(C, at_begin),
        fc2_weights(dim * D, at_begin), fc2_biases(dim, at_begin), scales(dim, at_begin);
    const Memory bytes(cpu::block_packed_bytes(block.shape, format), at_begin, 64);
    cpu::pack_block(block.shape, format, parameters, bytes.data());
    cpu::unpack_block(
        block.shape, format, bytes.data(),
        {norm_weights.floats(), norm_biases.floats(), fc1_weights.floats(), fc1_biases.floats(), conv_weights.floats(),
         conv_biases.floats(), fc2_weights.floats(), fc2_biases.floats(), scales.floats()});
    bytes.check();
    norm_weights.check(norm_weight, 1);
    norm_biases.check(norm_bias, 0);
    fc1_weights.check(fc1_weight, 0, format.parts);
    fc1_biases.check(fc1_bias, 0);
    conv_weights.check(conv_weight, 0);
    conv_biases.check(conv_bias, 0);
    fc2_weights.check(fc2_weight, 0, format.parts);
    fc2_biases.check(fc2_bias, 0);
    scales.check(scale, 1);
  }
  block.N = call.N;
  block.H = call.H;
  block.W = call.W;
  block.dtype = static_cast<DType>(call.dtype);
  block.x = view(x, call.strides[0]);
  block.packed = packed.data();
  const Memory out(call.N * call.H * call.W * call.dim * bytes_of(call.dtype), at_begin);
  block.out = out.data();
  const Scratch workspace(cpu::block_workspace_bytes(block, threads), at_begin);
  cpu::block_forward(block, threads, workspace.data(), on_threads);
  finish(
      {&x, &norm_weight, &norm_bias, &fc1_weight, &fc1_bias, &conv_weight, &conv_bias, &fc2_weight, &fc2_bias, &scale},
      {&packed, &out, &workspace});
  out.write();
}

void run_conv3x3s2(const Call& call) {
  const bool at_begin = call.at_begin != 0;
  const int threads = static_cast<int>(call.threads);
  Conv3x3s2Call conv{};
  conv.shape = {call.dim,
                call.D,
                call.C != 0,
                static_cast<Act>(call.act),
                static_cast<float>(call.eps),
                static_cast<DType>(call.compute_dtype)};
  if (!cpu::conv3x3s2_supports(conv.shape.compute_dtype)) fail("conv3x3s2 does not multiply this dtype here");
  const Input x(at_begin), weight(at_begin), bias(at_begin), norm_weight(at_begin), norm_bias(at_begin);
  const Memory packed(cpu::conv3x3s2_packed_bytes(conv.shape, cpu::conv3x3s2_packed_format(conv.shape)), at_begin, 64);
  const Conv3x3s2Parameters parameters{weight.floats(), bias.floats(), norm_weight.floats(), norm_bias.floats()};
  cpu::pack_conv3x3s2(conv.shape, parameters, packed.data());
  for (const cpu::PackedFormat format : cpu::kPackedFormats) {
    const Unpacked weights(call.D * call.dim * 9, at_begin), biases(call.D, at_begin), norm_weights(call.D, at_begin),
        norm_biases(call.D, at_begin);
    const Memory bytes(cpu::conv3x3s2_packed_bytes(conv.shape, format), at_begin, 64);
    cpu::pack_conv3x3s2(conv.shape, format, parameters, bytes.data());
    cpu::unpack_conv3x3s2(conv.shape, format, bytes.data(),
                          {weights.floats(), biases.floats(), norm_weights.floats(), norm_biases.floats()});
    bytes.check();
    weights.check(weight, 0, format.parts);
    biases.check(bias, 0);
    norm_weights.check(norm_weight, 1);
    norm_biases.check(norm_bias, 0);
  }
  conv.N = call.N;
  conv.H = call.H;
  conv.W = call.W;
  conv.in_dtype = static_cast<DType>(call.dtype);
  conv.out_dtype = static_cast<DType>(call.weight_dtype);
  conv.x = view(x, call.strides[0]);
  conv.x_stride_c = call.strides[1][0];
  conv.packed = packed.data();
  const Memory out(call.N * conv.out_height() * conv.out_width() * call.D * bytes_of(call.weight_dtype), at_begin);
  conv.out = out.data();
  const Scratch workspace(cpu::conv3x3s2_workspace_bytes(conv, threads), at_begin);
  cpu::conv3x3s2_forward(conv, threads, workspace.data(), on_threads);
  finish({&x, &weight, &bias, &norm_weight, &norm_bias}, {&packed, &out, &workspace});
  out.write();
}

void run_matmul(const Call& call) {
  const bool at_begin = call.at_begin != 0;
  const int threads = static_cast<int>(call.threads);
  const Input a(at_begin), b(at_begin), bias(at_begin);
  const Memory out(call.N * call.H * 4, at_begin), row_sums((call.C & 2) != 0 ? call.N * 4 : 0, at_begin);
  MatmulCall matmul{};
  matmul.M = call.N;
  matmul.N = call.H;
  matmul.K = call.W;
  matmul.a = reinterpret_cast<const float*>(a.data());
  matmul.a_m = call.strides[0][0];
  matmul.a_k = call.strides[0][1];
  matmul.b = reinterpret_cast<const float*>(b.data());
  matmul.b_k = call.strides[1][0];
  matmul.b_n = call.strides[1][1];
  matmul.bias = bias.floats();
  matmul.out = reinterpret_cast<float*>(out.data());
  matmul.row_sums = (call.C & 2) != 0 ? reinterpret_cast<float*>(row_sums.data()) : nullptr;
  const Scratch workspace(call.kind == 5 ? 0 : cpu::matmul_workspace_bytes(matmul, threads), at_begin);
  if (call.kind == 5) {
    cpu::gemm_nt(as_gemm_nt(matmul), threads, on_threads);
  } else {
    cpu::matmul(matmul, threads, workspace.data(), on_threads);
  }
  finish({&a, &b, &bias}, {&out, &row_sums, &workspace});
  out.write();
  row_sums.write();
}

void run_head(const Call& call) {
  const bool at_begin = call.at_begin != 0;
  const Input x(at_begin), norm_weight(at_begin), norm_bias(at_begin), fc1_weight(at_begin), fc1_bias(at_begin),
      mid_weight(at_begin), mid_bias(at_begin), fc2_weight(at_begin), fc2_bias(at_begin);
  HeadCall head{};
  head.N = call.N;
  head.H = call.H;
  head.W = call.W;
  head.C = call.dim;
  head.hidden = call.D;
  head.classes = call.C;
  head.in_dtype = static_cast<DType>(call.dtype);
  head.parameter_dtype = static_cast<DType>(call.weight_dtype);
  head.out_dtype = static_cast<DType>(call.bias_dtype);
  head.x = view(x, call.strides[0]);
  head.norm = {norm_weight.floats(), norm_bias.floats(), static_cast<float>(call.eps)};
  head.fc1 = {fc1_weight.floats(), call.dim, fc1_bias.floats()};
  head.mid_normed = call.K != 0;
  head.mid_norm = {mid_weight.floats(), mid_bias.floats(), static_cast<float>(call.eps)};
  head.fc2 = {fc2_weight.floats(), call.D, fc2_bias.floats()};
  const Memory out(call.N * (call.C > 0 ? call.C : call.D) * bytes_of(call.bias_dtype), at_begin);
  head.out = out.data();
  const Scratch workspace(cpu::head_workspace_bytes(head), at_begin);
  cpu::head_forward(head, static_cast<int>(call.threads), workspace.data(), on_threads);
  finish({&x, &norm_weight, &norm_bias, &fc1_weight, &fc1_bias, &mid_weight, &mid_bias, &fc2_weight, &fc2_bias},
         {&out, &workspace});
  out.write();
}

void run_scan(const Call& call) {
  const bool at_begin = call.at_begin != 0, shared = call.K != 0;
  const int threads = static_cast<int>(call.threads);
  const std::int64_t G = call.H, L = call.W, D = call.D, S = call.C, element = bytes_of(call.dtype);
  const Input x(at_begin), delta(at_begin), A(at_begin), B(at_begin), C(at_begin), skip(at_begin), bias(at_begin),
      order(at_begin);
  ScanBackwardCall scan{};
  scan.N = call.N;
  scan.G = G;
  scan.L = L;
  scan.D = D;
  scan.S = S;
  scan.shared = shared;
  scan.dtype = static_cast<DType>(call.dtype);
  scan.x = {x.data(), call.strides[0][0], call.strides[0][1], call.strides[0][2]};
  scan.delta = {delta.data(), call.strides[1][0], call.strides[1][1], call.strides[1][2]};
  scan.B = {B.data(), G * L * S, L * S, S};
  scan.C = {C.data(), G * L * S, L * S, S};
  scan.A = A.floats();
  scan.skip = skip.floats();
  scan.delta_bias = bias.floats();
  scan.order = reinterpret_cast<const std::int32_t*>(order.data());
  std::vector<std::int32_t> visited(L);
  if (cpu::first_bad_order(scan.order, G, L, visited.data()) >= 0) fail("the order is no permutation");
  const std::int64_t maps = call.N * (shared ? 1 : G);
  if (call.kind == 7) {
    const Memory y(maps * L * D * element, at_begin);
    const ScanForwardCall forward{scan, y.data()};
    const Scratch workspace(cpu::selective_scan_workspace_bytes(forward, threads), at_begin);
    cpu::selective_scan(forward, threads, workspace.data(), on_threads);
    finish({&x, &delta, &A, &B, &C, &skip, &bias, &order}, {&y, &workspace});
    y.write();
    return;
  }
  const Input dy(at_begin);
  scan.dy = {dy.data(), (shared ? 1 : G) * L * D, shared ? 0 : L * D, D};
  const Memory dx(maps * L * D * element, at_begin), ddelta(call.N * G * L * D * element, at_begin),
      dA(G * D * S * 4, at_begin), dB(call.N * G * L * S * element, at_begin),
      dC(call.N * G * L * S * element, at_begin), dskip(G * D * 4, at_begin), dbias(G * D * 4, at_begin);
  scan.dx = dx.data();
  scan.ddelta = ddelta.data();
  scan.dA = reinterpret_cast<float*>(dA.data());
  scan.dB = dB.data();
  scan.dC = dC.data();
  scan.dskip = reinterpret_cast<float*>(dskip.data());
  scan.ddelta_bias = reinterpret_cast<float*>(dbias.data());
  const Scratch workspace(cpu::selective_scan_backward_workspace_bytes(scan, threads), at_begin);
  cpu::selective_scan_backward(scan, threads, workspace.data(), on_threads);
  finish({&x, &delta, &A, &B, &C, &skip, &bias, &order, &dy},
         {&dx, &ddelta, &dA, &dB, &dC, &dskip, &dbias, &workspace});
  for (const Memory* output : {&dx, &ddelta, &dA, &dB, &dC, &dskip, &dbias}) output->write();
}

}  // namespace

int main() {
  Call call;
  while (std::fread(&call, sizeof(call), 1, stdin) == 1) {
    if (!cpu::set_isa(static_cast<cpu::Isa>(call.isa))) fail("this processor lacks the instruction set");
    switch (call.kind) {
      case 2: run_block(call); break;
      case 3: run_conv3x3s2(call); break;
      case 4:
      case 5: run_matmul(call); break;
      case 6: run_head(call); break;
      case 7:
      case 8: run_scan(call); break;
      default: run_op(call);
    }
    std::fwrite("finished", 1, 8, stdout);
    std::fflush(stdout);
  }
}
