"""A model part by part: stem, stages, downsamples, head; where its time goes and where its arithmetic is."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from .. import backends
from ..models import MambaOut
from . import workloads
from .timing import Contender
from .workloads import Cell, Problem

CONTENDERS = ("fused", "eager")


@dataclass(frozen=True)
class Part:
    """Some of a model's layers, and what they get of the cell's images."""

    name: str
    module: Callable[[Tensor], Tensor]
    x: Tensor

    def run(self, _prepared: None = None) -> Tensor:
        return self.module(self.x)


def parts(cell: Cell) -> list[Part]:
    """Of the cell's model, in the order of its forward: each part's input is the output of the one before."""
    posed = workloads.problem(cell)
    model, x = posed.module, posed.x
    assert isinstance(model, MambaOut)
    assert x is not None
    named: list[tuple[str, Callable[[Tensor], Tensor]]] = []
    for number, (downsample, stage) in enumerate(zip(model.downsample_layers, model.stages, strict=True), start=1):
        named += [("stem" if number == 1 else f"downsample {number}", downsample), (f"stage {number}", stage)]
    found = []
    with workloads.running(cell, "eager"):
        for name, module in [*named, ("head", model.forward_head)]:
            found.append(Part(name, module, x))
            x = module(x)
    return found


def contenders(cell: Cell, found: list[Part]) -> list[Contender]:
    """Fused part after part, then eager: each finds the caches as it does within the model."""
    return [
        Contender(f"{name} {part.name}", part.run, context=partial(workloads.running, cell, name))
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
