"""Faults to plant (plant_faults.py), each with the tests of which one has to fail."""

from dataclasses import dataclass

_UNITS = ("portable", "amx", "all")


@dataclass(frozen=True)
class FaultySource:
    """The first `right` in `file` becomes `wrong`; `test`: what pytest is told to run."""

    file: str
    right: str
    wrong: str
    test: str
    isas: str = "portable"  # "all"; "amx": portable C++ and emulated tiles; or the one that a processor has to have

    @property
    def compiled(self) -> bool:
        return self.file.startswith("csrc/")

    @property
    def units(self) -> str:
        """What is compiled: "portable", "amx" or "all"."""
        return self.isas if self.isas in _UNITS else "all"

    def can_be_seen(self, supported: list[str]) -> bool:
        return self.isas in (*_UNITS, *supported)

    @property
    def place(self) -> str:
        """For a line of the table."""
        return f"{self.file}: {self.wrong.strip()[:70]!r}"


_BLOCK = "mambaout_kernels/backends/triton_kernels/block.py"
_SPLIT = "tests/triton_interpreter/test_split_block.py -k"
_NORMED = "tests/triton_interpreter/test_normed_convs.py -k"
_NORM_BACKWARD = "mambaout_kernels/backends/triton_kernels/layer_norm_backward.py"
_GRADIENTS = "tests/triton_interpreter/test_norm_gradients.py -k"

_SCAN = "csrc/cpu/selective_scan"
_SCANS = "tests/comparators/test_selective_scan.py -k"
_SCAN_LAUNCH = "tests/triton_interpreter/test_triton_selective_scan.py"

FAULTS = [
    FaultySource("mambaout_kernels/ops/gated_dwconv.py", "ctx.save_for_backward(*tensors)",
                 "tensors[0].detach().mul_(1.5); ctx.save_for_backward(*tensors)",
                 "tests/test_complaints.py -k test_11"),
    FaultySource("mambaout_kernels/ops/gated_dwconv.py", "others = _backward_op(dy, u, weight, bias, ctx.act)",
                 "others = _backward_op(dy.contiguous().view(dy.shape) * 1.001, u, weight, bias, ctx.act)",
                 "tests/test_generated.py -k public_op"),
    # The norm's backward, and what calls it.
    FaultySource(_NORM_BACKWARD, "(e0 - along - n0 * across)", "(e0 - along)", f"{_GRADIENTS} fp64"),
    FaultySource(_NORM_BACKWARD, "            along += tl.sum(e1, 1)\n", "", f"{_GRADIENTS} fp64"),
    FaultySource(_BLOCK, "    if K0 > DIM:\n        x0 = tl.where", "    if False:\n        x0 = tl.where",
                 f"{_GRADIENTS} fp64"),
    FaultySource(_NORM_BACKWARD, "dbeta0 += e0\n", "dbeta0 = e0\n", f"{_GRADIENTS} fp64"),
    FaultySource(_NORM_BACKWARD, "turn * tl.num_programs(0)", "turn", f"{_GRADIENTS} fp64"),
    FaultySource(_NORM_BACKWARD, "        dy = dy * slope\n", "        pass\n", f"{_GRADIENTS} fp64"),
    FaultySource(_NORM_BACKWARD, "(x_ptr.dtype.element_ty == tl.float32) or (", "(", f"{_GRADIENTS} another_dtype"),
    FaultySource("mambaout_kernels/ops/conv_norm.py", "dx.flatten(0, -2).sum(0)", "dx.flatten(0, -2)[0]",
                 f"{_GRADIENTS} before_the_norm"),
    FaultySource("mambaout_kernels/ops/norm_linear.py", "ctx.eps, \"identity\", True)", "ctx.eps, \"silu\", True)",
                 "tests/triton_interpreter/test_plain_norms.py -k test_training"),
    FaultySource("mambaout_kernels/nn/linear.py", "low if into_product else torch.float32", "low",
                 "tests/triton_interpreter/test_plain_norms.py -k 'autocast and stem'"),
    FaultySource("mambaout_kernels/inference/cuda_graphs.py", "    torch.cuda.synchronize()\n", "",
                 "tests/inference/test_cuda_graphs.py -k stream_of_a_capture"),
    FaultySource("mambaout_kernels/reference.py", "dc = dwconv(e, weight.flip((2, 3))",
                 "dc = dwconv(e, weight.flip((2,))", "tests/test_generated.py -k reference"),
    FaultySource("mambaout_kernels/reference.py", "    if c.numel() == 0:", "    if weight.shape[0] == 0:",
                 "tests/test_complaints.py -k zero_size"),
    FaultySource("mambaout_kernels/reference.py", "return s * (1 + x * (1 - s))", "return s * (1 + x * (1 + s))",
                 "tests/test_generated.py -k reference"),
    FaultySource("mambaout_kernels/backends/checks.py", "weight.shape[2] % 2 == 0 or", "weight.shape[2] % 2 == 2 or",
                 "tests/ops/test_bad_input.py"),
    FaultySource("mambaout_kernels/backends/checks.py",
                 "(u.dtype, torch.float32) if u.dtype in", "(u.dtype,) if u.dtype in",
                 "tests/ops/test_ops.py -k 'fake or compiles'"),
    FaultySource("mambaout_kernels/weights/checkpoints.py", "return _translate(state_dict, _TO_AUTHORS, \"timm's\")",
                 "return dict(state_dict)", "tests/weights/test_checkpoints.py"),
    FaultySource("mambaout_kernels/backends/__init__.py", "    finally:\n        _set_forced(previous)",
                 "    finally:\n        pass", "tests/backends/test_backends.py"),
    FaultySource("mambaout_kernels/backends/__init__.py", "        _forced_here.name = name\n", "        pass\n",
                 "tests/backends/test_backends.py -k compiler_traces"),
    FaultySource("mambaout_kernels/ops/gated_dwconv.py", "if u.is_contiguous():", "if False:",
                 "tests/test_compilers.py -k copies_nothing"),
    FaultySource("mambaout_kernels/ops/gated_dwconv.py", "return du.view(u.shape), dweight, dbias",
                 "return du, dweight, dbias", "tests/ops/test_ops.py -k takes_rows"),
    FaultySource("mambaout_kernels/nn/block.py", "    if _compiled_rows(block, x):", "    if False:",
                 "tests/nn/test_block.py -k rows_are_for"),
    FaultySource("mambaout_kernels/nn/block.py", "        and norm.normalized_shape == x.shape[-1:]\n", "",
                 "tests/nn/test_block.py -k 'shows_modules and more'"),
    FaultySource("mambaout_kernels/ops/gated_dwconv.py", "ctx.backend = backends.forced()", "ctx.backend = None",
                 "tests/backends/test_backends.py -k backward_runs"),
    FaultySource("mambaout_kernels/backends/__init__.py", "    if _transformed():\n        return \"reference\"\n", "",
                 "tests/nn/test_transforms.py -k block", "all"),  # portable C++ has no linear layers
    FaultySource("mambaout_kernels/inference/parts.py", "if tangent or (torch", "if (torch",
                 "tests/nn/test_transforms.py -k 'refuses and jvp'"),
    FaultySource("mambaout_kernels/cli/special_values.py", "if ((ours.double() - exact).abs() >",
                 "if ((ours.double() - ours.double()).abs() >", "tests/cli/test_cli.py -k special"),
    FaultySource("mambaout_kernels/reference.py", "near = x.clamp(-10, 10)", "near = x", "tests/test_reference.py"),
    FaultySource("mambaout_kernels/benchmarking/accuracy.py", "return self.share <= 1.0 and",
                 "return not self.share > 1.0 and", "tests/benchmarking/test_benchmarking.py -k TestTolerance"),
    FaultySource("mambaout_kernels/benchmarking/accuracy.py", "and self.mean_error <= self.allowed",
                 "and not self.mean_error > self.allowed", "tests/benchmarking/test_benchmarking.py -k TestTolerance"),
    FaultySource("mambaout_kernels/benchmarking/accuracy.py", "for errors in (ours, theirs))", "for errors in (ours,))",
                 "tests/benchmarking/test_benchmarking.py -k TestTolerance"),
    FaultySource("mambaout_kernels/benchmarking/accuracy.py", "differing * (errors", "(errors",
                 "tests/benchmarking/test_benchmarking.py -k TestTolerance"),
    FaultySource("mambaout_kernels/reference.py", "_SLOPES[act](x.float()).to(x.dtype) if x.dtype.itemsize == 2 else",
                 "_SLOPES[act](x) if x.dtype.itemsize == 2 else", "tests/cli/test_cli.py -k check_passes"),
    FaultySource("mambaout_kernels/ops/linear.py", "return linear(x, ddweight, ddbias) if needs_dy",
                 "return linear(x, ddweight, None) if needs_dy", "tests/ops/test_linear.py -k three_times"),
    # Which parts of a model may be fused, and what stays as it is.
    FaultySource("mambaout_kernels/nn/eligibility.py", "if norm.normalized_shape != (features,):",
                 "if norm.normalized_shape is None:", "tests/inference/test_optimize.py -k 'left_to_the_modules'"),
    FaultySource("mambaout_kernels/nn/eligibility.py", "conv.groups, conv.padding_mode)", "1, conv.padding_mode)",
                 "tests/inference/test_optimize.py -k 'left_to_the_modules'"),
    FaultySource("mambaout_kernels/nn/plain.py", "if \"forward\" in own or own", "if own",
                 "tests/inference/test_optimize.py -k 'left_to_the_modules'"),
    FaultySource("mambaout_kernels/nn/eligibility.py", "    if type(conv) is CausalConv2d:\n", "    if False:\n",
                 "tests/inference/test_optimize.py -k causal"),
    # Zeros between the weights of odd widths: where, what, and of which modules.
    FaultySource("mambaout_kernels/nn/alignment.py", "pieces.insert(2 * at + 1,", "pieces.insert(2 * at,",
                 "tests/nn/test_alignment.py -k test_accuracy"),
    FaultySource("mambaout_kernels/nn/alignment.py", "fc1.weight.new_zeros(max", "fc1.weight.new_ones(max",
                 "tests/nn/test_alignment.py -k test_accuracy"),
    FaultySource("mambaout_kernels/nn/alignment.py", "2 * gates, zeros[:, 0])", "gates + gates[::-1], zeros[:, 0])",
                 "tests/nn/test_alignment.py -k 'test_accuracy and both'"),
    FaultySource("mambaout_kernels/nn/alignment.py", "_ACCESS // dtype.itemsize", "_ACCESS // 4",
                 "tests/nn/test_alignment.py -k whole_accesses"),
    FaultySource("mambaout_kernels/nn/alignment.py", "linear_weights(block.fc1), linear_weights(block.fc2)",
                 "linear_weights(block.fc1), Weights(block.fc2.weight, block.fc2.bias)",
                 "tests/nn/test_alignment.py -k not_plain_is_called"),
    FaultySource("mambaout_kernels/nn/alignment.py", " or gated_dwconv_reason(block) is not None", "",
                 "tests/nn/test_alignment.py -k unfused_block"),
    FaultySource("mambaout_kernels/nn/alignment.py", "x.device.type) and dtype != torch.float64:", "x.device.type):",
                 "tests/nn/test_alignment.py -k float64"),
    FaultySource("mambaout_kernels/nn/alignment.py", "not backends.uses_reference(device_type) and ", "",
                 "tests/nn/test_alignment.py -k where_it_pays"),
    # What a block computes again in backward, and when.
    FaultySource("mambaout_kernels/nn/block.py", "if self.recompute and self.training and", "if self.recompute and",
                 "tests/nn/test_recompute.py -k of_no_effect"),
    FaultySource("mambaout_kernels/nn/block.py", "x, use_reentrant=False)",
                 "x, use_reentrant=False, preserve_rng_state=False)", "tests/nn/test_recompute.py -k dropout"),
    FaultySource("mambaout_kernels/nn/block.py", "checkpoint(partial(branch, self), x, use_reentrant=False)",
                 "checkpoint(lambda x: self.drop_path(branch(self, x)), x, use_reentrant=False)",
                 "tests/nn/test_recompute.py -k 'same_bits and drop_path'"),
    FaultySource("mambaout_kernels/models/features.py", "x = block(x) if own else", "x =",
                 "tests/nn/test_recompute.py -k recomputes_once"),
    FaultySource("mambaout_kernels/models/features.py", "own = block.training and", "own =",
                 "tests/nn/test_recompute.py -k checkpointing_in_evaluation"),
    # The block in inference on a GPU, in Triton's interpreter.
    FaultySource(_BLOCK, "if K0 + K1 > DIM:\n            x1", "if False:\n            x1",
                 f"{_SPLIT} 'padded and float32'"),
    FaultySource(_BLOCK, "tl.rsqrt(square / DIM + eps)", "tl.rsqrt(square / DIM)", f"{_SPLIT} small_variances"),
    FaultySource(_BLOCK, "return sums + _load_vector(b_ptr, n, present)[None, :]", "return sums",
                 f"{_SPLIT} 'narrow and power'"),
    FaultySource(_BLOCK, "w2_ptr + IDENTITY, d, d < C, sums0", "w2_ptr, d, d < C, sums0",
                 f"{_SPLIT} 'narrow and 96 and float32'"),
    FaultySource(_BLOCK, "w2_ptr + IDENTITY, d, d < C, sums1", "w2_ptr + IDENTITY, d, d < D, sums1",
                 f"{_SPLIT} nothing_beyond"),
    FaultySource(_BLOCK, "    s_ptr += first_row * C\n    out_ptr", "    out_ptr", f"{_SPLIT} 'narrow and several'"),
    FaultySource(_BLOCK, "    if SCALED:", "    if False:", f"{_SPLIT} 'padded and float32'"),
    FaultySource(_BLOCK, "taps_ptr + K * K * padded_C", "taps_ptr + (K * K - 1) * padded_C", f"{_SPLIT} depthwise"),
    FaultySource(_BLOCK, "        d += IDENTITY\n", "", f"{_SPLIT} 'wide and whole and float32'"),
    FaultySource(_BLOCK, "w1_ptr + D * DIM, d, inside, k", "w1_ptr + IDENTITY * DIM, d, inside, k",
                 f"{_SPLIT} 'wide and whole and float32'"),
    FaultySource("mambaout_kernels/inference/split_blocks.py",
                 "spread(fc2.weight.detach(), parts, zeros.t(), dim=1)",
                 "spread(fc2.weight.detach(), parts[::-1], zeros.t(), dim=1)",
                 f"{_SPLIT} 'odd and conv'"),
    FaultySource("mambaout_kernels/ops/split_block.py", "    if _whole(x):", "    if False:",
                 f"{_SPLIT} at_full_precision"),
    FaultySource("mambaout_kernels/ops/split_block.py", "block_launch.round_tf32(weight) if", "weight if",
                 f"{_SPLIT} factors_are_rounded"),
    FaultySource(_BLOCK, "    if PRECISION == \"tf32\":  #", "    if False:  #", f"{_SPLIT} factors_are_rounded"),
    FaultySource(_BLOCK, "tl.where(tl.abs(x) < 3.4e38, nearest, x)", "nearest", f"{_SPLIT} kernels_round"),
    FaultySource("mambaout_kernels/ops/split_block.py", "eps, factor=True)", "eps)", f"{_SPLIT} factors_are_rounded"),
    # Convolutions and norms of inference on a GPU, in Triton's interpreter.
    FaultySource(_BLOCK, "pixel // OW % OH * 2 - 1, pixel", "pixel // OW % OH * 2, pixel", f"{_NORMED} fp64"),
    FaultySource(_BLOCK, "k // C % 3, k % C", "k % 3, k % C", f"{_NORMED} fp64"),
    FaultySource(_BLOCK, "& (x_h >= 0) &", "&", f"{_NORMED} fp64"),
    FaultySource(_BLOCK, "& (x_w < W)", "", f"{_NORMED} fp64"),
    FaultySource(_BLOCK, "present[:, None] & tap[None, :] &", "present[:, None] &", f"{_NORMED} reaches"),
    FaultySource(_BLOCK, "y0, y1 = _normed(sums0, sums1, b_ptr", "y0, y1 = _normed(sums0, sums0, b_ptr",
                 f"{_NORMED} fp64"),
    FaultySource(_BLOCK, "    if BIASED:\n        x0 +=", "    if False:\n        x0 +=", f"{_NORMED} fp64"),
    FaultySource(_BLOCK, "        if K1 > 0:\n            k1", "        if False:\n            k1", f"{_NORMED} fp64"),
    FaultySource(_BLOCK, "a0 = _rounded(gate(a0, ACT, WIDE)", "a0 = _rounded(gate(a0, \"gelu\", WIDE)",
                 f"{_NORMED} layer_norm"),
    FaultySource("mambaout_kernels/backends/triton_kernels/block_launch.py",
                 "nhwc = x.is_contiguous(memory_format=torch.channels_last)", "nhwc = True", f"{_NORMED} any_strides"),
    FaultySource("mambaout_kernels/inference/normed_convs.py", "self.act = \"identity\" if act is None else",
                 "self.act = \"identity\" if True else", f"{_NORMED} stem"),
    FaultySource("mambaout_kernels/inference/normed_convs.py", "norm if norm_first else nn.Identity()",
                 "nn.Identity()", f"{_NORMED} downsample"),
    FaultySource("mambaout_kernels/inference/normed_convs.py", "F.conv2d(x, b.weight, None,",
                 "F.conv2d(x, b.weight, b.bias,", f"{_NORMED} 'downsample and float32'"),
    FaultySource("mambaout_kernels/ops/split_block.py", "if c.stride(1) > _LONGEST_ROW:", "if False:",
                 f"{_SPLIT} too_wide"),
    FaultySource("mambaout_kernels/inference/cuda_graphs.py", "held.y.clone()", "held.y",
                 "tests/inference/test_cuda_graphs.py -k written_over"),
    FaultySource("mambaout_kernels/inference/cuda_graphs.py", "            held.x.copy_(x)\n", "",
                 "tests/inference/test_cuda_graphs.py -k shape_and_dtype"),
    FaultySource("mambaout_kernels/inference/cuda_graphs.py", "with held.lock, torch", "with torch",
                 "tests/inference/test_cuda_graphs.py -k threads"),
    FaultySource("mambaout_kernels/inference/model.py", "{**self.__dict__, \"_graphs\": self._graphs is not None}",
                 "self.__dict__", "tests/inference/test_cuda_graphs.py -k copies"),
    FaultySource("mambaout_kernels/inference/optimize.py",
                 "in sequence._modules.items():", "in sequence.named_children():",
                 "tests/inference/test_optimize.py -k blocks_in_a_row"),
    FaultySource("mambaout_kernels/inference/optimize.py", "copied = t.detach().clone()", "copied = t.detach()",
                 "tests/inference/test_optimize.py -k neither_sees"),
    FaultySource("mambaout_kernels/inference/optimize.py", "p.normal_()", "p.add_(0)",
                 "tests/inference/test_optimize.py -k hang_on_the_weights"),
    FaultySource("mambaout_kernels/inference/optimize.py", "for method in (\"forward\", \"forward_head\")",
                 "for method in (\"forward_head\",)", "tests/inference/test_optimize.py -k calls_norm_and_head"),
    FaultySource("mambaout_kernels/inference/parts.py",
                 "self.register_buffer(f\"{name}_{kind}\", None if given is None else given.detach().clone())",
                 "self.register_buffer(f\"{name}_{kind}\", None if given is None or kind == 'bias' else given.clone())",
                 "tests/inference/test_optimize.py -k ours_against_fp64"),
    FaultySource("mambaout_kernels/inference/parts.py", "        super().__setstate__(state)\n        self.adapt()",
                 "        super().__setstate__(state)",
                 "tests/inference/test_inference_model.py -k packed_again", "all"),
    FaultySource("mambaout_kernels/inference/model.py", "                refuse_gradients(t)", "                pass",
                 "tests/inference/test_inference_model.py -k gradients_are_refused"),
    FaultySource("mambaout_kernels/inference/files.py", "if found != wanted[full_name]:", "if False:",
                 "tests/inference/test_inference_files.py -k damaged"),
    FaultySource("mambaout_kernels/inference/files.py", "if settings[key] != own_settings[key]:", "if False:",
                 "tests/inference/test_inference_files.py -k settings_are_not_lost"),
    FaultySource("mambaout_kernels/inference/files.py",
                 "untied[name] = t.clone() if address in known", "untied[name] = t if address in known",
                 "tests/inference/test_inference_files.py -k tied"),
    # Packed weights: their header, their order, blocks that follow each other.
    FaultySource("csrc/torch/packed.h", "header->bytes <= left", "header->bytes >= 0",
                 "tests/inference/test_packed_ops.py -k 'truncated or damage'"),
    FaultySource("csrc/torch/packed.h", "return header.lanes == format.lanes &&", "return header.lanes != 0 &&",
                 "tests/inference/test_packed_ops.py -k 'lanes or another_instruction_set'", "all"),
    FaultySource("csrc/torch/packed.h", "header->act >= 0 && header->act <= 3", "header->act >= 0",
                 "tests/inference/test_packed_ops.py -k damaged_headers"),
    FaultySource("csrc/torch/gated_cnn_blocks.cpp", "if (offset > 0) free.push_back(x);", "free.push_back(x);",
                 "tests/inference/test_packed_ops.py -k joined"),
    FaultySource("csrc/torch/gated_cnn_blocks.cpp", "header.bytes == packed_bytes(shape, format_of(header))",
                 "header.bytes > 0", "tests/inference/test_packed_ops.py -k damaged_headers"),
    FaultySource("csrc/torch/gated_cnn_blocks.cpp", "p.scale = weights(scale, shape.dim, \"scale\");", "",
                 "tests/inference/test_packed_ops.py -k 'block_against_fp64 and scale'"),
    FaultySource("csrc/cpu/head/body.h", "mean + mean_without(mean)", "mean",
                 "tests/inference/test_packed_ops.py -k large_map"),
    FaultySource("csrc/cpu/head/dispatch.cpp", "call.mid_norm.eps", "call.norm.eps",
                 "tests/inference/test_packed_ops.py -k head_against_fp64"),
    FaultySource("csrc/cpu/linear/gemm_nt_body.h", "task.call->out + m * task.call->N + task.n0;",
                 "task.call->out + m * task.call->N;",
                 "tests/csrc/test_cpu_launch.py -k 'calls_of_the_head and plain'"),
    # Rows that strips of an image share.
    FaultySource("csrc/cpu/gated_cnn_block/body.h", "return shared_row(task_.below, vector, h - (task_.h1 - R_));",
                 "return shared_row(task_.below, vector, task_.h1 + R_ - 1 - h);",
                 "tests/csrc/test_cpu_launch.py -k 'block and plain'"),
    FaultySource("csrc/cpu/gated_cnn_block/body.h", "share(task_.h0, task_.h0 + R_, task_.above, task_.h0 - R_);",
                 "share(task_.h0, task_.h0 + R_, task_.above, task_.h0);",
                 "tests/csrc/test_cpu_launch.py -k 'block and plain'"),
    # The patches of the stem: outputs whose filter is partly outside.
    FaultySource("csrc/cpu/conv3x3s2/body.h", "min(width_, (call_.W + 1 - column) / 2)",
                 "min(width_, (call_.W - column) / 2)", "tests/csrc/test_cpu_launch.py -k 'downsampling and plain'"),
    # Training's products: the second depth, the bias, transposed panels, the last columns, sums of rows, parts of the
    # channels.
    FaultySource("csrc/cpu/linear/matmul_body.h", "multiply<decltype(tile)::value>(k0 == 0, m, n);",
                 "multiply<decltype(tile)::value>(true, m, n);",
                 "tests/csrc/test_cpu_launch.py -k 'products and plain'"),
    FaultySource("csrc/cpu/linear/matmul_body.h", "half + j < columns ? from[j * call_.b_n + k] : 0.0f",
                 "from[j * call_.b_n + k]", "tests/csrc/test_cpu_launch.py -k 'products and plain'"),
    FaultySource("csrc/cpu/linear/row_sums.h",
                 "sum = sum + load_first(call_.a + m0_ + m + (k0 + k) * call_.a_k, count);",
                 "sum = sum + load_first(call_.a + m0_ + m + k * call_.a_k, count);",
                 "tests/csrc/test_cpu_launch.py -k 'products and plain'"),
    FaultySource("csrc/cpu/linear/gemm_nt_body.h", "if (rest > 0) add(", "if (rest > 1) add(",
                 "tests/csrc/test_cpu_launch.py -k 'products and plain'"),
    FaultySource("csrc/cpu/gated_cnn_block/dispatch.cpp",
                 "c.conv = ceil_div(at.conv / at.columns, c.parts) * at.columns;",
                 "c.conv = at.conv / at.columns / c.parts * at.columns;",
                 "tests/csrc/test_cpu_launch.py -k 'test_block and plain'"),
    FaultySource("csrc/cpu/gated_dwconv/dispatch.cpp", "std::fill(sums, sums + count, 0.0);", "",
                 "tests/test_determinism.py -k op_at"),
    FaultySource("csrc/cpu/gated_dwconv/dispatch.cpp",
                 "at.total = at.partials + at.partial_bytes * plan.tiles() + kLine;",
                 "at.total = at.partials + at.partial_bytes * plan.tiles();",
                 "tests/csrc/test_cpu_launch.py -k plain"),
    FaultySource("csrc/cpu/gated_dwconv/dispatch.cpp", "const bool alike = plan.groups == 1 && plan.columns == 1;",
                 "const bool alike = true;", "tests/csrc/test_cpu_kernels.py -k fp64"),
    FaultySource("csrc/cpu/gated_dwconv/dispatch.cpp", "t.h1 = part_begin(shape.H, strips, strip + 1);",
                 "t.h1 = part_begin(shape.H, strips, strip + 1) - (strips > 1);",
                 "tests/csrc/test_cpu_kernels.py -k fp64"),
    FaultySource("csrc/cpu/gated_cnn_block/dispatch.cpp",
                 "return k - at.identity < shape.C ? k - at.identity + identity : -1;",
                 "return k - at.identity + identity;", "tests/csrc/test_cpu_launch.py -k 'block and plain'"),
    FaultySource("csrc/cpu/layer_norm.h", "(error > __FLT_MAX__ ? __FLT_MAX__ : error)", "error",
                 "tests/inference/test_packed_ops.py -k large_pixel"),
    # Rounding of results.
    FaultySource("csrc/cpu/simd/convert.h", "bits + 0x7fffu + ((bits >> 16) & 1u)", "bits + 0x8000u",
                 "tests/csrc/test_cpu_kernels.py -k nearest_even"),
    FaultySource("csrc/cpu/simd/convert.h", "+ 0xfffu + ((magnitude >> 13) & 1u)) >> 13", ") >> 13",
                 "tests/csrc/test_cpu_kernels.py -k nearest_even"),
    FaultySource("csrc/cpu/simd/vec_avx2.h", "_mm256_set1_epi32(0x7fff)), odd)",
                 "_mm256_set1_epi32(0x8000)), _mm256_setzero_si256())",
                 "tests/csrc/test_cpu_kernels.py -k nearest_even", "avx2"),
    FaultySource("csrc/cpu/simd/vec_avx2.h", "_mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT)",
                 "_mm256_cvtps_ph(a.v, _MM_FROUND_TO_ZERO)", "tests/csrc/test_cpu_kernels.py -k nearest_even", "avx2"),
    FaultySource("csrc/cpu/simd/vec_avx2.h", "_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), is_nan)",
                 "rounded", "tests/csrc/test_cpu_kernels.py -k nan_of_any_bits", "avx2"),
    FaultySource("csrc/cpu/simd/convert.h", "x != x ? 0x7fc0 : ", "",
                 "tests/csrc/test_cpu_kernels.py -k nan_of_any_bits"),
    # AVX-512: masks, rounding, words in their places.
    FaultySource("csrc/cpu/simd/vec_avx512.h", "(1u << n) - 1u", "(2u << n) - 1u",
                 "tests/csrc/test_cpu_launch.py -k 'test_op and plain'", "avx512"),
    FaultySource("csrc/cpu/simd/vec_avx512.h", "_mm256_mask_storeu_epi16(p, first_lanes(n), narrow",
                 "_mm256_mask_storeu_epi16(p, 0xffff, narrow",
                 "tests/csrc/test_cpu_launch.py -k 'test_op and plain'", "avx512"),
    FaultySource("csrc/cpu/simd/vec_avx512.h", "_mm256_maskz_loadu_epi16(first_lanes(n), p)",
                 "_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))",
                 "tests/csrc/test_cpu_launch.py -k 'test_op and plain'", "avx512"),
    FaultySource("csrc/cpu/simd/vec_avx512.h", "_mm512_set1_epi32(0x10000)", "_mm512_set1_epi32(0x8000)",
                 "tests/csrc/test_cpu_kernels.py -k nearest_even", "avx512"),
    FaultySource("csrc/cpu/simd/vec_avx512.h",
                 "_mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q),",
                 "_mm512_mask_mov_epi32(rounded, 0,",
                 "tests/csrc/test_cpu_kernels.py -k nan_of_any_bits", "avx512"),
    FaultySource("csrc/cpu/simd/vec_avx512.h", "_mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT)",
                 "_mm512_cvtps_ph(a.v, _MM_FROUND_TO_ZERO)",
                 "tests/csrc/test_cpu_kernels.py -k nearest_even", "avx512"),
    FaultySource("csrc/cpu/simd/vec_avx512.h", "_mm512_maskz_permutexvar_epi16(0xaaaaaaaau,",
                 "_mm512_maskz_permutexvar_epi16(0xffffffffu,",
                 "tests/csrc/test_cpu_kernels.py -k nearest_even", "avx512"),
    FaultySource("csrc/cpu/simd/vec_avx512.h", "_mm512_add_epi32(n.index, _mm512_set1_epi32(127))",
                 "_mm512_add_epi32(n.index, _mm512_set1_epi32(126))",
                 "tests/csrc/test_cpu_kernels.py -k magnitudes", "avx512"),
    FaultySource("csrc/cpu/simd/vec_avx512.h", "_mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88)",
                 "_mm512_shuffle_i32x4(a[i + 12], a[i + 8], 0x88)",
                 "tests/ops/test_linear.py", "avx512"),
    FaultySource("csrc/cpu/layer_norm.h", "- mean - off) * scale, load", "- mean) * scale, load",
                 "tests/csrc/test_cpu_launch.py -k alike"),
    FaultySource("csrc/cpu/gated_cnn_block/body.h", "rows.kh1 = static_cast<int>(h + R_ < call_.H ?",
                 "rows.kh1 = static_cast<int>(h + R_ <= call_.H ?",
                 "tests/csrc/test_cpu_launch.py -k 'test_block and plain'"),
    # The convolution between the stages: right edge, left edge, lower edge, channels apart, normalization, packing,
    # scratch memory.
    FaultySource("csrc/cpu/conv3x3s2/body.h", "clear(to, scratch_.row - (call_.W + 1) * at_.channels);", "",
                 "tests/csrc/test_cpu_launch.py -k 'downsampling and plain'"),
    FaultySource("csrc/cpu/conv3x3s2/body.h", "    clear(to, at_.channels);\n", "",
                 "tests/csrc/test_cpu_launch.py -k 'downsampling and plain'"),
    FaultySource("csrc/cpu/conv3x3s2/body.h", "if (from < 0 || from >= call_.H) continue;",
                 "if (from < 0 || from > call_.H) continue;",
                 "tests/csrc/test_cpu_launch.py -k 'downsampling and plain'"),
    FaultySource("csrc/cpu/conv3x3s2/body.h",
                 "as_float(from[c * call_.x_stride_c])", "as_float(from[c])",
                 "tests/inference/test_packed_ops.py -k 'strides and convolution'"),
    FaultySource("csrc/cpu/conv3x3s2/body.h", "(sums, at_.out, channels, channels, call_.shape.eps,",
                 "(sums, at_.out, at_.out, channels, call_.shape.eps,", "tests/test_generated.py -k downsampling"),
    FaultySource("csrc/cpu/conv3x3s2/dispatch.cpp", "parameters.norm_weight, shape.out_channels, 1.0f);",
                 "parameters.norm_weight, shape.out_channels, 0.0f);",
                 "tests/csrc/test_cpu_launch.py -k 'calls_of_the_downsampling and plain'"),
    FaultySource("csrc/cpu/conv3x3s2/dispatch.cpp", "const std::int64_t tap = k / at.channels, c = k % at.channels;",
                 "const std::int64_t tap = k / shape.in_channels, c = k % shape.in_channels;",
                 "tests/csrc/test_cpu_launch.py -k 'test_downsampling and plain'", "all"),
    FaultySource("csrc/cpu/conv3x3s2/dispatch.cpp", "kernels.format, rows).total + kLine;",
                 "kernels.format, rows).total;",
                 "tests/csrc/test_cpu_launch.py -m 'sanitize or not sanitize' -k 'downsampling and memory'"),
    # The matrix products: sums of more than 128 terms, sums added to what is there, the last pixel; pairs of bf16.
    FaultySource("csrc/cpu/gemm/fp32_gemm.h", "first && !kAdd ? right : load(to + L) + right);",
                 "!kAdd ? right : load(to + L) + right);", "tests/test_generated.py -k whole_block"),
    FaultySource("csrc/cpu/gemm/fp32_gemm.h", "first && !kAdd ? left : load(to) + left);",
                 "first ? left : load(to) + left);", "tests/test_generated.py -k downsampling"),
    FaultySource("csrc/cpu/gemm/fp32_gemm.h", "for (; p < rows; ++p) body(Constant<1>{}, p);",
                 "for (; p + 1 < rows; ++p) body(Constant<1>{}, p);", "tests/test_generated.py -k whole_block"),
    FaultySource("csrc/cpu/gemm/fp32_gemm.h", "kSumDepth = 128", "kSumDepth = 4096",
                 "tests/inference/test_packed_ops.py -k 'deep and float32'"),
    FaultySource("csrc/cpu/gemm/bf16_gemm.h", "k < depth; k += 2", "k + 2 < depth; k += 2",
                 "tests/csrc/test_cpu_launch.py -k 'test_block and plain'", "avx512_bf16"),
    FaultySource("csrc/cpu/gemm/bf16_gemm.h", "kAdd ? _mm512_add_ps(_mm512_loadu_ps(to + 16), right[r]) : right[r]",
                 "right[r]", "tests/csrc/test_cpu_launch.py -k 'test_downsampling and plain'", "avx512_bf16"),
    FaultySource("csrc/cpu/gemm/packing.h",
                 "(k % step / 2 * columns + j) * 2 + k % 2", "(k % step / 2 * columns + j) * 2 + 1 - k % 2",
                 "tests/inference/test_packed_ops.py -k 'amx and block'", "amx"),
    # AMX: rows of the last tile, rows read beyond it, sums added to; each of the parts; Inf; tiles that are not there.
    FaultySource("csrc/cpu/gemm/amx_gemm.h", "rows > 16 ? multiply_all<kAdd, true>",
                 "rows > 24 ? multiply_all<kAdd, true>",
                 "tests/inference/test_packed_ops.py -k 'amx and bfloat16'", "amx"),
    FaultySource("csrc/cpu/gemm/amx_gemm.h", "kAdd ? load_sums<kTwo>(out) : zero_sums<kTwo>();", "zero_sums<kTwo>();",
                 "tests/inference/test_packed_ops.py -k 'amx and bfloat16'", "amx"),
    FaultySource("csrc/cpu/gemm/packed_format.h", "return format.step == 32 ? 15 : 0;", "return 0;",
                 "tests/csrc/test_cpu_launch.py -k 'amx and (block or downsampling)'", "amx"),
    FaultySource("csrc/cpu/gemm/amx_gemm.h", "      load_b(b + 2 * kPart);\n      multiply<kTwo>();",
                 "      load_b(b + 2 * kPart);", "tests/inference/test_packed_ops.py -k 'amx and float32'", "amx"),
    FaultySource("csrc/cpu/gemm/amx_gemm.h", "      load_a<kTwo>(a.at + 2 * a.plane + k, lda);\n", "",
                 "tests/inference/test_packed_ops.py -k 'amx and float32'", "amx"),
    FaultySource("csrc/cpu/gemm/amx_gemm.h", "if (!finite(sums, rows)) multiply_as_fp32(",
                 "if (false) multiply_as_fp32(", "tests/csrc/test_cpu_launch.py -k 'amx and special'", "amx"),
    FaultySource("csrc/cpu/gemm/split.h", "x = finite ? x - float_of(nearest) : 0.0f;", "x = x - float_of(nearest);",
                 "tests/csrc/test_cpu_launch.py -k 'amx and special'", "amx"),
    FaultySource("csrc/cpu/gemm/split.h", "--nearest.bits;", "{}",
                 "tests/csrc/test_cpu_launch.py -k 'amx and special'", "amx"),
    FaultySource("csrc/cpu/conv3x3s2/body.h", "  const typename Gemm::TaskScope scope;\n", "",
                 "tests/inference/test_packed_ops.py -k amx", "amx"),
    FaultySource("csrc/cpu/linear/amx_matmul_body.h", "transpose(b + j * call_.b_n + i, call_.b_n,",
                 "transpose(b + j * call_.b_n, call_.b_n,", "tests/ops/test_linear.py -k amx", "amx"),
    FaultySource("csrc/cpu/linear/amx_matmul_body.h", "put(a_ + ((m + r) * kLda + k), a[m + r + k * call_.a_k]);",
                 "put(a_ + ((m + r) * kLda + k), a[m + k * call_.a_k]);", "tests/ops/test_linear.py -k amx", "amx"),
    # Unpacking.
    FaultySource("csrc/cpu/gemm/packing.h", "*parameter = *packed;", "*parameter = packed[1];",
                 "tests/csrc/test_cpu_launch.py -k 'test_block and plain'"),
    FaultySource("csrc/cpu/gemm/packing.h", "parameter[i] = packed[i];", "parameter[i] = packed[0];",
                 "tests/csrc/test_cpu_launch.py -k 'test_downsampling and plain'"),
    FaultySource("csrc/cpu/gated_dwconv/bf16_pairs.h",
                 "has_right = w + 1 < geometry.halo1;", "has_right = w < geometry.halo1;",
                 "tests/csrc/test_cpu_launch.py -k 'test_op and plain'", "avx512_bf16"),
    FaultySource("csrc/cpu/gated_dwconv/bf16_pairs.h",
                 "lower = kOutputs == 2 && row > h - geometry.R;", "lower = kOutputs == 2;",
                 "tests/csrc/test_cpu_launch.py -k 'test_op and plain'", "avx512_bf16"),
    # What a sanitizer sees: the end of the scratch memory, and threads that share it.
    FaultySource("csrc/cpu/gated_cnn_block/dispatch.cpp", "num_threads * bytes.scratch + kLine;",
                 "num_threads * bytes.scratch + 16;",
                 "tests/csrc/test_cpu_launch.py -m 'sanitize or not sanitize' -k 'test_block and memory'", "all"),
    FaultySource("csrc/cpu/tasks.h", "c.body(slot, task);",
                 "c.body(0, task);",
                 "tests/csrc/test_cpu_launch.py -m 'sanitize or not sanitize' -k 'downsampling and races'"),
]  # fmt: skip

# The op on CUDA: pointers, devices, streams, copies, memory, checks.
_GUARD = "  const torch::stable::accelerator::DeviceGuard guard(device);\n"
_FORWARD = "  u = readable_form(u, true);\n"
_BACKWARD = "  dy = readable_form(dy, false);\n  u = readable_form(u, true);\n"
_OF_THE_CUDA_BINDING = [
    ("weight.const_data_ptr(), bias.const_data_ptr(), y.", "bias.const_data_ptr(), weight.const_data_ptr(), y."),
    ("weight.const_data_ptr(), bias.const_data_ptr(),\n                  du.",
     "bias.const_data_ptr(), weight.const_data_ptr(),\n                  du."),
    ("dweight.mutable_data_ptr(), dbias.mutable_data_ptr()", "dbias.mutable_data_ptr(), dweight.mutable_data_ptr()"),
    ("{shape, evenly_spaced(dy), evenly_spaced(u),", "{shape, evenly_spaced(u), evenly_spaced(dy),"),
    (_GUARD + _FORWARD, _FORWARD),
    (_GUARD + _BACKWARD, _BACKWARD),
    ("DeviceGuard guard(device);", "DeviceGuard guard(0);"),
    ("select(device), current_stream(device)", "select(0), current_stream(device)"),
    ("select(device), current_stream(device)", "select(device), current_stream(0)"),
    ("select(device), current_stream(device)", "select(device), nullptr"),
    ("workspace.mutable_data_ptr(), select(device),", "workspace.mutable_data_ptr(), cuda::Device{},"),
    ("workspace.mutable_data_ptr(), select(device), current_stream(device)",
     "workspace.mutable_data_ptr(), select(device), current_stream(0)"),
    ("{cuda::backward_workspace_bytes(shape, path) / 4}", "{cuda::backward_workspace_bytes(shape, path) / 8}"),
    ("backward_workspace_bytes(shape, path)", "backward_workspace_bytes(shape)"),
    (_FORWARD, ""),
    (_BACKWARD, "  dy = readable_form(dy, false);\n"),
    (_BACKWARD, _FORWARD),
    (_BACKWARD, "  dy = readable_form(dy, true);\n  u = readable_form(u, true);\n"),
    ("readable_form(u, true)", "readable_form(u, false)"),
    ("  weight = dense(weight);\n", ""),
    ("  bias = dense(bias);\n", ""),
    ("    torch::stable::zero_(dweight);\n", ""),
    ("    torch::stable::zero_(dbias);\n", ""),
    ("new_empty(weight, {shape.C, 1, shape.K, shape.K})", "new_empty(u, {shape.C, 1, shape.K, shape.K})"),
    ("new_empty(bias, {shape.C})", "new_empty(weight, {shape.C})"),
    ("tensor.const_data_ptr()) % 4 == 0", "tensor.const_data_ptr()) % 2 == 0"),
    ("tensor.is_contiguous() ? torch::stable::clone(tensor) : torch::stable::contiguous(tensor)",
     "torch::stable::contiguous(tensor)"),
    ("if (tensor.stride(dim) != pixels * spacing) return -1;", ""),
    ("if (tensor.size(3) > 1 && tensor.stride(3) != 1) return false;", ""),
    ("spacing <= cuda::kMostSpacing && ", ""),
    ("tensor.element_size() == 2 && spacing % 2 != 0", "spacing % 2 != 0"),
    ("tensor.is_cuda() && tensor.get_device_index() == device, name", "tensor.is_cuda(), name"),
    ('  check_cuda(dy, "dy", device);\n', ""),
    ("cudaDeviceGetAttribute(&result.major, cudaDevAttrComputeCapabilityMajor",
     "cudaDeviceGetAttribute(&result.major, cudaDevAttrMultiProcessorCount"),
    ("cudaSetDevice(device) == cudaSuccess &&", "(cudaSetDevice(device), true) &&"),
    ('STD_TORCH_CHECK(function != nullptr, "gated_dwconv: this torch has no CUDA");', ""),
    ("RTLD_LAZY | RTLD_NOLOAD", "RTLD_LAZY"),
]  # fmt: skip
_OF_ITS_CHECKS = [
    ("&& dy.size(2) == shape.W ", ""),
    ('  STD_TORCH_CHECK(dtype_of(dy, "dy") == shape.dtype, "dy must have the dtype of u");\n', ""),
    ("shape.bias_dtype = dtype_of(bias,", "shape.bias_dtype = dtype_of(weight,"),
    ("weight.size(2) <= kMaxKernelSize", "weight.size(2) <= 33"),
    ("act >= 0 && act <= 3", "act >= 0 && act <= 4"),
]
FAULTS += [
    FaultySource(f"csrc/torch/gated_dwconv_{file}", right, wrong, "tests/csrc/test_cuda_binding.py")
    for file, faults in (("cuda.cpp", _OF_THE_CUDA_BINDING), ("checks.h", _OF_ITS_CHECKS))
    for right, wrong in faults
]

# The depthwise convolution alone on CUDA: rows, columns, channels, the ring, the layout of x, what is refused.
_DEPTHWISE_KERNEL = [
    (
        "k <= missing && at.row - R + k >= place.h0",
        "k < missing && at.row - R + k >= place.h0",
        "-k 'against_fp64 and stage and bfloat16'",
    ),
    ("k <= missing && at.row - R + k >= place.h0", "k <= missing", "-k 'races and memory-one and pixel'"),
    (
        "if (at.row - R >= place.h0) yield",
        "if (at.row - R > place.h0) yield",
        "-k 'against_fp64 and stage and bfloat16'",
    ),
    ("if (at.row == first) {", "if (at.n == place.n0 && at.row == first) {", "-k 'several_images_of and bfloat16'"),
    ("(sums[s] + bias).store", "sums[s].store", "-k bias_is_added_last"),
    ("s < stored && s + packet_pixel", "s + packet_pixel", "-k 'races and memory-several'"),
    ("s < stored && s + packet_pixel < kStrip", "s < stored", "-k 'races and races-several'"),
    ("convolving && packet_channel < channels ?", "convolving ?", "-k 'races and memory-the'"),
    ("wait_copies<kStages - 2>()", "wait_copies<kStages - 1>()", "-k 'same_bits and bfloat16'"),
    ("    __syncthreads();\n    stage_next(", "    stage_next(", "-k 'races and races-many'"),
    ("    __syncwarp();\n#pragma", "#pragma", "-k 'against_fp64 and stage and bfloat16'"),
    ("from += x_row;", "from += s_row;", "-k 'slice_of_channels and bfloat16'"),
]
FAULTS += [
    FaultySource("csrc/cuda/depthwise.cuh", right, wrong, f"tests/csrc/test_cuda_depthwise.py {selected}")
    for right, wrong, selected in _DEPTHWISE_KERNEL
]
# The identity channels of a row: whose packets, which of them there are, where they lie.
_IDENTITY = [
    ("(first_ + index - pixel * packets_) * kChannels", "(index - pixel * packets_) * kChannels"),
    ("if (index >= count_) return {};", ""),
    ("g[b], i[b]).store(y + place.offset(y_pitch))", "g[b], i[b]).store(y + place.offset(2 * y_pitch))"),
    ("i[b] = P::load(u + D + place.offset(u_pitch));", "i[b] = P::load(u + D + place.offset(2 * D));"),
]
FAULTS += [
    FaultySource("csrc/cuda/identity_row.cuh", right, wrong, "tests/csrc/test_cuda_host.py -k 'fp64 or layouts'")
    for right, wrong in _IDENTITY
]
# The split backward: rows of e and x, images, indices beyond 32 bits, e in the place of s, the filter turned.
_SPLIT_KERNELS = [
    ("weight_gradient.cuh", "if (adding && row >= 0) {", "if (adding) {", "-k 'fp64 and bfloat16'"),
    ("weight_gradient.cuh", "row < e_end ? e : Value::zero()", "e", "-k 'fp64 and bfloat16'"),
    ("weight_gradient.cuh", "const std::int64_t e_pixel", "const int e_pixel", "-k 2_to_the_31"),
    ("gate_backward.cuh", "ds.store(d < identity ? to + D :", "ds.store(d <= identity ? to + D :",
     "-k 'fp64 and bfloat16'"),
    ("gate_backward.cuh", "P::load_written(d < identity ? from + D :", "P::load_written(d <= identity ? from + D :",
     "-k 'fp64 and bfloat16'"),
    ("depthwise.cuh", "if (args.flipped) {", "if (false) {", "-k 'fp64 and bfloat16'"),
]  # fmt: skip
FAULTS += [
    FaultySource(f"csrc/cuda/{file}", right, wrong, f"tests/csrc/test_cuda_split_backward.py {selected}")
    for file, right, wrong, selected in _SPLIT_KERNELS
]
_DEPTHWISE_BINDING = [
    ("csrc/cuda/dispatch.cpp", "x_spacing * element % 16 == 0 && ", ""),
    (
        "csrc/cuda/dispatch.cpp",
        "shape.K == kDepthwiseKernelSize && shape.C <= kMostChannels &&",
        "shape.K == kDepthwiseKernelSize &&",
    ),
    (
        "csrc/torch/gated_dwconv_cuda.cpp",
        "STD_TORCH_CHECK(x.size(3) <= 1 || x.stride(3) == 1,",
        "STD_TORCH_CHECK(true,",
    ),
    ("csrc/torch/gated_dwconv_cuda.cpp", "own == dtype || own == DType::kFloat32", "own != DType::kFloat64"),
    (
        "csrc/torch/gated_dwconv_cuda.cpp",
        "spacing, weight.const_data_ptr(), bias.const_data_ptr(), s.",
        "spacing, bias.const_data_ptr(), weight.const_data_ptr(), s.",
    ),
    ("mambaout_kernels/backends/cuda.py", "C % packet == spacing % packet == 0", "spacing % packet == 0"),
    ("mambaout_kernels/backends/cuda.py", "and x.data_ptr() % _PACKET_BYTES == 0", ""),
]
FAULTS += [
    FaultySource(file, right, wrong, "tests/csrc/test_cuda_depthwise_binding.py")
    for file, right, wrong in _DEPTHWISE_BINDING
]

_NAMESPACES = [
    ("mambaout_kernels/backends/namespace.py", 'PACKAGE.replace(".", "_")', '"mambaout_kernels"'),
    ("csrc/torch/registration.h", "std::replace(package.begin(), package.end(), '.', '_');", ""),
]
FAULTS += [FaultySource(file, right, wrong, "tests/backends/test_namespace.py") for file, right, wrong in _NAMESPACES]

_HUB = [
    ("mambaout_kernels/models/hub.py", "type(item) is int and 0 <= item", "0 <= item"),
    ("mambaout_kernels/models/hub.py", 'if sum(arguments["depths"]) > tensors:', "if False:"),
    ("mambaout_kernels/models/hub.py", "type(value) not in _TYPES[key] or", ""),
    ("mambaout_kernels/models/hub.py", "if described != {key", "if False and described != {key"),
    ("mambaout_kernels/weights/pretrained.py", "        if arguments is not None:\n", "        if False:\n"),
    ("mambaout_kernels/weights/pretrained.py", "path.name in HUB_FILES and config", "config"),
]
FAULTS += [FaultySource(file, right, wrong, "tests/weights/test_hub.py") for file, right, wrong in _HUB]

_PREPARED = [
    ('cfg["crop_mode"] == "squash"', "False"),
    ('if size == cfg["test_input_size"][1] else', "if False else"),
    ('size or cfg["input_size"][1]', "size or 224"),
]
FAULTS += [
    FaultySource("mambaout_kernels/images.py", right, wrong, "tests/cli/test_images.py -k prepared_as_by_timm")
    for right, wrong in _PREPARED
]

_FLOPS = [
    ("return 2 * _product(dy, weight)", "return _product(dy, weight)"),
    ("conv_channels * kernel_size**2", "hidden * kernel_size**2"),
]
FAULTS += [
    FaultySource("mambaout_kernels/ops/flops.py", right, wrong, "tests/ops/test_flops.py") for right, wrong in _FLOPS
]

# The selective scan: the reference, the CPU's kernels, orders.
FAULTS += [
    FaultySource(
        "mambaout_kernels/comparators/reference.py",
        "dexponent = carried * states[t]",
        "dexponent = carried * states[t + 1]",
        f"{_SCANS} own_gradients",
    ),
    FaultySource(
        "mambaout_kernels/comparators/reference.py",
        "torch.where(z > 20, 1.0,",
        "torch.where(z > 20, 0.9,",
        f"{_SCANS} own_gradients",
    ),
    FaultySource(
        f"{_SCAN}/body.h", "const bool add = call.shared && g > 0;", "const bool add = false;", f"{_SCANS} test_forward"
    ),
    FaultySource(f"{_SCAN}/backward_body.h", "next = dh * decay.at(t);", "next = dh;", f"{_SCANS} test_forward"),
    FaultySource(
        f"{_SCAN}/backward_body.h", "states[i] = states[i - of_states];", "states[i] = 0.0f;", f"{_SCANS} test_forward"
    ),
    FaultySource(
        f"{_SCAN}/backward_body.h",
        "select_less(broadcast(20.0f), x, broadcast(1.0f), sigmoid(x))",
        "broadcast(1.0f) - sigmoid(x)",
        f"{_SCANS} test_forward",
    ),
    FaultySource(
        f"{_SCAN}/dispatch.cpp", "token >= L || visited[token] == g + 1", "token >= L", f"{_SCANS} bad_arguments"
    ),
    FaultySource(
        f"{_SCAN}/dispatch.cpp",
        "ceil_div(task.end - task.begin, at.lanes) * at.lanes",
        "at.pitch",
        "tests/comparators/test_scan_launch.py -k 'plain and False'",
    ),
    FaultySource(
        "csrc/cpu/simd/exponentials.h",
        "broadcast(20.0f), x, x, both",
        "broadcast(3.0f), x, x, both",
        f"{_SCANS} test_forward",
    ),
    FaultySource(
        "mambaout_kernels/comparators/scan_orders.py",
        "rows[1::2].flip(1)",
        "rows[1::2]",
        "tests/comparators/test_scan_orders.py",
    ),
    FaultySource(
        "mambaout_kernels/comparators/ledger.py",
        "if func.is_view or not made:",
        "if not made:",
        "tests/comparators/test_mixers.py -k ledger",
    ),
    FaultySource(
        "mambaout_kernels/comparators/sweep.py",
        "share = -ratio / (next_ratio - ratio)",
        "share = 0.5",
        "tests/comparators/test_mixers.py -k crossings",
    ),
    FaultySource(
        "mambaout_kernels/comparators/triton_kernels/launch.py", "wanted < 3", "True", f"{_SCAN_LAUNCH} -k chunk"
    ),
]
