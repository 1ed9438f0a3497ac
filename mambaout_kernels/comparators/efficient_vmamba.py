"""EfficientVMamba (arXiv 2403.09977): two stages of scans beside convolutions, then two of inverted residuals.

Modules are named as in EfficientVMamba's repository.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from ..nn.layers import DropPath
from .ssm import AtrousScan, ChannelGate
from .vmamba import VSSM, Permute, downsamples, drop_path_rates, stage


class EVSSBlock(nn.Module):
    """x + drop_path(se(op(x')) + se(conv_branch(x'))), x' = norm(x): global and local branches, gated by one module.

    x (N, H, W, dim). The local branch is a depthwise convolution, batch norm, GELU and a pointwise convolution.
    """

    def __init__(self, dim: int, drop_path: float = 0.0):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.op = AtrousScan(dim)
        self.conv_branch = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim), nn.BatchNorm2d(dim), nn.GELU(), nn.Conv2d(dim, dim, 1)
        )
        self.se = ChannelGate(dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        local = self.conv_branch(normed.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.drop_path(self.se(self.op(normed)) + self.se(local))


class SqueezeExcite(nn.Module):
    """x (N, C, H, W) times one factor per sample and channel (arXiv 1709.01507)."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, hidden, 1)
        self.conv_expand = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.conv_expand(self.conv_reduce(x.mean((2, 3), keepdim=True)).relu())
        return x * gate.sigmoid()


class InvertedResidual(nn.Module):
    """x + drop_path(conv_pw2(se(conv_dw(conv_pw(x))))), x (N, dim, H, W) (MobileNetV2, arXiv 1801.04381)."""

    def __init__(self, dim: int, drop_path: float = 0.0, expansion_ratio: int = 4):
        super().__init__()
        hidden = expansion_ratio * dim
        self.conv_pw = nn.Sequential(nn.Conv2d(dim, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU())
        self.conv_dw = nn.Sequential(
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.ReLU()
        )
        self.se = SqueezeExcite(hidden, hidden // 8)
        self.conv_pw2 = nn.Sequential(nn.Conv2d(hidden, dim, 1, bias=False), nn.BatchNorm2d(dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.conv_pw2(self.se(self.conv_dw(self.conv_pw(x)))))


def _efficient_vmamba(
    depths: Sequence[int], dims: Sequence[int], drop_path_rate: float, in_chans: int, num_classes: int
) -> VSSM:
    stages: list[nn.Module] = []
    for dim, rates, downsample in zip(dims, drop_path_rates(depths, drop_path_rate), downsamples(dims), strict=True):
        if len(stages) < 2:
            stages.append(stage((EVSSBlock(dim, rate) for rate in rates), downsample))
        else:
            blocks = (InvertedResidual(dim, rate) for rate in rates)
            stages.append(nn.Sequential(Permute(0, 3, 1, 2), *blocks, Permute(0, 2, 3, 1), downsample))
    return VSSM(dims, stages, in_chans, num_classes)


def efficientvmamba_small(drop_path_rate: float = 0.0, in_chans: int = 3, num_classes: int = 1000) -> VSSM:
    """EfficientVMamba-S, arXiv 2403.09977, of widths 64 to 512: those of the authors' training log."""
    return _efficient_vmamba((2, 2, 4, 2), (64, 128, 256, 512), drop_path_rate, in_chans, num_classes)
