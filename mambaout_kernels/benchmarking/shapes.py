"""Shapes of the blocks to measure: the stages of every variant, at the size of images that its weights are for."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from ..models import VARIANTS
from ..models.pretrained_cfg import pretrained_cfg

DEFAULT = "mambaout_tiny"
BATCHES = (1, 8)


@dataclass(frozen=True)
class Shape:
    """One stage: maps are (N, height, width, dim); the op's u has 2 * hidden channels."""

    variant: str
    stage: int
    height: int
    width: int
    dim: int
    hidden: int
    conv_channels: int
    kernel_size: int
    act: str

    @property
    def label(self) -> str:
        return f"{self.height}x{self.width}x{self.dim}"

    @property
    def image_size(self) -> int:
        return self.height * 2 ** (self.stage + 1)


def variants() -> list[str]:
    """All of them, the default one first."""
    return [DEFAULT, *(name for name in VARIANTS if name != DEFAULT)]


@functools.cache
def _stages(variant: str) -> tuple[Shape, ...]:
    v, size = VARIANTS[variant], pretrained_cfg(variant)["input_size"][1]
    return tuple(
        Shape(
            variant, index + 1, size >> (index + 2), size >> (index + 2), dim, int(v.expansion_ratio * dim),
            int(v.conv_ratio * dim), v.kernel_size, v.act_layer,
        )
        for index, dim in enumerate(v.dims)
    )  # fmt: skip


def stages(variant: str, numbers: Sequence[int] = ()) -> list[Shape]:
    """The stages of a variant, or only those with these numbers, which count from 1. ValueError for unknown ones."""
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(variants())}; got {variant!r}")
    found = _stages(variant)
    unknown = set(numbers) - {shape.stage for shape in found}
    if unknown:
        raise ValueError(f"stage must be in 1 to {len(found)}; got {', '.join(map(str, sorted(unknown)))}")
    return [shape for shape in found if not numbers or shape.stage in numbers]
