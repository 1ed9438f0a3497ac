"""The block in inference on a GPU, in the interpreter: beside eager and fp64, its parts, and what chooses it."""

import copy
import re
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from numerics import assert_accurate
from torch import nn
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

import mambaout_kernels as mk
from mambaout_kernels import backends, reference
from mambaout_kernels.backends.triton_kernels import block as block_kernels
from mambaout_kernels.backends.triton_kernels import block_launch, block_tiles
from mambaout_kernels.benchmarking import error_bounds
from mambaout_kernels.benchmarking.inputs import enlivened
from mambaout_kernels.inference.split_blocks import SplitBlock, SplitBlocks
from mambaout_kernels.nn import FusedGatedCNNBlock
from mambaout_kernels.ops import split_block
from mambaout_kernels.reference import ACTIVATIONS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTS = {
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "silu": nn.SiLU,
    "identity": nn.Identity,
}


@pytest.fixture(autouse=True)
def _inference(monkeypatch):
    """float32 by the kernels too, which multiply it exactly here."""
    monkeypatch.setattr(split_block, "_whole", lambda x: False)
    with torch.no_grad():
        yield


@pytest.fixture
def tf32():
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


def make(dim, dtype=torch.float32, act="gelu", **options):
    return enlivened(FusedGatedCNNBlock(dim, act_layer=ACTS[act], **options)).to(dtype).eval()


def pixels(*shape, dtype=torch.float32, offset=0.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(3)) + offset).to(dtype)


def check_split(block, x):
    with backends.force("reference"):
        eager, exact = block(x), copy.deepcopy(block).double()(x.double())
    ours = SplitBlock(block, x.dtype)(x)
    assert ours.is_contiguous()
    assert_accurate(ours, eager, exact, error_bounds.of_block(block, x)["y"])


# N, H, W, dim, then the block's options and dtype; each takes a way of its own through the kernels. 3 x 3 filters but
# for two: the interpreter takes a second for a tile of a large one.
SMALL_FILTER = {"kernel_size": 3}
SHAPES = {
    "96 = 64 + 32": ((1, 3, 5, 96), {"kernel_size": 7}, DTYPES),
    "48, rows of several programs": ((2, 7, 6, 48), {"ls_init_value": 0.5}, DTYPES[1:2]),
    "width of one power of two": ((1, 5, 7, 64), {}, DTYPES[2:]),
    "width below the smallest part": ((1, 4, 4, 10), {}, DTYPES[1:2]),
    "width padded to 32 + 16": ((1, 4, 5, 40), {"ls_init_value": 0.5}, DTYPES[:1]),
    "base's odd hidden": ((1, 3, 4, 32), {"kernel_size": 7}, DTYPES),  # 85
    "odd conv channels": ((1, 3, 4, 30), {"conv_ratio": 0.5}, DTYPES[1:2]),
    "no conv channels": ((2, 4, 4, 24), {"conv_ratio": 0.0}, DTYPES[2:]),
    "no identity channels": ((1, 7, 8, 24), {"conv_ratio": 2.0, "expansion_ratio": 2.0}, DTYPES[1:2]),
    "wide ratios": ((1, 4, 4, 32), {"expansion_ratio": 3.0, "conv_ratio": 1.5}, DTYPES[:1]),
    "9 x 9": ((1, 2, 3, 10), {"kernel_size": 9}, DTYPES[1:2]),
    "one pixel": ((1, 1, 1, 32), {}, DTYPES[2:]),
    "no pixel": ((0, 4, 4, 16), {}, DTYPES[1:2]),
}
WIDE = {
    "288 = 256 + 32": ((1, 3, 3, 288), {"conv_ratio": 0.25, "expansion_ratio": 0.5}, DTYPES[1:2]),
    "hidden and conv channels of no whole blocks": ((1, 5, 4, 80), {"ls_init_value": 0.5}, DTYPES),
    "no conv channels": ((1, 4, 4, 72), {"conv_ratio": 0.0}, DTYPES[:1]),
    "no identity channels": ((1, 4, 5, 72), {"conv_ratio": 2.0, "expansion_ratio": 2.0}, DTYPES[2:]),
    "rows of several programs": ((3, 7, 7, 20), {}, DTYPES[1:2]),
    "no pixel": ((1, 0, 4, 72), {}, DTYPES[:1]),
}


def every(cases):
    """Each case in its dtypes, and in make nightly in the others."""
    found = []
    for name, (shape, options, dtypes) in cases.items():
        for dtype in DTYPES:
            marks = () if dtype in dtypes else pytest.mark.nightly
            label = f"{name}, {str(dtype).removeprefix('torch.')}"
            found.append(pytest.param(shape, {**SMALL_FILTER, **options}, dtype, marks=marks, id=label))
    return found


@pytest.mark.parametrize(("shape", "options", "dtype"), every(SHAPES))
def test_narrow_against_fp64(shape, options, dtype):
    check_split(make(shape[-1], dtype, **options), pixels(*shape, dtype=dtype))


@pytest.mark.parametrize(("shape", "options", "dtype"), every(WIDE))
def test_wide_against_fp64(shape, options, dtype, monkeypatch):
    monkeypatch.setattr(split_block, "NARROW", 0)
    check_split(make(shape[-1], dtype, **options), pixels(*shape, dtype=dtype))


@pytest.mark.parametrize("narrow", [True, False], ids=["narrow", "wide"])
@pytest.mark.parametrize("act", ACTIVATIONS[1:])
def test_other_activations(act, narrow, monkeypatch):
    monkeypatch.setattr(split_block, "NARROW", 1024 if narrow else 0)
    check_split(make(40, torch.bfloat16, act, kernel_size=3), pixels(1, 4, 5, 40, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_norm_where_the_mean_is_large(dtype):
    """Sums of x * x would cancel; the mean is subtracted first."""
    check_split(make(48, dtype, kernel_size=3), pixels(1, 3, 3, 48, dtype=dtype, offset=40.0))


@pytest.mark.parametrize("narrow", [True, False], ids=["narrow", "wide"])
def test_the_norm_of_small_variances(narrow, monkeypatch):
    """eps is then a part of them."""
    monkeypatch.setattr(split_block, "NARROW", 1024 if narrow else 0)
    check_split(make(48, kernel_size=3), 1e-3 * pixels(1, 3, 3, 48))


@pytest.mark.parametrize("narrow", [True, False], ids=["narrow", "wide"])
def test_nothing_beyond_a_tensor_is_read(narrow, monkeypatch):
    """Whatever is multiplied by zero must be in memory that is ours: NaN lies around."""
    monkeypatch.setattr(split_block, "NARROW", 1024 if narrow else 0)
    block, x = SplitBlock(make(20, kernel_size=3, ls_init_value=0.5), torch.float32), pixels(1, 3, 3, 20)
    expected = block(x)

    def among_nan(t):
        around = t.new_full((t.numel() + 8192,), float("nan"))
        around[4096 : 4096 + t.numel()] = t.flatten()
        return around[4096 : 4096 + t.numel()].view(t.shape)

    for name, buffer in list(block.named_buffers()):
        setattr(block, name, among_nan(buffer))
    assert torch.equal(block(among_nan(x)), expected)


@pytest.mark.parametrize("missing", ["fc1.bias", "fc2.bias", "norm.bias", "norm.weight and bias"])
def test_parameters_that_are_not_there(missing):
    block = make(24, kernel_size=3)
    if missing == "norm.weight and bias":
        block.norm = nn.LayerNorm(24, elementwise_affine=False)
    else:
        module, name = missing.split(".")
        getattr(block, module).register_parameter(name, None)
    check_split(block, pixels(1, 4, 5, 24))


def test_any_strides_give_the_same_bits():
    fast, x = SplitBlock(make(24, kernel_size=3), torch.float32), pixels(2, 3, 4, 24)
    turned = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert torch.equal(fast(turned), fast(x))
    assert torch.equal(fast(x)[1:], fast(x[1:]))  # a pixel's result does not depend on what is beside it


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_where_eager_is_not_finite(value):
    block, x = make(30, conv_ratio=0.5, kernel_size=3), pixels(1, 5, 6, 30)
    x[0, 2, 3, 4] = value
    with backends.force("reference"):
        eager = block(x)
    assert torch.equal(SplitBlock(block, torch.float32)(x).isfinite(), eager.isfinite())


def test_maps_too_wide_for_32_bit_offsets_run_on_the_reference(monkeypatch):
    fast, x = SplitBlock(make(16, kernel_size=3), torch.float32), pixels(1, 4, 5, 16)
    expected = fast(x)
    monkeypatch.setattr(split_block, "_LONGEST_ROW", 1)
    monkeypatch.setattr(block_launch, "depthwise", None)
    torch.testing.assert_close(fast(x), expected)


def test_the_compiled_depthwise_kernel_is_taken_where_it_runs(monkeypatch):
    fast, x = SplitBlock(make(16, kernel_size=3), torch.float32), pixels(1, 4, 5, 16)
    expected = fast(x)
    monkeypatch.setattr(split_block, "_by_cuda", lambda c, weight: True)
    monkeypatch.setattr(split_block.cuda, "depthwise", reference.dwconv)
    monkeypatch.setattr(block_launch, "depthwise", None)
    torch.testing.assert_close(fast(x), expected)
    with backends.force("triton"), pytest.raises(TypeError):
        fast(x)


def test_launches(monkeypatch):
    """Three of a narrow block; of a wide one three, and PyTorch's two products and residual."""
    launched = []
    for name in ("layer_norm", "norm_linear", "depthwise", "gated_mlp", "gated_linear", "pack_filter"):
        run = getattr(block_launch, name)
        monkeypatch.setattr(
            block_launch, name, lambda *a, run=run, name=name, **k: launched.append(name) or run(*a, **k)
        )
    block, x = make(16, kernel_size=3), pixels(1, 3, 3, 16)
    fast = SplitBlock(block, torch.float32)
    assert launched.pop() == "pack_filter"  # once, when it is made
    fast(x)
    assert launched == ["norm_linear", "depthwise", "gated_mlp"]
    launched.clear()
    monkeypatch.setattr(split_block, "NARROW", 0)
    fast(x)
    assert launched == ["layer_norm", "depthwise", "gated_linear"]


def test_the_depthwise_kernel_alone():
    for dtype, (C, K) in zip(DTYPES, ((9, 3), (40, 7), (24, 5)), strict=True):
        x, weight, bias = pixels(2, 3, 4, C, dtype=dtype), pixels(C, 1, K, K, dtype=dtype) / K, pixels(C, dtype=dtype)
        expected = F.conv2d(x.double().permute(0, 3, 1, 2), weight.double(), bias.double(), padding=K // 2, groups=C)
        ours = block_launch.depthwise(x, split_block.pack_filter(weight, bias), K)
        torch.testing.assert_close(ours.double(), expected.permute(0, 2, 3, 1), rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_parts_of_a_width():
    assert [block_tiles.parts(w) for w in (10, 16, 17, 40, 48, 96, 192, 256, 576)] == [
        (16, 0), (16, 0), (16, 16), (32, 16), (32, 16), (64, 32), (128, 64), (256, 0), (512, 64),
    ]  # fmt: skip
    for width in range(1, 1025):
        first, second = block_tiles.parts(width)
        assert width <= first + second < 2 * width + 32


# --- through optimize_for_inference ---

SMALL = {"depths": (1, 2), "dims": (16, 24), "num_classes": 110, "ls_init_value": 0.5, "kernel_size": 3}


def optimized(model, **options):
    with backends.force("triton"):
        return mk.optimize_for_inference(model, **options)


def test_a_model_whose_blocks_are_split():
    model = enlivened(mk.MambaOut(**SMALL)).eval()
    fast = optimized(model, dtype=torch.bfloat16)
    fused = [(part.name, part.kind) for part in fast.report() if part.fused]
    assert fused == [
        ("downsample_layers.0", "stem"), ("downsample_layers.1", "downsample"),
        ("stages.0.0", "blocks"), ("stages.1.0 to 1", "blocks"),
    ]  # fmt: skip
    assert [type(stage[0]) for stage in fast.model.stages] == [SplitBlocks, SplitBlocks]
    images = pixels(2, 3, 32, 32)
    low = copy.deepcopy(model).bfloat16()
    with backends.force("reference"):
        eager, exact = low(images.bfloat16()), copy.deepcopy(low).double()(images.bfloat16().double())
    with backends.force("triton"):
        assert_accurate(fast(images), eager, exact)


# --- float32 ---


@pytest.mark.parametrize("options", [{}, {"conv_ratio": 0.0}, {"ls_init_value": 0.5}], ids=str)
def test_at_full_precision_products_are_those_of_pytorch(monkeypatch, options):
    monkeypatch.undo()
    for name in ("norm_linear", "gated_mlp", "gated_linear"):
        monkeypatch.setattr(block_launch, name, None)
    block, x = make(20, kernel_size=3, **options), pixels(2, 3, 4, 20)
    assert optimized(block).report()[0].fused
    check_split(block, x)
    check_split(block, x.permute(0, 2, 1, 3))


def truncated(t):
    """As tensor cores read float32."""
    return (t.view(torch.int32) & -0x2000).view(torch.float32)


def test_factors_are_rounded_to_tf32_before_they_are_cut(tf32, monkeypatch):
    """What is cut is then the same as what was given."""
    found = []

    def product(self, a, b, sums, *_):
        found.extend(torch.from_numpy(t.data.copy()) for t in (a, b))
        return TensorHandle(np.matmul(a.data, b.data) + sums.data, sums.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", product)
    for narrow in (1024, 0):
        monkeypatch.setattr(split_block, "NARROW", narrow)
        SplitBlock(make(40, kernel_size=3, conv_ratio=0.5), torch.float32)(pixels(1, 3, 4, 40))
        assert len(found) > 6
        assert all(torch.equal(truncated(t), t) for t in found)
        assert not all(torch.equal((t.view(torch.int32) & -0x4000).view(torch.float32), t) for t in found)
        found.clear()


@pytest.mark.parametrize("narrow", [True, False], ids=["narrow", "wide"])
def test_tf32_keeps_what_is_not_finite(tf32, monkeypatch, narrow):
    monkeypatch.setattr(split_block, "NARROW", 1024 if narrow else 0)
    block, x = make(30, conv_ratio=0.5, kernel_size=3), pixels(1, 5, 6, 30)
    x[0, 2, 3, 4], x[0, 0, 0, 0] = float("nan"), 3e38
    with backends.force("reference"):
        eager = block(x)
    assert torch.equal(SplitBlock(block, torch.float32)(x).isfinite(), eager.isfinite())


@triton.jit
def round_all(x_ptr, y_ptr, N: tl.constexpr):
    index = tl.arange(0, N)
    tl.store(y_ptr + index, block_kernels._rounded(tl.load(x_ptr + index), tl.float32, "tf32"))


def test_kernels_round_as_weights_are():
    """NaN as GPUs write it, whose bits are all set, and the largest number would turn into others."""
    bits = torch.randint(-(2**31), 2**31, (256,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    bits[:6] = torch.tensor([0x7FFFFFFF, -1, 0x7F7FFFFF, -0x00800001, 0x7F800000, 0x7FC00000])
    x, y = bits.view(torch.float32), torch.empty(256)
    round_all[(1,)](x, y, 256)
    assert torch.equal(y.view(torch.int32), block_launch.round_tf32(x).view(torch.int32))
    assert torch.equal(y.isnan(), x.isnan())
    assert torch.equal(y.isinf(), x.isinf())
    assert (((y - x).abs() <= 2**-11 * x.abs()) | ~x.isfinite() | (x.abs() < 1e-37)).all()


def test_numbers_rounded_to_tf32():
    largest = torch.finfo(torch.float32).max
    given = [1.0, 1 + 2**-11, 1 + 2**-12, -(1 + 3 * 2**-11), 2.0**-140, largest, float("inf"), float("nan"), -0.0]
    expected = [1.0, 1 + 2**-10, 1.0, -(1 + 2**-9), 2.0**-140, largest, float("inf"), float("nan"), -0.0]
    actual, wanted = block_launch.round_tf32(torch.tensor(given)), torch.tensor(expected)
    wanted[4] = actual[4]  # subnormal: to a multiple of 2^-136
    assert abs(float(actual[4]) - 2.0**-140) <= 2.0**-137
    assert torch.equal(actual.view(torch.int32), wanted.view(torch.int32))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda b: setattr(b, "norm", nn.RMSNorm(16)), "norm .* RMSNorm"),
        (lambda b: b.fc1.register_forward_hook(lambda *_: None), "fc1 has hooks"),
        (lambda b: setattr(b, "act", nn.ReLU()), "act ReLU"),
        (lambda b: b.fc2.float(), "fc2.weight is torch.float32"),
    ],
    ids=["norm", "hook", "act", "dtype"],
)
def test_what_is_not_split_says_why(change, reason):
    block = make(16, torch.bfloat16)
    change(block)
    (part,) = optimized(nn.Sequential(block, nn.Identity())).report()
    assert not part.fused
    assert re.search(reason, part.reason)


def test_gradients_and_files_are_refused(tmp_path):
    fast = optimized(make(16, torch.bfloat16))
    with torch.enable_grad(), pytest.raises(RuntimeError, match="requires a gradient"):
        fast(pixels(1, 2, 2, 16, dtype=torch.bfloat16).requires_grad_())
    with pytest.raises(RuntimeError, match="files are for the CPU"):
        fast.save(tmp_path / "model.safetensors")


def test_compiled_without_a_graph_break():
    fast = optimized(make(16, torch.bfloat16, kernel_size=3))
    seen = []
    compiled = torch.compile(lambda x: fast(x), fullgraph=True, backend=lambda graph, _: seen.append(graph) or graph)
    for batch in (2, 3, 4):
        x = pixels(batch, 4, 4, 16, dtype=torch.bfloat16)
        assert torch.equal(compiled(x), fast(x))
    assert len(seen) <= 2  # for one batch size, then for all


BAD = {
    "x": (lambda t: t["x"].flatten(), ValueError, r"x must have 4 dimensions"),
    "fc1_weight": (lambda t: t["fc1_weight"][1:], ValueError, r"fc1_weight must have shape \(88, 16\); got \(87, 16\)"),
    "fc1_bias": (lambda t: t["fc1_bias"].double(), TypeError, "fc1_bias must be torch.float32"),
    "conv_weight": (lambda t: t["conv_weight"][..., 1:], ValueError, "weight must have shape"),
    "taps": (lambda t: t["taps"][:-1], ValueError, r"taps must have shape \(50, 128\); got \(49, 128\)"),
    "fc2_weight": (lambda t: t["fc2_weight"].t().contiguous().t(), ValueError, "fc2_weight must be contiguous"),
    "scale": (lambda t: t["scale"][1:], ValueError, r"scale must have shape \(16,\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name(name):
    block = SplitBlock(make(16, ls_init_value=0.5), torch.float32)
    given = {"x": pixels(1, 2, 2, 16), **dict(block.named_buffers())}
    change, error, message = BAD[name]
    given[name] = change(given)
    with pytest.raises(error, match=message):
        split_block.split_gated_cnn_block(**given, eps=1e-6, act="gelu")
