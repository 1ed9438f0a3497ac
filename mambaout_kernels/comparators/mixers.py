"""Token mixers side by side: each a layer of a map (N, H, W, dim) to another, as its paper has it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import VARIANTS
from ..nn.block import FusedGatedCNNBlock
from ..ops.gated_dwconv import gated_dwconv
from . import mamba_ssm, ssm
from .layers import Linear


class GatedConv(nn.Module):
    """fc2(gelu(g) * cat(i, dwconv7x7(c))), [g, i, c] = fc1(x): MambaOut's block without its norm and shortcut.

    Args:
        dim: of the map.
        full_channel: whether all of the hidden channels are convolved, not `dim` of them.
    """

    def __init__(self, dim: int, full_channel: bool = False):
        super().__init__()
        variant = VARIANTS["mambaout_tiny"]
        hidden, kernel_size = int(variant.expansion_ratio * dim), variant.kernel_size
        channels = hidden if full_channel else int(variant.conv_ratio * dim)
        self.fc1 = Linear(dim, 2 * hidden)
        self.conv = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        assert self.conv.bias is not None
        return self.fc2(gated_dwconv(self.fc1(x), self.conv.weight, self.conv.bias))


class Attention(nn.Module):
    """Multi-head attention by PyTorch's scaled_dot_product_attention (arXiv 1706.03762; 2010.11929 for images).

    Args:
        dim: of the map.
        causal: whether a token sees itself and those before it, row by row, alone.
        head_dim: channels of a head; dim is a multiple of it.
    """

    def __init__(self, dim: int, causal: bool = False, head_dim: int = 32):
        super().__init__()
        if dim % head_dim:
            raise ValueError(f"dim must be a multiple of head_dim, {head_dim}; got {dim}")
        self.heads, self.causal = dim // head_dim, causal
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x.flatten(1, 2)).unflatten(-1, (3, self.heads, -1))  # (N, L, 3, heads, head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.proj(y.transpose(1, 2).flatten(2).unflatten(1, x.shape[1:3]))


def _channels_first(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x) of a map whose channels are last in memory: nothing is copied."""
    return layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Depthwise(nn.Module):
    """ConvNeXt's mixer (arXiv 2201.03545): a 7 x 7 depthwise convolution."""

    def __init__(self, dim: int, kernel_size: int = 7):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return _channels_first(self.conv, x)


class InceptionDepthwise(nn.Module):
    """InceptionNeXt's mixer (arXiv 2303.16900): an eighth of the channels each by 3 x 3, 1 x 11 and 11 x 1, the others
    pass."""

    def __init__(self, dim: int, branch_ratio: float = 1 / 8, square: int = 3, band: int = 11):
        super().__init__()
        channels = int(branch_ratio * dim)
        conv = partial(nn.Conv2d, channels, channels, groups=channels)
        self.hw = conv(square, padding=square // 2)
        self.w = conv((1, band), padding=(0, band // 2))
        self.h = conv((band, 1), padding=(band // 2, 0))
        self.split = (dim - 3 * channels, channels, channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        passed, *branches = x.split(self.split, dim=-1)
        convolved = (_channels_first(conv, b) for conv, b in zip((self.hw, self.w, self.h), branches, strict=True))
        return torch.cat((passed, *convolved), dim=-1)


class StarReLU(nn.Module):
    """scale * relu(x)^2 + bias (arXiv 2210.13452)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.bias = nn.Parameter(torch.tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.relu(x).square() + self.bias


class SeparableConv(nn.Module):
    """CAFormer's mixer of its first stages (arXiv 2210.13452): pointwise, StarReLU, 7 x 7 depthwise, pointwise."""

    def __init__(self, dim: int, expansion_ratio: float = 2.0):
        super().__init__()
        channels = int(expansion_ratio * dim)
        self.pwconv1 = Linear(dim, channels, bias=False)
        self.act = StarReLU()
        self.dwconv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels, bias=False)
        self.pwconv2 = Linear(channels, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.pwconv2(_channels_first(self.dwconv, self.act(self.pwconv1(x))))


class Pooling(nn.Module):
    """PoolFormer's mixer (arXiv 2111.11418): the mean of 3 x 3 pixels, less the pixel."""

    def __init__(self, dim: int):
        super().__init__()
        self.pool = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        return _channels_first(self.pool, x) - x


@dataclass(frozen=True)
class Mixer:
    """A token mixer: what it is called, made from a width.

    alone: its papers put no MLP beside it. unavailable: why it cannot run on a type of device; None where it can.
    """

    label: str
    make: Callable[[int], nn.Module]
    alone: bool = False
    unavailable: Callable[[str], str | None] = lambda device: None


def _mamba_ssm_unavailable(device: str) -> str | None:
    return "mamba_ssm's kernel runs on a GPU" if device == "cpu" else mamba_ssm.unavailable()


MIXERS: dict[str, Mixer] = {
    "gated-conv": Mixer("gated convolution (MambaOut)", GatedConv, alone=True),
    "gated-conv-full": Mixer("gated convolution, all channels", partial(GatedConv, full_channel=True), alone=True),
    "attention": Mixer("attention", Attention),
    "attention-causal": Mixer("attention, causal", partial(Attention, causal=True)),
    "cross-scan": Mixer("cross-scan (VMamba)", ssm.SS2D, alone=True),
    "cross-scan-mamba-ssm": Mixer(
        "cross-scan by mamba_ssm's kernel", ssm.SS2DByMambaSSM, alone=True, unavailable=_mamba_ssm_unavailable
    ),
    "local-scan": Mixer("local window scan (LocalVMamba)", ssm.LocalScan, alone=True),
    "atrous-scan": Mixer("atrous skip scan (EfficientVMamba)", ssm.AtrousScan, alone=True),
    "bidirectional-scan": Mixer("bidirectional scan (Vim)", ssm.Bidirectional, alone=True),
    "continuous-scan": Mixer("continuous scan (PlainMamba)", ssm.ContinuousScan, alone=True),
    "separable-conv": Mixer("separable convolution (CAFormer)", SeparableConv),
    "inception": Mixer("Inception depthwise (InceptionNeXt)", InceptionDepthwise),
    "depthwise": Mixer("7x7 depthwise (ConvNeXt)", Depthwise),
    "pooling": Mixer("pooling (PoolFormer)", Pooling),
}


class Block(nn.Module):
    """x + mixer(norm(x)), and of mixers that need one x + mlp(norm(x)) after it: as MetaFormer has it (2111.11418)."""

    def __init__(self, dim: int, mixer: nn.Module, mlp: bool):
        super().__init__()
        self.norm1, self.mixer = nn.LayerNorm(dim), mixer
        self.norm2 = nn.LayerNorm(dim) if mlp else None
        self.mlp = nn.Sequential(Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)) if mlp else None

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm1(x))
        return x if self.mlp is None or self.norm2 is None else x + self.mlp(self.norm2(x))


def create_layer(name: str, dim: int, block: bool = False) -> nn.Module:
    """A mixer of MIXERS with random weights, or the residual block around it, with an MLP where its papers have one.

    Raises ValueError for an unknown name, and for a dim that the mixer does not take.
    """
    if name not in MIXERS:
        raise ValueError(f"name must be one of {', '.join(MIXERS)}; got {name!r}")
    mixer = MIXERS[name]
    if not block:
        return mixer.make(dim)
    if name in ("gated-conv", "gated-conv-full"):
        variant = VARIANTS["mambaout_tiny"]
        ratio = variant.expansion_ratio if name == "gated-conv-full" else variant.conv_ratio
        return FusedGatedCNNBlock(dim, conv_ratio=ratio)
    return Block(dim, mixer.make(dim), mlp=not mixer.alone)
