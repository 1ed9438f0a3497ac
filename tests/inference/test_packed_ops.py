"""The ops of inference, one by one: packing, running, packing again; and what is damaged is refused."""

import copy
from functools import partial

import pytest
import torch
from numerics import assert_accurate
from torch import nn

import mambaout_kernels as mk
from mambaout_kernels import backends
from mambaout_kernels.backends import cpu
from mambaout_kernels.benchmarking import error_bounds
from mambaout_kernels.benchmarking.inputs import enlivened
from mambaout_kernels.nn.block import LAYER_NORM
from mambaout_kernels.nn.downsample import Downsample, Stem
from mambaout_kernels.nn.head import Head
from mambaout_kernels.nn.plain import activation_name, layer_scale_of
from mambaout_kernels.ops import conv3x3s2 as conv_op
from mambaout_kernels.ops import gated_cnn_blocks as blocks_op
from mambaout_kernels.ops.head import head as head_op

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))

OPS = torch.ops.mambaout_kernels
ISAS = [] if cpu.module is None else cpu.module.supported_cpu_capabilities()
NEEDS_TWO = pytest.mark.skipif(len(ISAS) < 2, reason="one instruction set here")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# dim, H, W, N, and arguments of the block: what reaches each branch of the kernels
BLOCKS = {
    "a stage": (96, 15, 17, 2, {}),
    "hidden 341": (128, 9, 8, 1, {}),
    "wider than a column": (16, 5, 330, 1, {}),
    "narrower than the filter": (24, 2, 3, 3, {}),
    "one pixel": (72, 1, 1, 1, {}),
    "no conv channels": (20, 6, 5, 1, {"conv_ratio": 0.0}),
    "all channels convolved": (20, 6, 5, 1, {"conv_ratio": 8 / 3}),
    "filter of 3": (32, 8, 9, 1, {"kernel_size": 3}),
    "filter of 9": (32, 8, 9, 1, {"kernel_size": 9}),
    "layer scale and SiLU": (40, 7, 7, 2, {"ls_init_value": 1e-4, "act_layer": nn.SiLU}),
    "tanh": (40, 7, 7, 1, {"act_layer": lambda: nn.GELU(approximate="tanh")}),
    "identity": (40, 7, 7, 1, {"act_layer": nn.Identity}),
    "norm without parameters": (40, 7, 7, 1, {"norm_layer": lambda dim: nn.LayerNorm(dim, elementwise_affine=False)}),
    "deep sums": (600, 7, 7, 1, {}),
}


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def use(isa):
    cpu.module.set_cpu_capability(isa)


@pytest.fixture
def restored():
    """The instruction set in use is put back."""
    before = cpu.instruction_set()
    yield
    use(before)


def make_block(dim, **arguments):
    return enlivened(mk.FusedGatedCNNBlock(dim, **arguments)).eval()


def weights_of(block):
    modules = (block.norm, block.fc1, block.conv, block.fc2)
    return [getattr(m, kind, None) for m in modules for kind in ("weight", "bias")] + [layer_scale_of(block.ls)]


def pack_block(block, bf16=None):
    bf16 = cpu.multiplies_bf16() and block.fc1.weight.dtype == torch.bfloat16 if bf16 is None else bf16
    return blocks_op.pack(*weights_of(block), eps=block.norm.eps, act=activation_name(block.act), bf16=bf16)


def pack_conv(conv, norm=None, act="identity"):
    bf16 = cpu.multiplies_bf16() and conv.weight.dtype == torch.bfloat16
    affine = (None, None) if norm is None else (norm.weight, norm.bias)
    eps = 0.0 if norm is None else norm.eps
    return conv_op.pack(conv.weight, conv.bias, *affine, normed=norm is not None, eps=eps, act=act, bf16=bf16)


def run_conv(x, conv, norm=None, act="identity"):
    return conv_op.conv3x3s2(x, pack_conv(conv, norm, act), conv.out_channels, x.dtype)


def run_head(norm, head, x, pre_logits=False):
    mid, fc2 = head.norm, None if pre_logits or isinstance(head.fc2, nn.Identity) else head.fc2
    of_mid = (None, None) if mid is None else (mid.weight, mid.bias)
    of_fc2 = (None, None) if fc2 is None else (fc2.weight, fc2.bias)
    return head_op(
        x, norm.weight, norm.bias, head.fc1.weight, head.fc1.bias, *of_mid, *of_fc2, norm.eps,
        0.0 if mid is None else mid.eps, mid is not None, x.dtype,
    )  # fmt: skip


def by_modules(module, x):
    """(eager, exact) of modules and an x of one dtype."""
    with backends.force("reference"):
        return module(x), copy.deepcopy(module).double()(x.double())


def make_head(dim=24, hidden=96, classes=110, normed=True):
    norm = enlivened(nn.LayerNorm(dim, eps=1e-5))
    return norm, enlivened(Head(dim, hidden, classes, nn.LayerNorm(hidden, eps=1e-3) if normed else None, 0.0)).eval()


class Pooled(nn.Module):
    """What the head op computes, by modules."""

    def __init__(self, norm, head, pre_logits=False):
        super().__init__()
        self.norm, self.head, self.pre_logits = norm, head, pre_logits

    def forward(self, x):
        return self.head(self.norm(x.mean((1, 2))), self.pre_logits)


# --- numerics ---


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", BLOCKS)
def test_block_against_fp64(isa, case, dtype):
    dim, H, W, N, arguments = BLOCKS[case]
    block, x = make_block(dim, **arguments).to(dtype), torch.randn(N, H, W, dim).to(dtype)
    found = blocks_op.gated_cnn_blocks(x, pack_block(block))
    assert found.is_contiguous()
    assert_accurate(found, *by_modules(block, x), error_bounds.of_block(block, x)["y"])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("size", [(1, 1), (1, 6), (7, 5), (30, 33), (64, 226)], ids=str)
@pytest.mark.parametrize("kind", ["stem", "stem without norm", "down", "no norm"])
def test_convolution_against_fp64(isa, kind, size, dtype):
    if kind.startswith("stem"):
        module = enlivened(Stem(3, 40, kind == "stem", LAYER_NORM, nn.GELU)).eval().to(dtype)
        x = torch.randn(2, 3, *size).to(dtype)
        pixels = x.permute(0, 2, 3, 1)
        found = run_conv(run_conv(pixels, module.conv1, module.norm1, "gelu"), module.conv2, module.norm2)
        layers = [module.conv1, module.norm1, "gelu", module.conv2, module.norm2]
    else:
        module = enlivened(Downsample(40, 72, False, LAYER_NORM)).eval().to(dtype)
        if kind == "no norm":
            module.norm = nn.Identity()
        pixels = x = torch.randn(2, *size, 40).to(dtype)
        layers = [module.conv, module.norm if kind == "down" else None]
        found = run_conv(x, *layers)
    assert found.is_contiguous()
    assert_accurate(found, *by_modules(module, x), error_bounds.of_downsampling(layers, pixels))


@pytest.mark.parametrize("act", ["gelu_tanh", "silu", "identity"])
def test_convolution_with_every_activation(isa, act):
    conv, norm = enlivened(nn.Conv2d(3, 20, 3, 2, 1)), enlivened(nn.LayerNorm(20, eps=0.01))
    acts = {"gelu_tanh": nn.GELU("tanh"), "silu": nn.SiLU(), "identity": nn.Identity()}
    x = torch.randn(2, 9, 11, 3)

    class Composed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.act = conv, norm, acts[act]

        def forward(self, x):
            return self.act(self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)))

    bound = error_bounds.of_downsampling([conv, norm, act], x)
    assert_accurate(run_conv(x, conv, norm, act), *by_modules(Composed(), x), bound)


def test_norm_without_parameters_and_convolution_without_bias():
    module = Downsample(8, 12, False, LAYER_NORM)
    module.conv, module.norm = nn.Conv2d(8, 12, 3, 2, 1, bias=False), nn.LayerNorm(12, elementwise_affine=False)
    x = torch.randn(1, 15, 17, 8)
    bound = error_bounds.of_downsampling([module.conv, module.norm], x)
    assert_accurate(run_conv(x, module.conv, module.norm), *by_modules(module, x), bound)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kind", ["norm between", "no norm between", "without classifier", "pre_logits"])
def test_head_against_fp64(isa, kind, dtype):
    norm, head = make_head(classes=0 if kind == "without classifier" else 110, normed=kind != "no norm between")
    norm, head, x = norm.to(dtype), head.to(dtype), torch.randn(3, 4, 5, 24).to(dtype)
    pre_logits = kind == "pre_logits"
    found = run_head(norm, head, x, pre_logits)
    expected = by_modules(Pooled(norm, head, pre_logits), x)
    if pre_logits:
        head = copy.deepcopy(head)
        head.fc2 = nn.Identity()
    assert_accurate(found, *expected, error_bounds.of_head(norm, head, x))


def test_a_large_map_is_averaged_as_exactly_as_eager_does(isa):
    """Channels differ by 0.01 on average, of 100: the norm makes much of what the sums lose."""
    norm, head = make_head(classes=1000)  # enough errors to compare
    x = 100 + torch.randn(1, 90, 110, 24)
    assert_accurate(run_head(norm, head, x), *by_modules(Pooled(norm, head), x), error_bounds.of_head(norm, head, x))


def test_the_ops_turn_one_dtype_into_the_other():
    """Of a bf16 map and float32 weights, and of a float32 map into bf16: each as after one conversion."""
    conv, x = enlivened(nn.Conv2d(8, 12, 3, 2, 1)), torch.randn(2, 7, 6, 8).bfloat16()
    packed = pack_conv(conv)
    exact = conv_op.conv3x3s2(x.float(), packed, 12, torch.float32)
    assert torch.equal(conv_op.conv3x3s2(x, packed, 12, torch.float32), exact)
    assert torch.equal(conv_op.conv3x3s2(x, packed, 12, torch.bfloat16), exact.bfloat16())
    norm, head = make_head()
    weights = (norm.weight, norm.bias, head.fc1.weight, None, None, None, None, None, 1e-6, 1e-6, False)
    x = torch.randn(2, 3, 4, 24).bfloat16()
    exact = head_op(x.float(), *weights, torch.float32)
    assert torch.equal(head_op(x, *weights, torch.float32), exact)
    assert torch.equal(head_op(x, *weights, torch.bfloat16), exact.bfloat16())


# --- shapes, strides, threads ---


def strided(channels):
    """(2 or more, H, W, channels) of every kind of strides."""
    base = torch.randn(3, 8, 9, 2 * channels)
    yield base[..., 5 : 5 + channels]
    yield base[:, ::2, :, ::2]
    yield base.transpose(1, 2)[..., :channels]
    yield base[:1, :, :, :channels].expand(4, -1, -1, -1)
    yield torch.randn(2, channels, 7, 9).permute(0, 2, 3, 1)
    yield base[..., :channels].flip(3).flip(1)


RUNS = {
    "block": (12, lambda: partial(blocks_op.gated_cnn_blocks, packed=pack_block(make_block(12)))),
    "convolution": (12, lambda: partial(run_conv, conv=enlivened(nn.Conv2d(12, 20, 3, 2, 1)), norm=LAYER_NORM(20))),
    "head": (24, lambda: partial(run_head, *make_head())),
}


@pytest.mark.parametrize("op", RUNS)
def test_any_strides_give_the_same_bits_and_the_input_stays(isa, op):
    channels, make = RUNS[op]
    run = make()
    for x in strided(channels):
        before = x.clone()
        assert torch.equal(run(x), run(x.contiguous()))
        assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("op", RUNS)
def test_the_same_bits_at_every_thread_count_and_in_a_batch(isa, op, dtype):
    channels, make = RUNS[op]
    run, x = make(), torch.randn(5, 14, 19, channels).to(dtype)
    torch.set_num_threads(1)
    first = run(x)
    assert torch.equal(run(x[3:4]), first[3:4])
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        assert torch.equal(run(x), first)
        assert torch.equal(run(x[1:2]), first[1:2])


@pytest.mark.parametrize("op", RUNS)
def test_empty_batch(isa, op):
    channels, make = RUNS[op]
    run = make()
    assert run(torch.randn(0, 6, 4, channels)).shape == (0, *run(torch.randn(1, 6, 4, channels)).shape[1:])


def run_op(op, x):
    """(of the op, eager's) on random weights."""
    if op == "block":
        module = make_block(12, kernel_size=3)
        found = blocks_op.gated_cnn_blocks(x, pack_block(module))
    elif op == "convolution":
        module = enlivened(Downsample(12, 20, False, LAYER_NORM))
        found = run_conv(x, module.conv, module.norm)
    else:
        module = Pooled(*make_head())
        found = run_head(module.norm, module.head, x)
    return found, by_modules(module, x)[0]


@pytest.mark.parametrize("op", RUNS)
def test_not_a_number_stays_where_it_is(isa, op):
    x = torch.randn(2, 9, 9, RUNS[op][0])
    x[1, 4, 4, 3] = torch.nan
    found, eager = run_op(op, x)
    assert torch.equal(found.isnan(), eager.isnan())
    assert not found.isnan().all()


@pytest.mark.parametrize("value", [1e15, 1e25, 1e30, -1e37, 3e38])
@pytest.mark.parametrize("op", RUNS)
def test_a_large_pixel_is_finite_where_it_is_for_eager(isa, op, value):
    """Also where its variance overflows: eager then has a norm of 0."""
    x = torch.randn(2, 9, 9, RUNS[op][0])
    x[1, 4, 4, 3] = value
    found, eager = run_op(op, x)
    finite = eager.isfinite()
    assert found[finite].isfinite().all()
    assert abs(value) > 1e37 or finite.all()
    torch.testing.assert_close(found[finite], eager[finite], rtol=1e-3, atol=1e-3)


def test_joined_blocks_are_the_blocks_one_after_the_other(isa):
    blocks = [make_block(12), make_block(12, kernel_size=3, act_layer=nn.SiLU), make_block(12, expansion_ratio=2.0)]
    packed = [pack_block(block) for block in blocks]
    expected = x = torch.randn(2, 7, 8, 12)
    before = x.clone()
    for one in packed:
        expected = blocks_op.gated_cnn_blocks(expected, one)
    assert torch.equal(blocks_op.gated_cnn_blocks(x, blocks_op.join(packed)), expected)
    assert torch.equal(x, before)


# --- bad input ---


def test_wrong_weights_are_named():
    norm, _, fc1, fc1_bias, conv, conv_bias, fc2, *_ = weights_of(make_block(8))
    good = {"fc1_weight": fc1, "fc1_bias": fc1_bias, "conv_weight": conv, "conv_bias": conv_bias, "fc2_weight": fc2}
    good |= {"norm_weight": norm, "norm_bias": None, "fc2_bias": None, "scale": None, "eps": 1e-6, "act": "gelu"}
    blocks_op.pack(**good)
    for wrong, message in (
        ({"norm_weight": torch.ones(9)}, "norm_weight must have 8 elements, has 9"),
        ({"fc1_weight": fc1[:-1]}, r"fc1_weight must be \(2 \* hidden, dim\)"),
        ({"fc1_weight": fc1[0]}, r"fc1_weight must be \(2 \* hidden, dim\)"),
        ({"fc1_bias": fc1_bias[1:]}, "fc1_bias must have 42 elements, has 41"),
        (
            {"conv_weight": torch.randn(8, 1, 4, 4)},
            r"conv_weight must be \(conv_channels, 1, K, K\) with K odd, 1 to 31",
        ),
        ({"conv_weight": torch.randn(8, 1, 33, 33)}, "conv_weight must be"),
        ({"conv_weight": torch.randn(8, 2, 3, 3)}, "conv_weight must be"),
        ({"conv_weight": torch.randn(22, 1, 3, 3)}, "conv_weight must have at most hidden = 21 channels, has 22"),
        ({"conv_bias": torch.randn(7)}, "conv_bias must have 8 elements, has 7"),
        ({"fc2_weight": torch.randn(8, 20)}, "fc2_weight must have 168 elements, has 160"),
        ({"fc2_weight": fc2.double()}, "fc2_weight must be float32 or bfloat16"),
        ({"scale": torch.ones(8, dtype=torch.int64)}, "scale must be float"),
        ({"act": "relu"}, "act must be one of gelu, gelu_tanh, silu, identity; got 'relu'"),
    ):
        with pytest.raises(RuntimeError, match=message):
            blocks_op.pack(**(good | wrong))
    good = {"weight": torch.randn(12, 8, 3, 3), "bias": None, "norm_weight": None, "norm_bias": None}
    good |= {"normed": False, "eps": 0.0, "act": "gelu"}
    conv_op.pack(**good)
    for wrong, message in (
        ({"weight": torch.randn(12, 8, 5, 5)}, r"weight must be \(out_channels, in_channels, 3, 3\)"),
        ({"weight": torch.randn(0, 8, 3, 3)}, r"weight must be \(out_channels, in_channels, 3, 3\)"),
        ({"bias": torch.randn(8)}, "bias must have 12 elements, has 8"),
        ({"norm_bias": torch.randn(12).half()}, "norm_bias must be float32 or bfloat16"),
        ({"act": ""}, "act must be one of"),
    ):
        with pytest.raises(RuntimeError, match=message):
            conv_op.pack(**(good | wrong))


def test_bf16_products_are_refused_where_there_are_none(isa):
    if cpu.multiplies_bf16():
        pytest.skip("this instruction set has them")
    with pytest.raises(RuntimeError, match="bf16 must be False: the instruction set in use multiplies no bfloat16"):
        pack_block(make_block(8), bf16=True)


def test_wrong_input_is_named():
    packed, conv = pack_block(make_block(8)), pack_conv(nn.Conv2d(8, 12, 3, 2, 1))
    x = torch.randn(1, 5, 6, 8)
    for wrong, message in (
        (x[0], r"x must be \(N, H, W, 8\)"),
        (torch.randn(1, 5, 6, 9), r"x must be \(N, H, W, 8\)"),
        (x.half(), "x must be float32 or bfloat16"),
        (x.double(), "x must be float32 or bfloat16"),
        (x.long(), "x must be float"),
    ):
        for run in (
            lambda x: blocks_op.gated_cnn_blocks(x, packed),
            lambda x: conv_op.conv3x3s2(x, conv, 12, torch.float32),
        ):
            with pytest.raises(RuntimeError, match=message):
                run(wrong)
    with pytest.raises(RuntimeError, match="out_channels must be 12, as the packed convolution's; got 13"):
        conv_op.conv3x3s2(x, conv, 13, torch.float32)
    with pytest.raises(RuntimeError, match="dtype must be float32 or bfloat16"):
        conv_op.conv3x3s2(x, conv, 12, torch.float16)


def test_wrong_arguments_of_the_head_are_named():
    x, fc1, fc2 = torch.randn(2, 3, 3, 8), torch.randn(6, 8), torch.randn(4, 6)

    def call(x=x, fc1=fc1, fc2=fc2, norm=None, dtype=torch.float32):
        return head_op(x, norm, None, fc1, None, None, None, fc2, None, 1e-6, 1e-6, True, dtype)

    assert call().shape == (2, 4)
    for wrong, named in (
        ({"x": x[0]}, r"x must be \(N, H, W, 8\)"),
        ({"x": x[..., :7]}, r"x must be \(N, H, W, 8\)"),
        ({"x": x[:, :0]}, "H and W of 1 or more"),
        ({"x": x.double()}, "x must be float32 or bfloat16"),
        ({"fc1": fc1.half()}, "fc1_weight must be float32 or bfloat16"),
        ({"fc1": fc1[0]}, r"fc1_weight must be \(hidden, channels\)"),
        ({"fc2": fc2.t()}, r"fc2_weight must have shape \(outputs, 6\)"),
        ({"fc2": fc2.bfloat16()}, "fc2_weight must have fc1_weight's dtype"),
        ({"norm": torch.ones(9)}, r"norm_weight must have shape \(8,\)"),
        ({"dtype": torch.float16}, "dtype must be float32 or bfloat16"),
    ):
        with pytest.raises(RuntimeError, match=named):
            call(**wrong)


@pytest.mark.parametrize("op", ["block", "convolution", "head"])
def test_opcheck(op):
    x = torch.randn(2, 5, 6, 8)
    arguments = {
        "block": (OPS.gated_cnn_blocks.default, (x, pack_block(make_block(8)))),
        "convolution": (OPS.conv3x3s2.default, (x, pack_conv(nn.Conv2d(8, 12, 3, 2, 1)), 12, torch.bfloat16)),
        "head": (OPS.head.default, (x, torch.ones(8), None, torch.randn(6, 8), torch.randn(6), torch.randn(6), None,
                                    torch.randn(4, 6), None, 1e-6, 1e-6, True, torch.bfloat16)),
    }  # fmt: skip
    torch.library.opcheck(*arguments[op], test_utils=("test_schema", "test_faketensor"))


# --- packed tensors: instruction sets, damage ---

PACKED = {
    "block": (
        blocks_op,
        lambda: pack_block(make_block(20, kernel_size=3)),
        lambda packed: blocks_op.gated_cnn_blocks(X, packed),
        "pack_gated_cnn_block",
    ),
    "convolution": (
        conv_op,
        lambda: pack_conv(enlivened(nn.Conv2d(20, 12, 3, 2, 1)), enlivened(nn.LayerNorm(12)), "silu"),
        lambda packed: conv_op.conv3x3s2(X, packed, 12, torch.float32),
        "pack_conv3x3s2",
    ),
}
X = torch.randn(2, 5, 6, 20, generator=torch.Generator().manual_seed(3))


@NEEDS_TWO
@pytest.mark.parametrize("kind", PACKED)
def test_weights_of_another_instruction_set_are_refused_and_can_be_packed_again(isa, kind, restored):
    op, pack, run, _ = PACKED[kind]
    here = pack()
    expected = run(here)
    assert op.runs(here)
    assert torch.equal(op.repack(here), here)
    for other in ISAS:
        use(other)
        theirs = pack()
        of_theirs = run(theirs)
        use(isa)
        again = op.repack(theirs)
        assert torch.equal(run(again), expected)
        if theirs.shape == here.shape and torch.equal(theirs, here):  # the same format
            continue
        assert not op.runs(theirs)
        with pytest.raises(RuntimeError, match="packed is for another instruction set than the one in use"):
            run(theirs)
        use(other)
        assert torch.equal(run(op.repack(again)), of_theirs)
        use(isa)


@NEEDS_TWO
def test_several_blocks_are_packed_again_at_once(restored):
    use(ISAS[0])
    blocks = [make_block(20), make_block(20, conv_ratio=0.0, act_layer=nn.SiLU), make_block(20, ls_init_value=0.5)]
    packed = blocks_op.join([pack_block(block) for block in blocks])
    use(ISAS[1])
    expected = blocks_op.join([pack_block(block) for block in blocks])
    assert torch.equal(blocks_op.repack(packed), expected)
    assert [sizes[1] for sizes in blocks_op.shapes(expected)] == [20, 20, 20]
    assert blocks_op.shapes(packed) == blocks_op.shapes(expected)


@pytest.mark.parametrize("kind", PACKED)
def test_a_misaligned_tensor_is_read_right(isa, kind):
    op, pack, run, _ = PACKED[kind]
    packed = pack()
    for shift in (1, 8, 24):
        moved = torch.empty(packed.numel() + 128, dtype=torch.uint8)
        start = (-moved.data_ptr()) % 64 + shift
        moved = moved[start : start + packed.numel()].copy_(packed)
        assert torch.equal(run(moved), run(packed))
        assert op.runs(moved)
        assert torch.equal(op.repack(moved), packed)
    apart = torch.stack([packed, packed], dim=1)[:, 0]
    assert torch.equal(run(apart), run(packed))


@pytest.mark.parametrize("kind", PACKED)
def test_what_is_no_packed_tensor_is_refused(kind):
    op, pack, run, maker = PACKED[kind]
    _, pack_other, _, _ = PACKED["convolution" if kind == "block" else "block"]
    packed = pack()
    for call in (run, op.repack):
        for wrong, message in (
            (torch.zeros(4, dtype=torch.uint8), f"packed must come from {maker}"),
            (torch.zeros(4096, dtype=torch.uint8), f"packed must come from {maker}"),
            (pack_other(), f"packed must come from {maker}"),
            (torch.zeros(0, dtype=torch.uint8), "packed must"),
            (packed.view(torch.float32), "packed must be a vector of bytes on the CPU"),
            (packed[None], "packed must be a vector of bytes on the CPU"),
        ):
            with pytest.raises(RuntimeError, match=message):
                call(wrong)


@pytest.mark.parametrize("kind", PACKED)
def test_truncated_weights_are_refused(isa, kind):
    op, pack, run, _ = PACKED[kind]
    packed = pack()
    for count in (1, 8, 63, 64, 127, 128, 192, packed.numel() // 2, packed.numel() - 64, packed.numel() - 1):
        for call in (run, op.runs, op.repack):
            with pytest.raises(RuntimeError, match="packed"):
                call(packed[:count].clone())
    longer = torch.cat([packed, torch.zeros(64, dtype=torch.uint8)])
    for call in (run, op.runs, op.repack):
        with pytest.raises(RuntimeError, match="packed"):
            call(longer)


# The header (csrc/torch/packed.h): 16 numbers of 8 bytes.
FIELDS = [
    "magic",
    "version",
    "op",
    "lanes",
    "parts",
    "step",
    "bytes",
    "compute_dtype",
    "act",
    "eps",
    "size 0",
    "size 1",
]
FIELDS += ["size 2", "size 3", "padding"]
WRONG_VALUES = [
    0,
    1,
    2,
    3,
    5,
    16,
    63,
    64,
    65,
    2**12,
    2**24 - 1,
    2**24,
    2**31,
    2**32,
    2**40 + 4,
    2**62,
    -1,
    -64,
    -(2**63),
]


def refusal_of(call, packed):
    """What it gives, or the sentence of its refusal."""
    try:
        return call(packed)
    except RuntimeError as error:
        return str(error)


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("kind", PACKED)
def test_damaged_headers_do_no_harm(isa, kind, field):
    """Refused, or computed with: no other memory is read. What cannot be right is refused."""
    op, pack, run, _ = PACKED[kind]
    packed = pack()
    at = FIELDS.index(field)
    right = packed.view(torch.int64)[at].item()
    shape, refused = run(packed).shape, 0
    values = [v for v in (*WRONG_VALUES, right - 1, right + 1, right + 64, right - 64, 2 * right) if v != right]
    for value in values:
        damaged = packed.clone()
        damaged.view(torch.int64)[at] = min(max(value, -(2**63)), 2**63 - 1)
        for call in (run, op.runs, op.repack):
            result = refusal_of(call, damaged)
            if isinstance(result, str):
                refused += call is run
                assert any(word in result for word in ("packed", "bf16", "x must be"))
            else:
                assert call is not run or result.shape == shape
    never = {"magic", "version", "op", "lanes", "parts", "step", "bytes"} | ({"size 0"} if kind == "block" else set())
    assert refused == len(values) or field not in never
    assert refused >= 10 or field in ("compute_dtype", "eps", "padding", "size 2", "size 3")


def test_damage_of_a_later_block_is_found(isa):
    one = pack_block(make_block(20))
    packed = blocks_op.join([one, one])
    for name in ("magic", "version", "op", "lanes", "step", "bytes"):
        at = FIELDS.index(name)
        damaged = packed.clone()
        damaged.view(torch.int64)[one.numel() // 8 + at] += 1
        for call in (PACKED["block"][2], blocks_op.repack):
            with pytest.raises(RuntimeError, match="packed"):
                call(damaged)


def test_a_block_of_another_width_cannot_follow():
    packed = blocks_op.join([pack_block(make_block(20)), pack_block(make_block(24))])
    with pytest.raises(RuntimeError, match=r"x must be \(N, H, W, 24\)"):
        blocks_op.gated_cnn_blocks(X, packed)
