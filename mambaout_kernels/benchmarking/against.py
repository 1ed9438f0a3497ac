"""Models of other papers beside MambaOut on the same images, with random weights, each as its authors or timm make it.

Not contenders of a cell: those compute one function, and a ratio of their times is a speed-up. These are other
functions, with parameters, MACs and accuracy of their own.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ..models import VARIANTS, create_model
from . import accuracy, inputs, workloads
from .accuracy import Comparison
from .peers import NotAvailable
from .timing import Contender, captured
from .workloads import Cell, Problem

HOW = {"fused": "fused", "eager": "eager partial", "as made": "as made"}
PAPER_SIZE = 224  # of the images that the papers report accuracy on
CHECKED_SIZE = 64  # the reference scan takes a step for each token


@dataclass(frozen=True)
class Against:
    """One comparison: variants of MambaOut, a cell each that differs in its shape alone, and other models by name."""

    cells: tuple[Cell, ...]
    others: tuple[str, ...]

    @property
    def models(self) -> int:
        return len(self.cells) + len(self.others)

    @property
    def image_size(self) -> int:
        return self.cells[0].shape.image_size


@dataclass(frozen=True)
class Entrant:
    """A model and how it runs, of HOW. `contender` is None where it is wrong or cannot be built."""

    model: str
    how: str
    facts: dict[str, Any]
    contender: Contender | None = None
    comparison: Comparison | None = None
    failure: str | None = None


def made_here(name: str) -> bool:
    """Whether comparators make it, on this package's selective scan."""
    from ..comparators.models import MODELS

    return name not in VARIANTS and name in MODELS and MODELS[name].factory is not None


def scan_backend(cell: Cell) -> str:
    """What runs a selective scan of the cell's dtype where nothing is forced."""
    from ..comparators import selective_scan

    low = workloads.DTYPES[cell.dtype]
    return selective_scan.chosen(torch.empty(1, dtype=low, device=cell.device))


def make(name: str, size: int) -> nn.Module:
    """The model with random weights, always the same; of timm's that take images of one size, for this one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name in VARIANTS:
            return create_model(name)
        if made_here(name):
            from ..comparators import models

            return models.create_model(name)
        if find_spec("timm") is None:
            raise NotAvailable("timm is not installed")
        import timm

        cfg = timm.get_pretrained_cfg(name)
        other_size = cfg is not None and cfg.fixed_input_size and cfg.input_size[1] != size
        options: dict[str, Any] = {"img_size": size} if other_size else {}
        return timm.create_model(name, **options)


def facts(name: str, model: nn.Module, size: int) -> dict[str, Any]:
    """Parameters and MACs of one image, computed; the paper's top-1 and who reports it, where it is of this size."""
    from ..comparators import flops
    from ..comparators.models import MODELS

    try:
        macs = flops.macs(copy.deepcopy(model).to("meta"), size, size)
    except Exception:  # it wants numbers, or images of another size
        macs = None
    reported = MODELS.get(name) if size == PAPER_SIZE else None
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "macs": macs,
        "top1": reported and reported.top1,
        "top1_source": reported and reported.source,
    }


def problem(cell: Cell, name: str, size: int) -> Problem:
    """The model on the cell's images of `size`."""
    return _problem(cell, make(name, size).train(cell.mode != "fwd"), size)


def _problem(cell: Cell, model: nn.Module, size: int, dtype: torch.dtype | None = None) -> Problem:
    """In fp64, the same (rounded) values in fp64."""
    stored = workloads.stored_dtype(cell)
    model = model.to(cell.device, stored).to(dtype)
    x = inputs.images(cell.batch, size, cell.source).to(cell.device, stored).to(dtype)
    return Problem(partial(model, x), dict(model.named_parameters()), model, x)


def verify(cell: Cell, name: str) -> list[Comparison]:
    """A model on this package's scan kernel against fp64 on the reference scan, beside the cell's dtype on that.

    One small image: the output, and unless the mode is "fwd" all gradients. As in evaluation: in training a bias before
    a batch norm has a gradient of rounding errors alone.
    """
    cell = replace(cell, batch=1)
    model = inputs.enlivened(make(name, CHECKED_SIZE)).eval()
    exact = _problem(cell, copy.deepcopy(model), CHECKED_SIZE, torch.float64)
    posed = _problem(cell, model, CHECKED_SIZE)
    actual, eager = workloads.results(cell, posed, "fused"), workloads.results(cell, posed, "eager")
    return accuracy.compare_model(actual, eager, workloads.results(replace(cell, autocast=False), exact, "eager"))


def _with_gradients(cell: Cell, posed: Problem) -> Problem:
    """The problem of the parameters that the output depends on.

    Raises NotAvailable for an output that is no tensor, ValueError for results that are not finite.
    """
    with workloads.running(cell, "fused"):
        y = posed.forward()
        if not isinstance(y, Tensor):
            raise NotAvailable(f"its output is a {type(y).__name__}, no tensor")
        found = {"output": y}
        if cell.mode != "fwd":
            leaves = {name: leaf for name, leaf in posed.leaves.items() if leaf.requires_grad}
            gradients = torch.autograd.grad(y, list(leaves.values()), workloads.gradient_of(y), allow_unused=True)
            found |= {name: t for name, t in zip(leaves, gradients, strict=True) if t is not None}
    for name, t in found.items():
        if not t.isfinite().all():
            raise ValueError(f"its {name if name == 'output' else f'gradient of {name}'} is not finite")
    return replace(posed, leaves={name: leaf for name, leaf in posed.leaves.items() if name in found})


def _other(cell: Cell, name: str, size: int) -> Entrant:
    about: dict[str, Any] = {}
    try:
        about = facts(name, make(name, size), size)
        comparison = None
        if made_here(name):
            if scan_backend(cell) == "reference":  # a loop over tokens in Python
                raise NotAvailable(f"no kernel of the selective scan for {cell.dtype} on this {cell.device} device")
            comparison = accuracy.worst(verify(cell, name))
            if not comparison.passed:
                return Entrant(name, "as made", about, comparison=comparison)
        posed = _with_gradients(cell, problem(cell, name, size))
        # As "fused": nothing is forced, so that scans run on their kernel.
        contender = replace(workloads.make_contender("fused", cell, posed), name=name)
        contender = captured(contender) if cell.graph else contender
    except Exception as error:  # a model of timm may refuse this size, dtype or device
        return Entrant(name, "as made", about, failure=workloads.failure(error))
    return Entrant(name, "as made", about, contender, comparison)


def _variant(cell: Cell) -> list[Entrant]:
    workload = workloads.build(cell)
    about = facts(cell.label, make(cell.label, cell.shape.image_size), cell.shape.image_size)
    found = []
    built = {contender.name: contender for contender in workload.contenders}
    for how in cell.contenders:
        named = replace(built[how], name=f"{cell.label} {how}") if how in built else None
        checked = accuracy.worst(workloads.verify(cell)) if how == "fused" and named else None
        found.append(Entrant(cell.label, how, about, named, checked, workload.failures.get(how)))
    return found


def entrants(found: Against) -> list[Entrant]:
    """MambaOut's variants, then the others; each one checked."""
    own = [entrant for cell in found.cells for entrant in _variant(cell)]
    return own + [_other(found.cells[0], name, found.image_size) for name in found.others]


def nearest(parameters: int, variants: Mapping[str, int]) -> str:
    """The variant of the same size class: whose number of parameters is nearest, as a ratio."""
    return min(variants, key=lambda name: abs(math.log(parameters / variants[name])))
