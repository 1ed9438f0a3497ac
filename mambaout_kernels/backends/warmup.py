"""Before the first batch: compile a model's Triton kernels, and put a tuned table of tiles to use."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn


def load_tiles(path: str | Path) -> None:
    """Put the tiles that `mambaout-kernels tune` wrote before the shipped ones, for this process.

    Raises OSError for a file that cannot be read and ValueError for one that is not such a table.
    """
    from .triton_kernels import tiles

    tiles.use(tiles.parse(Path(path).read_text(encoding="utf-8")))


def warmup(model: nn.Module, shapes: Iterable[tuple[int, ...]]) -> None:
    """Run the model once on zeros of each input shape, (N, 3, H, W), so that every kernel is compiled.

    In training mode the backward too, with gradients thrown away; those that parameters had stay. The model's device
    and dtype are its first floating parameter's. Buffers that a forward updates are put back.
    """
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    if like is None:
        raise ValueError(f"model must have a floating parameter; {type(model).__name__} has none")
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    for shape in shapes:
        x = torch.zeros(shape, dtype=like.dtype, device=like.device)
        with torch.set_grad_enabled(model.training):
            y = model(x)
        if model.training:
            wanted = [p for p in model.parameters() if p.requires_grad]
            torch.autograd.grad(y.float().sum(), wanted, allow_unused=True)
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
