"""Faults to plant (plant_faults.py), each with the tests of which one has to fail."""

from dataclasses import dataclass


@dataclass(frozen=True)
class FaultySource:
    """The first `right` in `file` becomes `wrong`; `test`: what pytest is told to run."""

    file: str
    right: str
    wrong: str
    test: str
    isas: str = "portable"  # units that are compiled, of sources that all of them share; or "all"

    @property
    def compiled(self) -> bool:
        return self.file.startswith("csrc/")


FAULTS = [
    FaultySource("mambaout_kernels/ops.py", "ctx.save_for_backward(*tensors)",
                 "tensors[0].detach().mul_(1.5); ctx.save_for_backward(*tensors)",
                 "tests/test_complaints.py -k test_11"),
    FaultySource("mambaout_kernels/ops.py", "gradients = _backward_op(dy, u, weight, bias, ctx.act)",
                 "gradients = _backward_op(dy.contiguous().view(dy.shape) * 1.001, u, weight, bias, ctx.act)",
                 "tests/test_generated.py -k public_op"),
    FaultySource("mambaout_kernels/reference.py", "dc = _dwconv(e, weight.flip((2, 3))",
                 "dc = _dwconv(e, weight.flip((2,))", "tests/test_generated.py -k reference"),
    FaultySource("mambaout_kernels/reference.py", "    if c.numel() == 0:", "    if weight.shape[0] == 0:",
                 "tests/test_complaints.py -k zero_size"),
    FaultySource("mambaout_kernels/reference.py", "return s * (1 + x * (1 - s))", "return s * (1 + x * (1 + s))",
                 "tests/test_generated.py -k reference"),
    FaultySource("mambaout_kernels/checks.py", "weight.shape[2] % 2 == 0 or", "weight.shape[2] % 2 == 2 or",
                 "tests/test_bad_input.py"),
    FaultySource("mambaout_kernels/checks.py", "(u.dtype, torch.float32) if u.dtype in", "(u.dtype,) if u.dtype in",
                 "tests/test_ops.py -k 'fake or compiles'"),
    FaultySource("mambaout_kernels/packs.py", "found[0] == key and", "found[0][0] == key[0] and",
                 "tests/test_concurrency.py -k changed_parameters"),
    FaultySource("mambaout_kernels/whole_block.py", "norm.normalized_shape != (block.dim,) or", "",
                 "tests/test_complaints.py -k norm"),
    FaultySource("mambaout_kernels/checkpoints.py", "return _translate(state_dict, _TO_AUTHORS, \"timm's\")",
                 "return dict(state_dict)", "tests/test_checkpoints.py"),
    FaultySource("mambaout_kernels/backends/__init__.py", "    finally:\n        _forced = previous",
                 "    finally:\n        pass", "tests/test_backends.py"),
    FaultySource("mambaout_kernels/cli/special_values.py", "wrong = (ours.double() - exact).abs() >",
                 "wrong = (ours.double() - ours.double()).abs() >", "tests/test_cli.py -k special"),
    FaultySource("mambaout_kernels/reference.py", "near = x.clamp(-10, 10)", "near = x", "tests/test_reference.py"),
    FaultySource("mambaout_kernels/downsample.py", "conv.groups != 1 or ", "", "tests/test_downsample.py"),
    FaultySource("mambaout_kernels/benchmarking/accuracy.py", "return self.error <= self.allowed",
                 "return not self.error > self.allowed", "tests/test_benchmarking.py -k TestTolerance"),
    FaultySource("mambaout_kernels/seen.py", "and _mode(x) == self._mode", "", "tests/test_seen.py"),
    FaultySource("mambaout_kernels/seen.py", "and cpu.fingerprint(self._memory) == self._fingerprint", "",
                 "tests/test_seen.py"),
    FaultySource("mambaout_kernels/linear.py", "return linear(x, ddweight, ddbias) if needs_dy",
                 "return linear(x, ddweight, None) if needs_dy", "tests/test_linear.py -k three_times"),
    FaultySource("csrc/unchanged.h", "!same(call(stride), 4)", "false", "tests/test_seen.py"),
    FaultySource("csrc/unchanged.h", "if (PyObject_Size(container.ptr()) != 0) return false;", "",
                 "tests/test_seen.py"),
    # Training's products: the second depth, the bias, turned blocks, the last columns, sums of rows, parts of channels.
    FaultySource("csrc/cpu/matmul_body.h", "multiply<decltype(tile)::value>(k0 == 0, m, n);",
                 "multiply<decltype(tile)::value>(true, m, n);", "tests/test_cpu_launch.py -k 'products and plain'"),
    FaultySource("csrc/cpu/matmul_body.h", "half + j < columns ? from[j * call_.b_n + k] : 0.0f",
                 "from[j * call_.b_n + k]", "tests/test_cpu_launch.py -k 'products and plain'"),
    FaultySource("csrc/cpu/matmul_body.h", "sum = sum + load_first(call_.a + m0_ + m + (k0 + k) * call_.a_k, count);",
                 "sum = sum + load_first(call_.a + m0_ + m + k * call_.a_k, count);",
                 "tests/test_cpu_launch.py -k 'products and plain'"),
    FaultySource("csrc/cpu/dots_body.h", "if (rest > 0) add(", "if (rest > 1) add(",
                 "tests/test_cpu_launch.py -k 'products and plain'"),
    FaultySource("csrc/cpu/block_dispatch.cpp", "c.conv = ceil_div(at.conv / at.columns, c.parts) * at.columns;",
                 "c.conv = at.conv / at.columns / c.parts * at.columns;",
                 "tests/test_cpu_launch.py -k 'test_block and plain'"),
    FaultySource("csrc/cpu/dispatch.cpp", "std::fill(sums, sums + count, 0.0);", "",
                 "tests/test_determinism.py -k op_at"),
    FaultySource("csrc/cpu/dispatch.cpp", "at.total = at.partials + at.partial_bytes * plan.rectangles() + kLine;",
                 "at.total = at.partials + at.partial_bytes * plan.rectangles();",
                 "tests/test_cpu_launch.py -k plain"),
    FaultySource("csrc/cpu/dispatch.cpp", "const bool alike = plan.groups == 1 && plan.columns == 1;",
                 "const bool alike = true;", "tests/test_cpu_kernels.py -k fp64"),
    FaultySource("csrc/cpu/dispatch.cpp", "b.h1 = part_begin(shape.H, strips, strip + 1);",
                 "b.h1 = part_begin(shape.H, strips, strip + 1) - (strips > 1);", "tests/test_cpu_kernels.py -k fp64"),
    FaultySource("csrc/cpu/block_dispatch.cpp", "return k - at.identity < shape.C ? k - at.identity + identity : -1;",
                 "return k - at.identity + identity;", "tests/test_cpu_launch.py -k 'block and plain'"),
    FaultySource("csrc/cpu/block_body.h", "- mean - off) * scale, load", "- mean) * scale, load",
                 "tests/test_cpu_launch.py -k alike"),
    FaultySource("csrc/cpu/block_body.h", "rows.kh1 = static_cast<int>(h + R_ < call_.H ?",
                 "rows.kh1 = static_cast<int>(h + R_ <= call_.H ?",
                 "tests/test_cpu_launch.py -k 'test_block and plain'"),
    # The downsampling: right edge, left edge, lower edge, channels apart, normalization, packing, scratch memory.
    FaultySource("csrc/cpu/downsample_body.h", "clear(to, window_.row - (call_.W + 1) * at_.channels);", "",
                 "tests/test_cpu_launch.py -k 'downsampling and plain'"),
    FaultySource("csrc/cpu/downsample_body.h", "    clear(to, at_.channels);\n", "",
                 "tests/test_cpu_launch.py -k 'downsampling and plain'"),
    FaultySource("csrc/cpu/downsample_body.h", "if (from < 0 || from >= call_.H) continue;",
                 "if (from < 0 || from > call_.H) continue;", "tests/test_cpu_launch.py -k 'downsampling and plain'"),
    FaultySource("csrc/cpu/downsample_body.h", "as<Element>(from[c * call_.x_stride_c])", "as<Element>(from[c])",
                 "tests/test_generated.py -k downsampling"),
    FaultySource("csrc/cpu/downsample_body.h", "(sums, at_.out, channels, channels, call_.shape.eps,",
                 "(sums, at_.out, at_.out, channels, call_.shape.eps,", "tests/test_generated.py -k downsampling"),
    FaultySource("csrc/cpu/downsample_dispatch.cpp", "vector(at.norm_weight, parameters.norm_weight, 1.0f);",
                 "vector(at.norm_weight, parameters.norm_weight, 0.0f);",
                 "tests/test_cpu_launch.py -k 'calls_of_the_downsampling and plain'"),
    FaultySource("csrc/cpu/downsample_dispatch.cpp", "const std::int64_t tap = k / at.channels, c = k % at.channels;",
                 "const std::int64_t tap = k / shape.in_channels, c = k % shape.in_channels;",
                 "tests/test_cpu_launch.py -k 'test_downsampling and plain'", "all"),
    FaultySource("csrc/cpu/downsample_dispatch.cpp", "kernels.element_bytes, rows).total + kLine;",
                 "kernels.element_bytes, rows).total;", "tests/test_cpu_launch.py -k 'downsampling and plain'"),
    # The matrix products: sums of more than 128 terms, sums added to what is there, the last pixel; pairs of bf16.
    FaultySource("csrc/cpu/gemm_tile.h", "first && !kAdd ? right : load(to + L) + right);",
                 "!kAdd ? right : load(to + L) + right);", "tests/test_generated.py -k whole_block"),
    FaultySource("csrc/cpu/gemm_tile.h", "first && !kAdd ? left : load(to) + left);",
                 "first ? left : load(to) + left);", "tests/test_generated.py -k downsampling"),
    FaultySource("csrc/cpu/gemm_tile.h", "for (; p < end; ++p) body(Constant<1>{}, p);",
                 "for (; p + 1 < end; ++p) body(Constant<1>{}, p);", "tests/test_generated.py -k whole_block"),
    FaultySource("csrc/cpu/gemm_tile.h", "kSumDepth = 128", "kSumDepth = 4096",
                 "tests/test_whole_block.py -k 'deep and float32'"),
    FaultySource("csrc/cpu/bf16_products.h", "k < depth; k += 2", "k + 2 < depth; k += 2",
                 "tests/test_generated.py -k whole_block", "all"),
    FaultySource("csrc/cpu/bf16_products.h", "kAdd ? _mm512_add_ps(_mm512_loadu_ps(to + 16), right[r]) : right[r]",
                 "right[r]", "tests/test_cpu_launch.py -k 'test_downsampling and plain'", "all"),
    FaultySource("csrc/cpu/panels.h", "(k / 2 * columns + j) * 2 + k % 2", "(k / 2 * columns + j) * 2 + 1 - k % 2",
                 "tests/test_generated.py -k whole_block", "all"),
    FaultySource("csrc/cpu/bf16_pairs.h", "has_right = w + 1 < geometry.halo1;", "has_right = w < geometry.halo1;",
                 "tests/test_cpu_launch.py -k 'test_op and plain'", "all"),
    FaultySource("csrc/cpu/bf16_pairs.h", "lower = kOutputs == 2 && row > h - geometry.R;", "lower = kOutputs == 2;",
                 "tests/test_cpu_launch.py -k 'test_op and plain'", "all"),
    # What a sanitizer sees: the end of the scratch memory, and threads that share it.
    FaultySource("csrc/cpu/block_dispatch.cpp", "num_threads * bytes.window + kLine;",
                 "num_threads * bytes.window + 16;",
                 "tests/test_cpu_launch.py -m 'sanitize or not sanitize' -k 'test_block and memory'", "all"),
    FaultySource("csrc/cpu/tasks.h", "c.body(slot, task);",
                 "c.body(0, task);",
                 "tests/test_cpu_launch.py -m 'sanitize or not sanitize' -k 'downsampling and races'"),
]  # fmt: skip
