"""The orders in which the tokens of a map are scanned, as data: (G, H * W) int32, each row a permutation.

A token is h * W + w, where the image has it.
"""

import torch
from torch import Tensor


def _map(height: int, width: int) -> Tensor:
    return torch.arange(height * width, dtype=torch.int32).view(height, width)


def _both_ways(*paths: Tensor) -> Tensor:
    return torch.stack([row for path in paths for row in (path, path.flip(0))])


def bidirectional(height: int, width: int) -> Tensor:
    """(2, L): row by row, and back (Vim, arXiv 2401.09417)."""
    return _both_ways(_map(height, width).flatten())


def cross(height: int, width: int) -> Tensor:
    """(4, L): row by row and back, column by column and back (VMamba's cross-scan, arXiv 2401.10166)."""
    tokens = _map(height, width)
    return _both_ways(tokens.flatten(), tokens.t().flatten())


def continuous(height: int, width: int) -> Tensor:
    """(4, L): as a snake, each step to a neighbour, by rows and by columns, both ways (PlainMamba, arXiv 2403.17695)."""
    return _both_ways(_snake(_map(height, width)), _snake(_map(height, width).t()))


def _snake(tokens: Tensor) -> Tensor:
    rows = tokens.clone()
    rows[1::2] = rows[1::2].flip(1)
    return rows.flatten()


def windows(height: int, width: int, window: int) -> Tensor:
    """(L,): window after window, each row by row (LocalMamba's local scan, arXiv 2403.09338).

    Windows at the right and at the bottom are smaller where the map is no multiple of them.
    """
    tokens = _map(height, width)
    bands = (band.split(window, dim=1) for band in tokens.split(window, dim=0))
    return torch.cat([each.flatten() for band in bands for each in band])


def local(height: int, width: int, window: int = 7) -> Tensor:
    """(4, L): row by row and back, window by window and back."""
    return _both_ways(_map(height, width).flatten(), windows(height, width, window))
