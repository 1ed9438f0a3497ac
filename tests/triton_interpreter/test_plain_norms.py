"""Norms of the drop-in blocks on a GPU: by the kernel, where that computes the same."""

import copy

import pytest
import torch
from numerics import assert_accurate, assert_model_accurate
from torch import nn

from mambaout_kernels import backends
from mambaout_kernels.backends.triton_kernels import block_launch
from mambaout_kernels.benchmarking.inputs import enlivened
from mambaout_kernels.nn import FusedGatedCNNBlock
from mambaout_kernels.nn.downsample import Downsample, Stem
from mambaout_kernels.nn.linear import normed


@pytest.fixture(autouse=True)
def _triton():
    with backends.force("triton"):
        yield


@pytest.fixture
def launched(monkeypatch):
    calls, run = [], block_launch.layer_norm
    monkeypatch.setattr(block_launch, "layer_norm", lambda *a, **k: calls.append(a[0].shape) or run(*a, **k))
    return calls


def numbers(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def make(dtype, **options):
    return enlivened(FusedGatedCNNBlock(24, kernel_size=3, **options)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_inference(dtype, launched):
    block, x = make(dtype).eval(), numbers(2, 4, 5, 24, dtype=dtype)
    with torch.no_grad():
        ours = block(x)
        assert launched == [x.shape]
        with backends.force("reference"):
            assert_accurate(ours, block(x), copy.deepcopy(block).double()(x.double()))
    assert len(launched) == 1


def test_stem_and_downsampling(launched):
    x = numbers(2, 3, 12, 20, dtype=torch.float16)
    for module in (Stem(3, 24, True, nn.LayerNorm, nn.GELU), Downsample(24, 32, False, nn.LayerNorm),
                   Downsample(32, 16, True, nn.LayerNorm)):  # fmt: skip
        module = enlivened(module).half().eval()
        with torch.no_grad():
            ours = module(x)
            with backends.force("reference"):
                eager, exact = module(x), copy.deepcopy(module).double()(x.double())
        assert_accurate(ours, eager, exact)
        x = ours
    assert [shape[-1] for shape in launched] == [12, 24, 32, 32]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training(dtype, recompute, launched):
    block = make(dtype, recompute=recompute)
    dy, results = numbers(2, 4, 5, 24, dtype=dtype), []
    for name, module, precision in (
        ("triton", block, dtype),
        ("reference", copy.deepcopy(block), dtype),
        ("reference", copy.deepcopy(block).double(), torch.float64),
    ):
        x = numbers(2, 4, 5, 24, dtype=dtype).to(precision).requires_grad_()
        with backends.force(name):
            y = module(x)
            wanted = {"x": x, **dict(module.named_parameters())}
            gradients = torch.autograd.grad(y, list(wanted.values()), dy.to(precision))
        results.append({"y": y.detach(), **dict(zip(wanted, gradients, strict=True))})
    assert len(launched) == (2 if recompute else 1)
    assert_model_accurate(*results)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["block", "stem", "norm first"])
def test_training_under_autocast(kind, stored, launched):
    """Norms of float32 as PyTorch's autocast has them, but rounded once where a product casts them."""
    module, shape = {
        "block": (lambda: FusedGatedCNNBlock(24, kernel_size=3), (2, 4, 5, 24)),
        "stem": (lambda: Stem(3, 16, True, nn.LayerNorm, nn.GELU), (2, 3, 12, 12)),
        "norm first": (lambda: Downsample(24, 16, True, nn.LayerNorm), (2, 4, 4, 24)),
    }[kind]
    module, results = enlivened(module()).to(stored), []
    for name, used, precision in (
        ("triton", module, stored),
        ("reference", copy.deepcopy(module), stored),
        ("reference", copy.deepcopy(module).double(), torch.float64),
    ):
        x = numbers(*shape, dtype=stored).to(precision).requires_grad_()
        with backends.force(name), torch.autocast("cpu", torch.float16, enabled=precision != torch.float64):
            y = used(x)
        wanted = {"x": x, **dict(used.named_parameters())}
        dy = numbers(*y.shape, dtype=torch.float16).to(y.dtype)
        gradients = torch.autograd.grad(y, list(wanted.values()), dy)
        y = y.float() if kind == "stem" else y  # which autocast on a GPU returns, and on the CPU does not
        results.append({"y": y.detach(), **dict(zip(wanted, gradients, strict=True))})
    assert len(launched) == {"block": 1, "stem": 2, "norm first": 1}[kind]
    assert_model_accurate(*results)


def test_of_no_pixel_and_once_more():
    block, x = make(torch.float32), numbers(0, 4, 5, 24).requires_grad_()
    y = block(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 4, 5, 24)
    assert not block.fc1.weight.grad.any()


OTHERS = {
    "RMSNorm": lambda: nn.RMSNorm(24), "no affine": lambda: nn.LayerNorm(24, elementwise_affine=False),
    "no bias": lambda: nn.LayerNorm(24, bias=False), "another dtype": lambda: nn.LayerNorm(24).double(),
    "two dimensions": lambda: nn.LayerNorm((5, 24)),
    "hooked": lambda: [n := nn.LayerNorm(24), n.register_forward_hook(lambda *_: None)][0],
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_what_stays_pytorchs(kind, launched):
    norm = OTHERS[kind]()
    x = numbers(2, 4, 5, 24, dtype=torch.float64 if kind == "another dtype" else torch.float32)
    with torch.no_grad():
        assert torch.equal(normed(norm, x), norm(x))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(normed(norm, x), norm(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(normed(norm, x), norm(x))
    assert launched == []


def test_a_norm_of_float32_beside_16_bits_is_pytorchs_error_outside_autocast(launched):
    with pytest.raises(RuntimeError, match=r"mixed dtype|expected scalar type|Expected"):
        normed(nn.LayerNorm(24), numbers(2, 24, dtype=torch.float64))
    assert launched == []


def test_a_norm_over_other_features_than_its_weights_is_pytorchs_error(launched):
    norm = nn.LayerNorm(12)
    norm.weight, norm.bias = nn.Parameter(torch.ones(24)), nn.Parameter(torch.zeros(24))
    with torch.no_grad(), pytest.raises(RuntimeError, match="normalized_shape"):
        normed(norm, numbers(2, 24))
    assert launched == []


def test_contexts_in_which_it_stays_pytorchs(launched):
    norm, x = nn.LayerNorm(24), numbers(2, 24)
    with torch.no_grad():
        with backends.force("reference"):
            normed(norm, x)
        with backends.force("cpu"):
            normed(norm, x)
        torch.func.vmap(lambda row: normed(norm, row))(x)
        assert launched == []
        normed(norm, x)
        torch.compile(lambda t: normed(norm, t), backend="eager", fullgraph=True)(x)
    normed(norm, x)  # with gradients
    assert launched == 3 * [x.shape]
