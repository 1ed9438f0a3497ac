"""The orders in which the tokens of a map are scanned, as data: (G, H * W) int32, each row a permutation.

A token is h * W + w, where the image has it.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _map(height: int, width: int, device: torch.device | None) -> Tensor:
    return torch.arange(height * width, dtype=torch.int32, device=device).view(height, width)


def _both_ways(*paths: Tensor) -> Tensor:
    return torch.stack([row for path in paths for row in (path, path.flip(0))])


def bidirectional(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """(2, L): row by row, and back (Vim, arXiv 2401.09417)."""
    return _both_ways(_map(height, width, device).flatten())


def cross(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """(4, L): row by row, column by column, and both back (VMamba's cross-scan, arXiv 2401.10166)."""
    tokens = _map(height, width, device)
    ahead = torch.stack((tokens.flatten(), tokens.t().flatten()))
    return torch.cat((ahead, ahead.flip(1)))


def continuous(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """(4, L): as a snake, each step to a neighbour, by rows and by columns, both ways (PlainMamba, 2403.17695)."""
    tokens = _map(height, width, device)
    return _both_ways(_snake(tokens), _snake(tokens.t()))


def _snake(tokens: Tensor) -> Tensor:
    rows = tokens.clone()
    rows[1::2] = rows[1::2].flip(1)
    return rows.flatten()


START, RIGHT, LEFT, UP, DOWN = range(5)


def continuous_directions(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """(4, L) int64: by which step each scan of `continuous` comes to a token; START for its first token."""
    order = continuous(height, width, device).long()
    down = (order // width).diff(dim=1)
    right = (order % width).diff(dim=1)
    steps = RIGHT * (right > 0) + LEFT * (right < 0) + UP * (down < 0) + DOWN * (down > 0)
    return torch.zeros_like(order).scatter(1, order[:, 1:], steps)


def atrous(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """(4, L): row by row, column by column, and both once more (EfficientVMamba, arXiv 2403.09977).

    Of four maps of height x width, each a scan's own: every second pixel of every second row of the image.
    """
    tokens = _map(height, width, device)
    return torch.stack((tokens.flatten(), tokens.t().flatten())).repeat(2, 1)


def windows(height: int, width: int, window: int, device: torch.device | None = None) -> Tensor:
    """(L,): window after window, each row by row (LocalMamba's local scan, arXiv 2403.09338).

    Windows at the right and at the bottom are smaller where the map is no multiple of them.
    """
    tokens = _map(height, width, device)
    bands = (band.split(window, dim=1) for band in tokens.split(window, dim=0))
    return torch.cat([each.flatten() for band in bands for each in band])


def local(height: int, width: int, window: int = 7, device: torch.device | None = None) -> Tensor:
    """(4, L): row by row and back, window by window and back."""
    return _both_ways(_map(height, width, device).flatten(), windows(height, width, window, device))


def named(height: int, width: int, names: tuple[str, ...], device: torch.device | None = None) -> Tensor:
    """(G, L): one scan for each name, as LocalMamba names them (arXiv 2403.09338).

    "h": row by row. "v": column by column. "w7": window by window of 7 x 7, or of any other size. "_flip": back.
    """
    return torch.stack([_named(height, width, name, device) for name in names])


def _named(height: int, width: int, name: str, device: torch.device | None) -> Tensor:
    path = name.removesuffix("_flip")
    if path == "h":
        order = _map(height, width, device).flatten()
    elif path == "v":
        order = _map(height, width, device).t().flatten()
    elif path[:1] == "w" and path[1:].isdecimal() and int(path[1:]) > 0:
        order = windows(height, width, int(path[1:]), device)
    else:
        raise ValueError(f'a scan is "h", "v" or "w" with a size such as "w7", or one with "_flip"; got {name!r}')
    return order.flip(0) if name != path else order


def cached(order: Callable[..., Tensor], x: Tensor, *arguments: Any) -> Tensor:
    """order(*arguments) on x's device, computed once. The tensor is shared: not to be written to."""
    if torch.compiler.is_compiling() or type(x) is not Tensor:  # a FakeTensor's order would be fake
        return order(*arguments, device=x.device)
    return _cached(order, arguments, x.device)


@functools.lru_cache(maxsize=256)
def _cached(order: Callable[..., Tensor], arguments: tuple[Any, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # what was made in inference cannot be saved for backward
        return order(*arguments, device=device)
