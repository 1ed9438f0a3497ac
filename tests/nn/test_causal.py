"""The causal option: nothing after a pixel reaches it, on every path that the block has."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from mambaout_kernels import backends
from mambaout_kernels.models import create_model
from mambaout_kernels.nn.block import FusedGatedCNNBlock
from mambaout_kernels.nn.causal import CausalConv2d, causal_taps

H, W = 9, 8


def make(**options):
    torch.manual_seed(0)
    block = FusedGatedCNNBlock(16, causal=True, **options)
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(0.5 * torch.randn_like(p))
    return block


def test_taps():
    assert causal_taps(3).tolist() == [[True, True, True], [True, True, False], [False, False, False]]
    assert causal_taps(7).sum() == 25
    assert causal_taps(1).all()


def test_is_pytorchs_with_the_other_taps_at_zero():
    conv, plain = CausalConv2d(4, 4, 5, padding=2, groups=4), nn.Conv2d(4, 4, 5, padding=2, groups=4)
    with torch.no_grad():
        plain.weight.copy_(conv.weight * causal_taps(5))
        plain.bias.copy_(conv.bias)
    x = torch.randn(2, 4, 6, 7)
    assert torch.equal(conv(x), plain(x))
    assert list(conv.state_dict()) == list(plain.state_dict())
    conv(x).sum().backward()
    assert not conv.weight.grad[:, :, ~causal_taps(5)].any()
    assert conv.weight.grad[:, :, causal_taps(5)].all()


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_pixel_sees_a_later_one(dtype, grad, backend):
    block = make().to(dtype).train(grad)
    assert block.unfused_reason() is None
    x = torch.randn(1, H, W, 16).to(dtype)
    position = 4 * W + 3  # raster order
    changed = x.clone()
    changed.view(-1, 16)[position] += 3
    with torch.set_grad_enabled(grad), backends.force(backend) if backend else nullcontext():
        y, z = block(x), block(changed)
    moved = (y != z).any(dim=-1).flatten()
    assert not moved[:position].any()
    assert moved[position]
    assert moved[position + 1 :].any()


def test_fused_equals_composed():
    block, results = make(), []
    x = torch.randn(2, H, W, 16)
    for backend in (None, "reference"):
        with backends.force(backend) if backend else nullcontext():
            y = block(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(block.parameters()))])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_models():
    model = create_model("test_mambaout", causal=True, num_classes=2)
    assert sum(isinstance(m, CausalConv2d) for m in model.modules()) == 6
    model.load_state_dict(create_model("test_mambaout", num_classes=2).state_dict(), strict=True)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 2)
