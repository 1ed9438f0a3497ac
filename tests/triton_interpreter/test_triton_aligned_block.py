"""A block of odd widths on the Triton kernels: rows of u are padded to whole accesses."""

import copy

import pytest
import torch
from numerics import assert_accurate

from mambaout_kernels import FusedGatedCNNBlock, backends
from mambaout_kernels.benchmarking import error_bounds
from mambaout_kernels.nn import block as block_module


def run(block, x, dy):
    x = x.clone().requires_grad_()
    y = block(x)
    names, parameters = zip(*block.named_parameters(), strict=True)
    gradients = torch.autograd.grad(y, [x, *parameters], dy)
    return {"y": y.detach(), **dict(zip(["x", *names], gradients, strict=True))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_block_of_odd_widths(dtype, monkeypatch):
    block = FusedGatedCNNBlock(13, expansion_ratio=2.5, kernel_size=3)
    with torch.no_grad():
        for p in block.parameters():
            p.normal_(std=0.3)
    block.to(dtype)
    x, dy = torch.randn(2, 3, 4, 13).to(dtype), torch.randn(2, 3, 4, 13).to(dtype)
    widths, op = [], block_module.gated_dwconv
    monkeypatch.setattr(
        block_module, "gated_dwconv", lambda u, weight, *others: widths.append(u.shape[-1]) or op(u, weight, *others)
    )
    with backends.force("triton"):
        found = run(block, x, dy)
    with backends.force("reference"):
        eager = run(block, x, dy)
        exact = run(copy.deepcopy(block).double(), x.double(), dy.double())
    assert widths == [72 if dtype == torch.float32 else 80, 64, 64]
    bounds = error_bounds.of_block(block, x, dy)
    for name, truth in exact.items():
        assert_accurate(found[name], eager[name], truth, bounds[name])
