"""Which candidate tile is fastest on this GPU. Nothing here runs unless it is asked to."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from . import launch, tiles
from .tiles import Row, Tile

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Each passes the audit without spills; a wider or higher tile reads less halo, a smaller one wastes less at the edges.
# By the bits of an element, and whether accesses are 16 bytes wide.
CANDIDATES = {
    (16, True): (
        Tile(8, 32, 1, block_h=7, stages=7),
        Tile(8, 32, 1, block_h=7),
        Tile(16, 32, 2, block_h=7),
        Tile(8, 64, 2, block_h=7),
        Tile(8, 32, 1, block_h=4, stages=4),
        Tile(8, 64, 4, block_h=7),
    ),
    (16, False): (Tile(8, 32, 2, block_h=7), Tile(4, 32, 1, block_h=7), Tile(8, 32, 4, block_h=7)),
    (32, True): (
        Tile(8, 32, 2, block_h=7),
        Tile(8, 32, 2, block_h=7, stages=4),
        Tile(16, 32, 4, block_h=7),
        Tile(16, 16, 2, block_h=7),
        Tile(8, 32, 2, block_h=4),
    ),
    (32, False): (Tile(8, 32, 2, block_h=7), Tile(4, 32, 1, block_h=7), Tile(8, 32, 4, block_h=7)),
}
SHARES = {(16, True): ((8, 32, 4), (4, 64, 4)), (16, False): ((4, 32, 4),), 32: ((4, 32, 4), (8, 16, 4))}


def candidates(kernel: str, bits: int, aligned: bool) -> Iterable[Tile]:
    """Tiles to time."""
    if kernel != "weight_gradient":
        return CANDIDATES[bits, aligned]
    shares = SHARES[(bits, aligned) if bits == 16 else bits]
    return [Tile(*sizes, programs=programs) for sizes in shares for programs in (256, 512, 1024, 2048)]


def _milliseconds(call: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return float(do_bench(call, warmup=10, rep=50, return_mode="median"))


def tune(
    stages: Sequence[tuple[int, int, int, int, str]],
    batch: int,
    dtypes: Sequence[torch.dtype],
    announce: Callable[[str], Any],
) -> tuple[list[Row], list[tuple[str, ...]]]:
    """Rows for this device's architecture, and lines to print. stages: (H, W, hidden, conv channels, act), K = 7.

    A kernel's time is that of the whole forward or backward with only its own tile changed.
    """
    arch = launch.architecture(torch.device("cuda", torch.cuda.current_device()))
    rows: list[Row] = []
    lines: list[tuple[str, ...]] = []
    try:
        for dtype in dtypes:
            for H, W, D, C, act in sorted(stages, key=lambda stage: stage[1]):
                announce(f"{H}x{W}, {D} channels, {dtype}")
                bits = dtype.itemsize * 8
                aligned = D * dtype.itemsize % 16 == 0 and C * dtype.itemsize % 16 == 0
                u, dy = (torch.randn(batch, H, W, width, device="cuda", dtype=dtype) for width in (2 * D, D))
                weight = torch.randn(C, 1, 7, 7, device="cuda", dtype=dtype) / 7
                bias = torch.zeros(C, device="cuda", dtype=dtype)
                forward = functools.partial(launch.forward, u, weight, bias, act)
                backward = functools.partial(launch.backward, dy, u, weight, bias, act)
                for kernel in tiles.KERNELS:
                    call: Callable[[], Any] = forward if kernel == "forward" else backward
                    tiles.use(tuple(rows))
                    before = _milliseconds(call)
                    times = {}
                    for tile in candidates(kernel, bits, aligned):
                        tiles.use((Row(arch, kernel, bits, tile, aligned, W), *rows))
                        times[tile] = _milliseconds(call)
                    best = min(times, key=lambda tile: times[tile])
                    rows.append(Row(arch, kernel, bits, best, aligned, W))
                    lines.append((kernel, str(bits), str(W), str(best), f"{times[best]:.3f}", f"{before:.3f}"))
    finally:
        tiles.use(())
    return rows, lines
