"""What the paper argues with, computed: parameters, MACs, when a sequence is long, who sees whom, bytes moved."""

import math
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from . import backends
from .models import VARIANTS, create_model
from .nn.causal import causal_taps

# Table 1 of arXiv 2405.07992: parameters in millions, MACs in 1e9 at 224 x 224.
PAPER = {
    "mambaout_femto": (7, 1.2),
    "mambaout_tiny": (27, 4.5),
    "mambaout_small": (48, 9.0),
    "mambaout_base": (85, 15.8),
}
# The paper's tasks, (height, width) of an image, and the widths it compares their lengths with (ViT-S, ViT-B).
TASKS = {
    "ImageNet classification": (224, 224),
    "COCO detection, instance segmentation": (800, 1280),
    "ADE20K semantic segmentation": (512, 2048),
}
WIDTHS = {"ViT-S": 384, "ViT-B": 768}
PATCH = 16


def parameters(name: str) -> int:
    """Of a variant with 1000 classes."""
    with torch.device("meta"):
        return sum(p.numel() for p in create_model(name).parameters())


def macs(name: str, height: int = 224, width: int = 224) -> int:
    """Multiply-adds of the convolutions and linear layers for one image, counted by torch's FlopCounterMode."""
    with torch.device("meta"):
        model, x = create_model(name).eval(), torch.empty(1, 3, height, width)
        with FlopCounterMode(display=False) as counter, backends.force("reference"), torch.no_grad():
            model(x)
    return counter.get_total_flops() // 2


def tokens(height: int, width: int, patch: int = PATCH) -> int:
    """L, the length of an image's sequence of patches."""
    return math.ceil(height / patch) * math.ceil(width / patch)


def length_ratio(length: int, dim: int) -> float:
    """L / 6D: how the part of a Transformer block's FLOPs that is quadratic in L compares with the linear part.

    The paper calls a sequence long, and so a task one for SSMs, from 1 on: 4 D L^2 > 24 D^2 L.
    """
    return length / (6 * dim)


@dataclass(frozen=True)
class Visibility:
    """Pairs (output pixel, input pixel) that a K x K depthwise convolution of an H x W map joins."""

    taps: int
    causal_taps: int
    pairs: int
    causal_pairs: int


def visibility(height: int, width: int, kernel_size: int) -> Visibility:
    """Fully visible against causal mixing; pairs beyond the border do not count."""
    taps = causal_taps(kernel_size, torch.device("cpu"))
    rows = torch.tensor([max(0, height - abs(k - kernel_size // 2)) for k in range(kernel_size)])
    columns = torch.tensor([max(0, width - abs(k - kernel_size // 2)) for k in range(kernel_size)])
    pairs = rows[:, None] * columns[None, :]
    return Visibility(taps.numel(), int(taps.sum()), int(pairs.sum()), int(pairs[taps].sum()))


@dataclass(frozen=True)
class Traffic:
    """What the middle of a block does to one stage's map at batch 1: elements read and written, and MACs.

    fused: u (2D) in, y (D) out. As separate operations, each reading its inputs and writing its output: convolution 2C,
    act(g) 2D, concat 2D, product 3D. Filters and halos are left out: both stay in cache.
    """

    pixels: int
    hidden: int
    conv_channels: int
    kernel_size: int

    @property
    def fused(self) -> int:
        return 3 * self.hidden * self.pixels

    @property
    def separate(self) -> int:
        return (7 * self.hidden + 2 * self.conv_channels) * self.pixels

    @property
    def macs(self) -> int:
        return self.conv_channels * self.kernel_size**2 * self.pixels


def traffic(name: str, stage: int, height: int = 224, width: int = 224) -> tuple[Traffic, Traffic]:
    """(partial convolution as the variant has it, full-channel) of one block of a stage, counted from 0."""
    v = VARIANTS[name]
    for _ in range(stage + 2):
        height, width = math.ceil(height / 2), math.ceil(width / 2)
    hidden = int(v.expansion_ratio * v.dims[stage])
    partial = Traffic(height * width, hidden, int(v.conv_ratio * v.dims[stage]), v.kernel_size)
    return partial, Traffic(height * width, hidden, hidden, v.kernel_size)
