"""What stands before the stages: the stem, and between them the downsampling; 3 x 3 convolutions of stride 2."""

from collections.abc import Callable

import torch
from torch import nn

from .linear import normed


def _conv3x3s2(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=2, padding=1)


class Stem(nn.Module):
    """(N, in_chans, H, W) to (N, H/4, W/4, dim), each division rounded up twice by two."""

    def __init__(
        self,
        in_chans: int,
        dim: int,
        mid_norm: bool,
        norm_layer: Callable[..., nn.Module],
        act_layer: Callable[..., nn.Module],
    ):
        super().__init__()
        self.conv1 = _conv3x3s2(in_chans, dim // 2)
        self.norm1 = norm_layer(dim // 2) if mid_norm else None
        self.act = act_layer()
        self.conv2 = _conv3x3s2(dim // 2, dim)
        self.norm2 = norm_layer(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x)
        if self.norm1 is None:
            x = self.act(x)
        else:
            x = normed(self.norm1, x.permute(0, 2, 3, 1), self.act, into_product=True).permute(0, 3, 1, 2)
        return normed(self.norm2, self.conv2(x).permute(0, 2, 3, 1))


class Downsample(nn.Module):
    """(N, H, W, in_dim) to (N, H/2, W/2, dim), rounded up; the norm follows the convolution, or precedes it."""

    def __init__(self, in_dim: int, dim: int, norm_first: bool, norm_layer: Callable[..., nn.Module]):
        super().__init__()
        self.norm_first = norm_first
        self.conv = _conv3x3s2(in_dim, dim)
        self.norm = norm_layer(in_dim if norm_first else dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.norm_first:
            x = normed(self.norm, x, into_product=True)
        x = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x if self.norm_first else normed(self.norm, x)
