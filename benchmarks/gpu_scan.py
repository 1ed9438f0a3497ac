"""On a GPU: the selective scan beside fp64, and timed, with mamba_ssm's kernel beside it; the token mixers."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mambaout_kernels.benchmarking import accuracy
from mambaout_kernels.benchmarking.timing import Contender, by_cuda_events, by_host, interleave
from mambaout_kernels.comparators import mamba_ssm, reference, scan_orders, selective_scan, sweep
from mambaout_kernels.comparators.mixers import MIXERS

Found = Iterator[tuple[str, dict[str, Any]]]
NAMES = ("y", "dx", "ddelta", "dA", "dB", "dC", "dskip", "ddelta_bias")
# N, H, W, D, S: one chunk and several, widths of the state, a remainder of channels
CHECKED = ((2, 7, 9, 96, 16), (1, 16, 16, 70, 3), (40, 4, 8, 192, 1), (1, 5, 13, 33, 20))
VMAMBA_STAGE1 = (128, 56, 56, 192)


def inputs(
    N: int, H: int, W: int, D: int, S: int, dtype: torch.dtype, device: str, shared: bool
) -> tuple[list[Tensor], Tensor, Tensor]:
    """What a cross-scan takes, and a dy."""
    order = scan_orders.cross(H, W).to(device)
    G, L = order.shape
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    A = -(torch.arange(1, S + 1, device=device) * (0.5 + normal(G, D, 1).sigmoid()))
    x, delta = normal(N, 1 if shared else G, L, D), normal(N, G, L, D) - 2
    tokens = [t.to(dtype) for t in (x, delta, normal(N, G, L, S), normal(N, G, L, S))]
    return [tokens[0], tokens[1], A, *tokens[2:], normal(G, D), normal(G, D)], order, torch.randn_like(tokens[0])


def check(device: str, dtype: torch.dtype) -> Found:
    """Forward and gradients: twice eager's mean error at most, and one rounding."""
    for N, H, W, D, S in CHECKED:
        for shared in (True, False):
            arguments, order, dy = inputs(N, H, W, D, S, dtype, device, shared)
            runs_on = selective_scan.chosen(arguments[0])
            if device == "cuda" and runs_on != "triton":
                yield "fail", {"text": f"the scan runs on {runs_on}, not on Triton"}
                return
            found = [_all(selective_scan.selective_scan, arguments, order, dy) for _ in range(2)]
            eager = _all(reference.selective_scan, arguments, order, dy)
            exact = _all(reference.selective_scan, [t.double() for t in arguments], order, dy)
            compared = accuracy.compare_all(found[0], eager, exact)
            label = f"scan {dtype}, {N}x{H}x{W}x{D}, {S} states, {'shared' if shared else 'own'} x"
            for comparison in compared:
                if not comparison.passed:
                    yield "fail", {"text": f"{label}: {comparison}"}
            if not all(torch.equal(found[0][name], found[1][name]) for name in NAMES):
                yield "fail", {"text": f"{label}: other bits at the second run"}
            worst = max(comparison.excess for comparison in compared)
            yield "note", {"text": f"{label}: the worst of 8 results at {worst:.2f} of what is allowed"}


def _all(function: Any, arguments: list[Tensor], order: Tensor, dy: Tensor) -> dict[str, Tensor]:
    leaves = [t.detach().requires_grad_() for t in arguments]
    y = function(*leaves, order)
    return dict(zip(NAMES, (y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))), strict=True))


def times(device: str, dtype: torch.dtype, dry: bool) -> Found:
    """VMamba-T's first stage, forward and backward; mamba_ssm's kernel forward beside it, where it is installed."""
    N, H, W, D = (1, 7, 7, 32) if dry else VMAMBA_STAGE1
    backward = torch.ops.mambaout_kernels.selective_scan_backward
    for S in (16, 1):
        arguments, order, dy = inputs(N, H, W, D, S, dtype, device, True)
        contenders = [
            Contender("forward", lambda _, a=arguments, o=order: selective_scan.selective_scan(*a, o)),
            Contender("backward", lambda _, a=arguments, o=order, g=dy: backward(g, *a, o)),
        ]
        if mamba_ssm.unavailable() is None:
            contenders.append(
                Contender("forward by mamba_ssm", lambda _, a=arguments, o=order: mamba_ssm.selective_scan(*a, o))
            )
        with torch.no_grad():
            stopwatch = by_host() if device == "cpu" else by_cuda_events()
            timings = interleave(contenders, 0.1 if dry else 5.0, stopwatch=stopwatch)
        for name, timing in timings.items():
            text = f"scan {name}, {dtype}, {N}x{H}x{W}x{D}, {S} states: {timing.minimum * 1e3:.3f} / "
            yield "note", {"text": text + f"{timing.median * 1e3:.3f} ms, minimum / median"}
    if (reason := mamba_ssm.unavailable()) is not None:
        yield "left_out", {"text": f"mamba_ssm beside the scan: {reason}"}


def mixers(device: str, dtype: str, dry: bool) -> Found:
    """One layer of each over the tokens, as `mambaout-kernels mixers` times them, and where attention is slower."""
    names = [name for name, mixer in MIXERS.items() if mixer.unavailable(device) is None]
    dims, lengths, batch = ([32], [64, 256], 1) if dry else ([96, 192, 384], [196, 784, 3136, 16384], 16)
    setting = sweep.Setting(batch, dtype, "fwd", device)
    rows: list[sweep.Row] = []
    for name in names:
        sweep.check(name, dims[0], setting)
    for found in sweep.sweep(names, dims, lengths, setting, 0.05 if dry else 2.0, 10.0, lambda step: None):
        rows += found
        for row in found:
            took = row.left_out or f"{(row.median_s or 0) * 1e3:.3f} ms, {(row.peak_bytes or 0) / 1e6:.1f} MB alive"
            yield "note", {"text": f"mixer {row.mixer}, {dtype}, D = {row.dim}, {row.tokens} tokens: {took}"}
    for dim in dims:
        own = {name: [row for row in rows if row.dim == dim and row.mixer == name] for name in names}
        crossed = {name: sweep.crossing(own["attention"], own[name]) for name in names if name != "attention"}
        said = ", ".join(f"{name} {tokens:.0f}" for name, tokens in crossed.items() if tokens is not None)
        yield "note", {"text": f"attention is slower from so many tokens on, D = {dim}: {said}"}


def examine(device: str, dtype: torch.dtype, dry: bool) -> Found:
    yield from check(device, dtype)
    yield from times(device, dtype, dry)
