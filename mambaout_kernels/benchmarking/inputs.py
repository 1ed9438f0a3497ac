"""Input to time on: random, or the photographs and what the variant's own layers make of them."""

import functools
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

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
    """u (batch, height, width, 2 * hidden), weight, bias, float32; `full_channel`: all hidden channels convolved."""
    channels = shape.hidden if full_channel else shape.conv_channels
    weight = _random(channels, 1, shape.kernel_size, shape.kernel_size, seed=1) / shape.kernel_size
    bias = 0.1 * _random(channels, seed=2)
    if source == "photographs":
        x = block_input(shape, batch, source)
        block: Any = _model(shape.variant).stages[shape.stage - 1][0]  # type: ignore[index]
        with torch.no_grad():
            return block.fc1(block.norm(x)), weight, bias
    return _random(batch, shape.height, shape.width, 2 * shape.hidden), weight, bias


_Module = TypeVar("_Module", bound=nn.Module)


def enlivened(module: _Module) -> _Module:
    """The module with random parameters none of which is at a special value.

    A model is initialised with zero biases and, in some variants, layer scales of 1e-6: a wrong branch would not show.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(drawn / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.1 * drawn + (0.0 if name.endswith("bias") else 1.0))
    return module


@functools.cache
def _model(variant: str) -> nn.Module:
    return enlivened(create_model(variant)).eval()


@functools.lru_cache(maxsize=2)
def _stage_inputs(variant: str, size: int, batch: int) -> list[Tensor]:
    """The input of every stage's first block, from photographs through the layers before it, of random parameters."""
    model = _model(variant)
    found = []
    with torch.no_grad():
        x = photographs.load(batch, size)
        for downsample, stage in zip(model.downsample_layers, model.stages, strict=True):  # type: ignore[arg-type]
            found.append(x := downsample(x))
            x = stage(x)
    return found
