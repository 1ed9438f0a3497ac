"""VMamba's first models (arXiv 2401.10166v1; "v0" in its code), and what other models take from them.

Modules are named as in VMamba's repository.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.layers import DropPath
from .layers import Linear
from .ssm import SS2D


class Permute(nn.Module):
    """x.permute(dims), as a layer."""

    def __init__(self, *dims: int):
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.dims)


class Pool(nn.Module):
    """The mean of a map, (N, H, W, dim) to (N, dim)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((1, 2))


class VSSBlock(nn.Module):
    """x + drop_path(op(norm(x))), of a map x (N, H, W, dim); op is a token mixer."""

    def __init__(self, dim: int, op: nn.Module, drop_path: float = 0.0):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.op = op
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.op(self.norm(x)))


class PatchMerging(nn.Module):
    """(N, H, W, dim) to (N, H/2, W/2, out_dim), halves rounded up: 2 x 2 pixels side by side, normed and projected.

    As Swin Transformer's (arXiv 2103.14030).
    """

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = Linear(4 * dim, out_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[1:3]
        if H % 2 or W % 2:
            x = F.pad(x, (0, 0, 0, W % 2, 0, H % 2))
        pixels = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5)  # (N, H/2, W/2, w, h, dim)
        return self.reduction(self.norm(pixels.flatten(3)))


class VSSM(nn.Module):
    """Image classifier: (N, in_chans, H, W) to (N, num_classes).

    Args:
        dims: width of each stage.
        stages: one module for each, maps (N, H, W, dim) to the next stage's map.
        in_chans, num_classes: of the image and the output.

    `forward_features` gives the last stage's map, (N, H/32, W/32, dims[-1]), sides rounded up from the second stage on.
    """

    def __init__(self, dims: Sequence[int], stages: Iterable[nn.Module], in_chans: int = 3, num_classes: int = 1000):
        super().__init__()
        self.patch_embed = nn.Sequential(
            nn.Conv2d(in_chans, dims[0], kernel_size=4, stride=4), Permute(0, 2, 3, 1), nn.LayerNorm(dims[0])
        )
        self.layers = nn.ModuleList(stages)
        self.classifier = nn.Sequential(
            OrderedDict(norm=nn.LayerNorm(dims[-1]), pool=Pool(), head=Linear(dims[-1], num_classes))
        )  # fmt: skip
        self.apply(_init_weights)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.forward_features(x))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def drop_path_rates(depths: Sequence[int], last: float) -> list[list[float]]:
    """Of each block of each stage, rising linearly from 0 to `last`."""
    rates = torch.linspace(0, last, sum(depths), device="cpu")
    return [stage.tolist() for stage in rates.split(list(depths))]


def stage(blocks: Iterable[nn.Module], downsample: nn.Module) -> nn.Module:
    """Blocks, then what leads to the next stage."""
    return nn.Sequential(OrderedDict(blocks=nn.Sequential(*blocks), downsample=downsample))


def downsamples(dims: Sequence[int]) -> list[nn.Module]:
    """After each stage: patch merging, and nothing after the last."""
    merging = (PatchMerging(dim, out_dim) for dim, out_dim in pairwise(dims))
    return [*merging, nn.Identity()]


def vssm(
    depths: Sequence[int],
    dim: int,
    op: Callable[[int, int], nn.Module],
    drop_path_rate: float = 0.0,
    in_chans: int = 3,
    num_classes: int = 1000,
) -> VSSM:
    """A VSSM of VSSBlocks, its stages `dim`, 2 * dim, 4 * dim, ... wide; op(width, index of block) makes a mixer."""
    dims = [dim * 2**i for i in range(len(depths))]
    stages, index = [], 0
    for width, rates, downsample in zip(dims, drop_path_rates(depths, drop_path_rate), downsamples(dims), strict=True):
        blocks = [VSSBlock(width, op(width, index + i), rate) for i, rate in enumerate(rates)]
        stages.append(stage(blocks, downsample))
        index += len(blocks)
    return VSSM(dims, stages, in_chans, num_classes)


def _vmamba(
    depths: Sequence[int], dim: int, drop_path_rate: float = 0.0, in_chans: int = 3, num_classes: int = 1000
) -> VSSM:
    return vssm(depths, dim, lambda width, _: SS2D(width), drop_path_rate, in_chans, num_classes)


def vmamba_tiny(drop_path_rate: float = 0.0, in_chans: int = 3, num_classes: int = 1000) -> VSSM:
    """VMamba-T, arXiv 2401.10166v1."""
    return _vmamba((2, 2, 9, 2), 96, drop_path_rate, in_chans, num_classes)


def vmamba_small(drop_path_rate: float = 0.0, in_chans: int = 3, num_classes: int = 1000) -> VSSM:
    """VMamba-S, arXiv 2401.10166v1."""
    return _vmamba((2, 2, 27, 2), 96, drop_path_rate, in_chans, num_classes)


def vmamba_base(drop_path_rate: float = 0.0, in_chans: int = 3, num_classes: int = 1000) -> VSSM:
    """VMamba-B, arXiv 2401.10166v1."""
    return _vmamba((2, 2, 27, 2), 128, drop_path_rate, in_chans, num_classes)
