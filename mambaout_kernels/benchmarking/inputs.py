"""Input to time on: random, or the photographs and what the variant's own layers make of them."""

import functools

import torch
from torch import Tensor

from ..models import create_model
from . import photographs
from .shapes import Shape

SOURCES = ("random", "photographs")


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def images(batch: int, size: int, source: str) -> Tensor:
    """(batch, 3, size, size) float32."""
    return photographs.load(batch, size) if source == "photographs" else _random(batch, 3, size, size)


def block_input(shape: Shape, batch: int, source: str) -> Tensor:
    """What the first block of the stage gets: (batch, height, width, dim) float32."""
    if source == "photographs":
        return _stage_inputs(shape.variant, shape.image_size, batch)[shape.stage - 1]
    return _random(batch, shape.height, shape.width, shape.dim)


def op_inputs(shape: Shape, batch: int, source: str, full_channel: bool) -> tuple[Tensor, Tensor, Tensor]:
    """u (batch, height, width, 2 * hidden), weight, bias, float32; `full_channel`: with all hidden channels convolved."""
    channels = shape.hidden if full_channel else shape.conv_channels
    weight = _random(channels, 1, shape.kernel_size, shape.kernel_size, seed=1) / shape.kernel_size
    bias = _random(channels, seed=2)
    if source == "photographs":
        x = _stage_inputs(shape.variant, shape.image_size, batch)[shape.stage - 1]
        with torch.no_grad():
            block = _model(shape.variant).stages[shape.stage - 1][0]  # type: ignore[index]
            return block.fc1(block.norm(x)), weight, bias
    return _random(batch, shape.height, shape.width, 2 * shape.hidden), weight, bias


@functools.cache
def _model(variant: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return create_model(variant).eval()


@functools.lru_cache(maxsize=2)
def _stage_inputs(variant: str, size: int, batch: int) -> list[Tensor]:
    """The input of every stage's first block, from photographs through the layers before it, freshly initialised."""
    model = _model(variant)
    found = []
    with torch.no_grad():
        x = photographs.load(batch, size)
        for downsample, stage in zip(model.downsample_layers, model.stages, strict=True):  # type: ignore[arg-type]
            found.append(x := downsample(x))
            x = stage(x)
    return found
