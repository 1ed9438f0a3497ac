"""The stem and what stands between stages on a GPU, in the interpreter: convolutions with bias, norm and activation."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_accurate
from torch import nn

import mambaout_kernels as mk
from mambaout_kernels import backends, reference
from mambaout_kernels.benchmarking.inputs import enlivened
from mambaout_kernels.inference.normed_convs import NormedConv, NormedDownsample, NormedStem
from mambaout_kernels.nn.downsample import Downsample, Stem
from mambaout_kernels.ops.conv_norm import conv3x3s2_norm_act, layer_norm_act, pack_conv

LOW = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *LOW]
LAYER_NORM = partial(nn.LayerNorm, eps=1e-6)


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


def numbers(*shape, dtype=torch.float32, seed=5):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# --- layer_norm_act ---


def normed(x, x_bias, weight, bias, eps, act):
    x = x if x_bias is None else x + x_bias
    return reference.activation(F.layer_norm(x, x.shape[-1:], weight, bias, eps), act)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 48), (70, 1), (2, 3, 4, 96), (5, 10), (7, 300), (0, 16), (24,)], ids=str)
def test_layer_norm_against_fp64(shape, dtype):
    dim = shape[-1]
    for x_bias, act in ((None, "identity"), (numbers(dim, dtype=dtype, seed=9), "gelu")):
        given = (numbers(*shape, dtype=dtype), x_bias, numbers(dim, dtype=dtype), numbers(dim, dtype=dtype, seed=8))
        exact = normed(*(None if t is None else t.double() for t in given), 1e-6, act)
        ours = layer_norm_act(*given, 1e-6, act)
        assert ours.is_contiguous()
        assert_accurate(ours, normed(*given, 1e-6, act), exact)


@pytest.mark.parametrize("act", reference.ACTIVATIONS)
def test_layer_norm_of_any_strides_and_activation(act):
    x, one = numbers(2, 12, 3, 5).permute(0, 2, 3, 1), torch.ones(12)
    expected = normed(x, None, one, one, 1e-5, act)
    torch.testing.assert_close(layer_norm_act(x, None, one, one, 1e-5, act), expected, rtol=1e-5, atol=1e-5)


# --- conv3x3s2_norm_act ---


def convolved(x, weight, bias, norm_weight, norm_bias, eps, act):
    y = F.conv2d(x, weight, bias, 2, 1).permute(0, 2, 3, 1)
    return reference.activation(F.layer_norm(y, y.shape[-1:], norm_weight, norm_bias, eps), act)


CONVOLUTIONS = {  # N, C, H, W, out channels, NHWC
    "images": (2, 3, 19, 22, 48, False), "images, channels last": (1, 3, 8, 9, 24, True),
    "one channel": (1, 1, 7, 7, 16, False), "wide, NHWC": (1, 48, 13, 10, 96, True),
    "wide, NCHW": (1, 16, 6, 7, 32, False), "odd channels": (2, 10, 5, 5, 20, True),
    "rows of several programs": (5, 4, 24, 20, 8, False), "one pixel": (1, 3, 1, 1, 10, False),
    "one row": (1, 3, 1, 9, 10, False), "no image": (0, 3, 8, 8, 16, False),
}  # fmt: skip


def conv_inputs(name, dtype):
    N, C, H, W, dim, nhwc = CONVOLUTIONS[name]
    x = numbers(N, C, H, W, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last) if nhwc else x
    weight = numbers(dim, C, 3, 3, dtype=dtype, seed=6) / 3
    return x, weight, *(numbers(dim, dtype=dtype, seed=s) for s in (7, 8, 9))


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_against_fp64(name, dtype):
    given = conv_inputs(name, dtype)
    x, weight, *rest = given
    for act in ("gelu", "identity"):
        exact = convolved(*(t.double() for t in given), 1e-6, act)
        ours = conv3x3s2_norm_act(x, pack_conv(weight), *rest, 1e-6, act)
        assert ours.is_contiguous()
        assert_accurate(ours, convolved(*given, 1e-6, act), exact)


def test_convolution_of_any_strides_gives_the_same_bits():
    x, weight, *rest = conv_inputs("images", torch.float16)
    packed = pack_conv(weight)
    expected = conv3x3s2_norm_act(x, packed, *rest, 1e-6, "gelu")
    wide = numbers(2, 5, 40, 50, dtype=torch.float16)
    wide[:, 1:4, ::2, ::2][:, :, :19, :22] = x
    for same in (wide[:, 1:4, :38:2, :44:2], x.contiguous(memory_format=torch.channels_last)):
        assert torch.equal(conv3x3s2_norm_act(same, packed, *rest, 1e-6, "gelu"), expected)


@pytest.mark.parametrize("name", ["images", "wide, NHWC", "odd channels"])
def test_nothing_beyond_a_tensor_is_read(name):
    x, weight, *rest = conv_inputs(name, torch.float16)
    tensors = [x, pack_conv(weight), *rest]
    expected = conv3x3s2_norm_act(*tensors, 1e-6, "gelu")

    def among_nan(t):
        around = t.new_full((t.numel() + 8192,), float("nan"))
        inner = around[4096 : 4096 + t.numel()].as_strided(t.shape, t.stride())
        return inner.copy_(t)

    assert torch.equal(conv3x3s2_norm_act(*map(among_nan, tensors), 1e-6, "gelu"), expected)


@pytest.mark.parametrize("name", ["images", "odd channels"])
def test_a_nan_reaches_what_sees_it(name):
    """Not what is multiplied by the zeros behind the last tap."""
    x, weight, *rest = conv_inputs(name, torch.float16)
    for h, w in ((0, 0), (3, 4), (4, 4)):
        poisoned = x.clone()
        poisoned[0, :, h, w] = float("nan")
        ours = conv3x3s2_norm_act(poisoned, pack_conv(weight), *rest, 1e-6, "gelu")
        assert torch.equal(ours.isnan(), convolved(poisoned, weight, *rest, 1e-6, "gelu").isnan())


# --- the modules ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mid_norm", [True, False], ids=["mid norm", "no mid norm"])
def test_stem(dtype, mid_norm):
    stem = enlivened(Stem(3, 24, mid_norm, LAYER_NORM, nn.GELU)).to(dtype).eval()
    x = numbers(2, 3, 13, 18, dtype=dtype)
    ours = NormedStem(stem)(x)
    assert ours.is_contiguous()
    assert_accurate(ours, stem(x), copy.deepcopy(stem).double()(x.double()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_first", [True, False], ids=["norm first", "norm last"])
@pytest.mark.parametrize("dim", [24, 136], ids=str)
def test_downsample(dtype, norm_first, dim):
    module = enlivened(Downsample(12, dim, norm_first, LAYER_NORM)).to(dtype).eval()
    x = numbers(2, 5, 6, 12, dtype=dtype)
    fast = NormedDownsample(module.conv, module.norm, norm_first)
    assert fast.conv.own == (dtype != torch.float32 and dim <= 128 and not norm_first)
    assert_accurate(fast(x), module(x), copy.deepcopy(module).double()(x.double()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_parameters_that_are_not_there(dtype):
    conv = nn.Conv2d(3, 16, 3, 2, 1, bias=False).to(dtype)
    fast = NormedConv(conv, nn.LayerNorm(16, elementwise_affine=False), nn.SiLU())
    x = numbers(1, 3, 9, 8, dtype=dtype)
    y = conv(x).permute(0, 2, 3, 1)
    exact = F.silu(F.layer_norm(conv.double()(x.double()).permute(0, 2, 3, 1), (16,)))
    assert_accurate(fast(x), F.silu(F.layer_norm(y, (16,))), exact)


def test_a_model(tmp_path):
    model = enlivened(mk.MambaOut(depths=(1, 1), dims=(16, 24), num_classes=10, kernel_size=3)).half().eval()
    with backends.force("triton"):
        fast = mk.optimize_for_inference(model)
    assert [part.kind for part in fast.report() if part.fused] == ["stem", "downsample", "blocks", "blocks"]
    images = numbers(2, 3, 24, 32, dtype=torch.float16)
    with backends.force("reference"):
        eager, exact = model(images), copy.deepcopy(model).double()(images.double())
    assert_accurate(fast(images), eager, exact)
    with pytest.raises(RuntimeError, match="files are for the CPU"):
        fast.save(tmp_path / "model.safetensors")


def test_norms_too_wide_for_one_program_stay():
    model = mk.MambaOut(depths=(1, 1), dims=(16, 1032), num_classes=10, kernel_size=3).half().eval()
    with backends.force("triton"):
        (reason,) = [p.reason for p in mk.optimize_for_inference(model).report() if p.kind == "downsample"]
    assert reason == "conv has 1032 channels, above 1024"


BAD = {
    "dim": (lambda t: (t[0].flatten(), *t[1:]), ValueError, r"x must be \(N, C, H, W\)"),
    "no pixel": (lambda t: (t[0][:, :, :0], *t[1:]), ValueError, r"x must be \(N, C, H, W\)"),
    "dtype": (lambda t: (t[0].double(), *t[1:]), TypeError, "x must be bfloat16 or float16; got torch.float64"),
    "weight": (lambda t: (t[0], t[1][1:], *t[2:]), ValueError, r"weight must be \(9 \* 3, dim\)"),
    "weight dtype": (lambda t: (t[0], t[1].float(), *t[2:]), ValueError, "weight must be .* torch.float32"),
    "strides": (lambda t: (t[0], t[1].t().contiguous().t(), *t[2:]), ValueError, "weight must be contiguous"),
    "bias": (lambda t: (*t[:2], t[2][1:], *t[3:]), ValueError, r"bias must have shape \(48,\); got \(47,\)"),
    "norm": (lambda t: (*t[:3], t[3].float(), t[4]), TypeError, "norm_weight must be torch.float16"),
    "slice": (lambda t: (*t[:4], torch.cat((t[4], t[4]))[::2]), ValueError, "norm_bias must be contiguous"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name(name):
    x, weight, *rest = conv_inputs("images", torch.float16)
    change, error, message = BAD[name]
    with pytest.raises(error, match=message):
        conv3x3s2_norm_act(*change((x, pack_conv(weight), *rest)), 1e-6, "gelu")


@pytest.mark.parametrize(
    ("x", "bias", "act", "error", "message"),
    [
        (torch.zeros(2, 1025), torch.zeros(1025), "gelu", ValueError, "dim 1 to 1024"),
        (torch.zeros(()), torch.zeros(1), "gelu", ValueError, "dim 1 to 1024"),
        (torch.zeros(2, 4).double(), torch.zeros(4), "gelu", TypeError, "x must be float32"),
        (torch.zeros(2, 4), torch.zeros(3), "gelu", ValueError, r"weight must have shape \(4,\)"),
        (torch.zeros(2, 4), torch.zeros(4), "relu", ValueError, "act must be one of gelu"),
    ],
    ids=["wide", "scalar", "dtype", "shape", "act"],
)
def test_bad_input_of_the_norm(x, bias, act, error, message):
    with pytest.raises(error, match=message):
        layer_norm_act(x, None, bias, bias, 1e-6, act)
