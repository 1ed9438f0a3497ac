"""Blocks in inference on a GPU (ops/split_block.py), and norms with their gradients (ops/conv_norm.py): right beside
eager and fp64, in graphs and under compile."""

import copy
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu_behaviour import Found, findings
from torch import Tensor, nn

from mambaout_kernels import backends, optimize_for_inference
from mambaout_kernels.benchmarking import accuracy, error_bounds
from mambaout_kernels.benchmarking.inputs import enlivened
from mambaout_kernels.inference.split_blocks import SplitBlock
from mambaout_kernels.models import create_model
from mambaout_kernels.nn.block import FusedGatedCNNBlock
from mambaout_kernels.ops.conv_norm import layer_norm_act
from mambaout_kernels.reference import activation

# Tiny's and base's widths, femto's, and one of no whole parts; then pixels of one program and less, and of many.
DIMS = (96, 192, 384, 576, 128, 256, 512, 768, 48, 288, 40)
MAPS = ((1, 1, 1), (2, 7, 7), (3, 14, 13))
OPTIONS: tuple[dict[str, Any], ...] = ({}, {"ls_init_value": 0.5, "act_layer": nn.SiLU, "conv_ratio": 1.25})


def examine(device: str, dtype: torch.dtype) -> Found:
    """Every finding a note or a failure; one that raises does not end the others. In bf16, whole models, too."""
    checks: list[tuple[str, Callable[[], str | None]]] = []
    if dtype == torch.bfloat16:
        checks.append(("a map of 56 x 56, batch 64", partial(_large, device)))
        checks.append(("a whole model", partial(_model, device)))
        if device == "cuda":
            checks.append(("CUDA graphs, shape after shape", _graphs))
            checks.append(("compiled", _compiled))
    if dtype == torch.float32:
        checks.append(("blocks with products in TF32", partial(_tf32, device)))
    for dim in DIMS:
        name = str(dtype).removeprefix("torch.")
        checks.append((f"blocks of {dim} channels, {name}", partial(_block, dim, dtype, device)))
        checks.append((f"norms of {dim} channels and their gradients, {name}", partial(_norm, dim, dtype, device)))
    yield from findings("split block", checks)


def _compared(block: Any, x: Tensor) -> list[accuracy.Comparison]:
    with torch.no_grad():
        actual = SplitBlock(block, x.dtype)(x)
        with backends.force("reference"):
            eager, exact = block(x), copy.deepcopy(block).double()(x.double())
        return [accuracy.compare("y", actual, eager, exact, error_bounds.of_block(block, x)["y"])]


def _wrong(found: list[accuracy.Comparison]) -> str | None:
    return "; ".join(str(one) for one in found if not one.passed) or None


def _input(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)


def _block(dim: int, dtype: torch.dtype, device: str) -> str | None:
    """float32 at full precision: products of TF32 are beyond the bounds of float32."""
    found = []
    for options in OPTIONS:
        block = enlivened(FusedGatedCNNBlock(dim, **options)).to(device, dtype).eval()
        for size in MAPS:
            found += _compared(block, _input((*size, dim), dtype, device))
    return _wrong(found)


def _norm(dim: int, dtype: torch.dtype, device: str) -> str | None:
    """Maps of one program, of several, and of several turns of each."""
    found = []
    for size, act in itertools.product((*MAPS, (16, 56, 56)), ("identity", "gelu")):
        x, dy = (_input((*size, dim), dtype, device) * scale for scale in (1, 0.5))
        weight, bias = (_input((dim,), dtype, device) + offset for offset in (1, 0))

        def step(own: bool, *tensors: Tensor, act: str = act) -> dict[str, Tensor]:
            leaves = [t.detach().requires_grad_() for t in tensors[:3]]
            given = (leaves[0], (dim,), *leaves[1:], 1e-6)
            y = (
                layer_norm_act(leaves[0], None, *leaves[1:], 1e-6, act)
                if own
                else activation(F.layer_norm(*given), act)
            )
            gradients = torch.autograd.grad(y, leaves, tensors[3])
            return dict(zip(("y", "x", "weight", "bias"), (y.detach(), *gradients), strict=True))

        given = (x, weight, bias, dy)
        actual, eager, exact = step(True, *given), step(False, *given), step(False, *(t.double() for t in given))
        found += [accuracy.compare(name, actual[name], eager[name], exact[name]) for name in actual]
    return _wrong(found)


def _tf32(device: str) -> str | None:
    """Factors of TF32 are off by 2^-12 each in the mean where they are rounded, those of a product by 2^-11.5, of three
    in a row by 2^-10.7; where they are cut, products shrink by 2^-10.5 each, the branch by 2^-9."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        for dim in DIMS:
            block = enlivened(FusedGatedCNNBlock(dim)).to(device).eval()
            x = _input((2, 14, 13, dim), torch.float32, device)
            with torch.no_grad(), backends.force("reference"):
                exact = copy.deepcopy(block).double()(x.double())
            with torch.no_grad():
                error = float((SplitBlock(block, x.dtype)(x) - exact).norm() / (exact - x).norm())
            if not error <= 2**-10:
                return f"{dim} channels: error {error:.2e} of the branch"
    finally:
        torch.set_float32_matmul_precision(before)
    return None


def _large(device: str) -> str | None:
    """Its last image against the image alone, which takes other programs."""
    block = SplitBlock(enlivened(FusedGatedCNNBlock(96)).to(device, torch.bfloat16).eval(), torch.bfloat16)
    x = _input((64, 56, 56, 96), torch.bfloat16, device)
    with torch.no_grad():
        return None if torch.equal(block(x)[-1:], block(x[-1:])) else "the last image differs"


def _images(batch: int, device: str) -> Tensor:
    return _input((batch, 3, 64, 64), torch.bfloat16, device)


def _model(device: str) -> str | None:
    model = enlivened(create_model("mambaout_femto")).to(device, torch.bfloat16).eval()
    images = _images(8, device)
    with torch.no_grad():
        actual = optimize_for_inference(model)(images)
        with backends.force("reference"):
            eager, exact = model(images), copy.deepcopy(model).double()(images.double())
    return _wrong([accuracy.compare("logits", actual, eager, exact)])


def _graphs() -> str | None:
    model = enlivened(create_model("mambaout_femto")).to("cuda", torch.bfloat16).eval()
    plain, graphed = optimize_for_inference(model), optimize_for_inference(model, cuda_graphs=True)
    for batch in (1, 4, 1, 4):
        images = torch.randn(batch, 3, 64, 64, device="cuda", dtype=torch.bfloat16)
        expected = plain(images)
        if not torch.equal(expected, graphed(images)):
            return f"other logits at batch {batch}"
        torch._C._cuda_clearCublasWorkspaces()  # as torch.compile's CUDA graphs do
        torch.cuda.empty_cache()
        others = [torch.full((1 << 23,), float("nan"), device="cuda") for _ in range(8)]
        if not torch.equal(expected, graphed(images)) or not all(bool(t.isnan().all()) for t in others):
            return f"a graph of batch {batch} worked on memory that was given back"
    return None


def _compiled() -> str | None:
    fast = optimize_for_inference(enlivened(create_model("mambaout_femto")).to("cuda", torch.bfloat16).eval())
    images = _images(2, "cuda")
    compiled = torch.compile(fast, fullgraph=True)
    expected, actual = fast(images).float(), compiled(images).float()
    off = float((actual - expected).abs().max() / expected.abs().max())
    return None if off < 0.05 else f"{off:.3f} of the largest logit off"
