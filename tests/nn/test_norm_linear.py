"""LayerNorm and Linear in one, against the modules themselves."""

import pytest
import torch
from numerics import assert_accurate
from torch import nn

from mambaout_kernels import FusedGatedCNNBlock
from mambaout_kernels.benchmarking import error_bounds
from mambaout_kernels.nn.linear import _recomputes_norm, norm_linear


def modules(bias=True, dtype=torch.float32):
    norm, linear = nn.LayerNorm(12, eps=1e-6, bias=bias), nn.Linear(12, 20, bias=bias)
    with torch.no_grad():
        for p in (*norm.parameters(), *linear.parameters()):
            p.normal_()
    return norm.to(dtype), linear.to(dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_same_as_the_modules(bias, dtype):
    norm, linear = modules(bias, dtype)
    x = torch.randn(2, 3, 4, 12, dtype=dtype, requires_grad=True)
    assert _recomputes_norm(norm, linear, x)
    leaves = [x, *norm.parameters(), *linear.parameters()]
    ours, theirs = norm_linear(norm, linear, x), linear(norm(x))
    dy = torch.randn_like(ours)
    found = [ours, *torch.autograd.grad(ours, leaves, dy)]
    bounds = error_bounds.of_norm_linear(norm, linear, x, dy)
    names = ["y", "x", *(f"{of}.{n}" for of, m in (("norm", norm), ("layer", linear)) for n, _ in m.named_parameters())]
    eager = [theirs, *torch.autograd.grad(theirs, leaves, dy)]
    norm, linear, x, dy = norm.double(), linear.double(), x.detach().double().requires_grad_(), dy.double()
    y = linear(norm(x))
    exact = [y, *torch.autograd.grad(y, [x, *norm.parameters(), *linear.parameters()], dy)]
    assert set(names) == set(bounds)
    for name, *three in zip(names, found, eager, exact, strict=True):
        assert_accurate(*(t.detach() for t in three), bounds[name])


def test_gradcheck_twice():
    norm, linear = modules(dtype=torch.float64)
    x = torch.randn(2, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: norm_linear(norm, linear, x), x)
    assert torch.autograd.gradgradcheck(lambda x: norm_linear(norm, linear, x), x)


def test_keeps_the_input_not_the_normed():
    norm, linear = modules()
    x = torch.randn(5, 12, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        norm_linear(norm, linear, x)
    of_full_size = [t for t in kept if t.numel() == x.numel()]
    assert [t.data_ptr() for t in of_full_size] == [x.data_ptr()]


def test_only_the_gradients_asked_for():
    norm, linear = modules()
    norm.requires_grad_(False)
    x = torch.randn(5, 12)
    norm_linear(norm, linear, x).sum().backward()
    assert norm.weight.grad is None
    assert x.grad is None
    linear_too = nn.Linear(12, 20)
    linear_too.load_state_dict(linear.state_dict())
    linear_too(norm(x)).sum().backward()
    torch.testing.assert_close(linear.weight.grad, linear_too.weight.grad)


def test_does_not_apply_where_calling_the_modules_does_more():
    norm, linear = modules()
    x = torch.randn(5, 12)
    assert _recomputes_norm(norm, linear, x)
    with torch.no_grad():
        assert not _recomputes_norm(norm, linear, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not _recomputes_norm(norm, linear, x)
    assert not _recomputes_norm(nn.Identity(), linear, x)
    assert not _recomputes_norm(norm, linear, x.bfloat16())
    assert not _recomputes_norm(nn.LayerNorm(12, elementwise_affine=False), linear, x)
    handle = linear.register_forward_hook(lambda *_: None)
    assert not _recomputes_norm(norm, linear, x)
    handle.remove()
    assert _recomputes_norm(norm, linear, x)


def test_block_keeps_less_than_six_tenths_of_eager():
    from mambaout_kernels import backends

    block, x = FusedGatedCNNBlock(24), torch.randn(1, 8, 8, 24, requires_grad=True)
    own = {t.untyped_storage().data_ptr() for t in (x, *block.parameters())}

    def kept():
        sizes = {}

        def pack(t):
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = block(x)
        del y
        return sum(size for pointer, size in sizes.items() if pointer not in own)

    ours = kept()
    with backends.force("reference"):
        assert ours <= 0.6 * kept()


def test_timms_layer_norm_is_one():
    """So that a patched timm model keeps as little; not with its fast norm, nor any class of that name."""
    layers = pytest.importorskip("timm.layers")
    norm, linear = layers.LayerNorm(12), nn.Linear(12, 20)
    x = torch.randn(3, 12, requires_grad=True)
    assert _recomputes_norm(norm, linear, x)
    torch.testing.assert_close(norm_linear(norm, linear, x), linear(norm(x)))
    norm._fast_norm = True
    assert not _recomputes_norm(norm, linear, x)
    assert not _recomputes_norm(layers.LayerNormFp32(12), linear, x)
    assert not _recomputes_norm(type("LayerNorm", (nn.LayerNorm,), {})(12), linear, x)
