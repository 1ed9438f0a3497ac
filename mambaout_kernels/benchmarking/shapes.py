"""Shapes of the blocks to measure, from shapes.json: the stages of some variants at their evaluation resolution."""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files


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


@functools.cache
def _data() -> tuple[tuple[int, ...], tuple[Shape, ...]]:
    content = json.loads((files(__package__) / "shapes.json").read_text(encoding="utf-8"))
    return tuple(content["batches"]), tuple(Shape(**row) for row in content["stages"])


def batches() -> tuple[int, ...]:
    return _data()[0]


def variants() -> list[str]:
    """The variants whose stages are listed, the default one first."""
    return list(dict.fromkeys(shape.variant for shape in _data()[1]))


def stages(variant: str, numbers: Sequence[int] = ()) -> list[Shape]:
    """The stages of a variant, or only those with these numbers, which count from 1. ValueError for unknown ones."""
    found = [shape for shape in _data()[1] if shape.variant == variant]
    if not found:
        raise ValueError(f"variant must be one of {', '.join(variants())}; got {variant!r}")
    unknown = set(numbers) - {shape.stage for shape in found}
    if unknown:
        raise ValueError(f"stage must be in 1 to {len(found)}; got {', '.join(map(str, sorted(unknown)))}")
    return [shape for shape in found if not numbers or shape.stage in numbers]
