"""A model part by part: stem, stages, downsamples, head; where its time goes and where its arithmetic is."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .. import backends
from ..inference import InferenceModel
from ..models import MambaOut
from . import workloads
from .timing import Contender
from .workloads import Cell, Problem

CONTENDERS = ("fused", "eager")


@dataclass(frozen=True)
class Part:
    """Some of a model's layers, as eager and as fused run them, and what they get of the cell's images."""

    name: str
    module: Callable[[Tensor], Tensor]
    fused: Callable[[Tensor], Tensor]
    x: Tensor

    def contender(self, name: str) -> Callable[[None], Tensor]:
        module = self.fused if name == "fused" else self.module
        return lambda _: module(self.x)


def parts(cell: Cell) -> list[Part]:
    """Of the cell's model, in the order of its forward: each part's input is the output of the one before."""
    posed = workloads.problem(cell)
    fused, x = workloads.optimized(cell, posed).module, posed.x
    assert x is not None
    found = []
    with workloads.running(cell, "eager"):
        for (name, module), (_, in_fused) in zip(_named(posed.module), _named(fused), strict=True):
            found.append(Part(name, module, in_fused, x))
            x = module(x)
    return found


def _named(model: nn.Module | None) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    if isinstance(model, InferenceModel):
        model = model.model
    assert isinstance(model, MambaOut)
    for number, (downsample, stage) in enumerate(zip(model.downsample_layers, model.stages, strict=True), start=1):
        yield "stem" if number == 1 else f"downsample {number}", downsample
        yield f"stage {number}", stage
    yield "head", model.forward_head


def contenders(cell: Cell, found: list[Part]) -> list[Contender]:
    """Fused part after part, then eager: each finds the caches as it does within the model."""
    return [
        Contender(f"{name} {part.name}", part.contender(name), context=partial(workloads.running, cell, name))
        for name in CONTENDERS
        for part in found
    ]


def flops(module: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Floating-point operations of one sample's matrix products and convolutions; a multiply-add is two."""
    with backends.force("reference"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(x[:1])
    return counter.get_total_flops()


def problem_flops(posed: Problem) -> int | None:
    """The same of a problem that is a module's."""
    return None if posed.module is None or posed.x is None else flops(posed.module, posed.x)
