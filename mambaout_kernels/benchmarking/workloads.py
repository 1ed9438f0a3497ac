"""What is timed: the op, a block or a model, each as the contenders do it, and whether ours computes the same.

fused            this package, on the best backend for the device; blocks and models in mode fwd by
                 optimize_for_inference, but under autocast
fused-graphs     models in mode fwd by optimize_for_inference(..., cuda_graphs=True)
modules          this package's drop-in modules in mode fwd, with weights as they lie
cuda, triton     this package, on this backend
compile-fused    torch.compile of fused
eager            the same modules as separate PyTorch operations ("eager partial": C of D channels convolved)
cudnn-benchmark  eager, where cuDNN chooses its algorithms by trying them
naive            the paper's baseline before partial convolution: all D channels convolved, PyTorch operations
compile          torch.compile of eager
max-autotune     the same, where inductor tries templates of kernels
timm, timm-channels-last, timm-compile   timm's model with the same weights
timm-reduce-overhead   torch.compile of it that replays CUDA graphs
and peers, other runtimes (peers.py), for the forward of blocks and models on the CPU
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from .. import backends
from ..inference import optimize_for_inference
from ..models import ACTIVATION_LAYERS, VARIANTS, create_model
from ..nn import FusedGatedCNNBlock
from ..ops import gated_dwconv
from ..weights.checkpoints import to_timm
from . import accuracy, error_bounds, inputs, peers
from .shapes import Shape
from .timing import Contender, captured

SUBJECTS = ("op", "block", "model")
MODES = {
    "fwd": "forward, under inference_mode",
    "bwd": "backward alone, after a forward that is not timed",
    "train": "forward and backward",
}
CONTENDERS = {
    "fused": "fused", "fused-graphs": "fused, CUDA graphs", "modules": "drop-in modules",
    "cuda": "CUDA C++", "triton": "Triton",
    "compile-fused": "torch.compile of fused",
    "eager": "eager partial", "cudnn-benchmark": "eager, cudnn.benchmark", "naive": "naive full-channel",
    "compile": "torch.compile", "max-autotune": "torch.compile, max-autotune",
    "timm": "timm", "timm-channels-last": "timm, channels_last", "timm-compile": "torch.compile of timm",
    "timm-reduce-overhead": "torch.compile of timm, CUDA graphs",
    **peers.NAMES,
}  # fmt: skip
FORCED = ("cuda", "triton")
OWN = ("fused", "fused-graphs", "modules", *FORCED, "compile-fused")
_COMPILED = {"compile": "default", "compile-fused": "default", "timm-compile": "default",
             "timm-reduce-overhead": "reduce-overhead", "max-autotune": "max-autotune-no-cudagraphs"}  # fmt: skip
MAY_FAIL = (*_COMPILED, *FORCED, *peers.NAMES)  # named with the reason then; of the others, that is an error
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
NOT_AVAILABLE = "not available"
CHECKED_BATCH = 2  # fp64 is slow; every sample takes the same path


@dataclass(frozen=True)
class Cell:
    """One comparison: one subject in one mode, dtype, batch and shape (a stage; for a model its whole variant)."""

    subject: str
    mode: str
    dtype: str
    batch: int
    shape: Shape
    contenders: tuple[str, ...] = ("fused", "eager", "naive")
    autocast: bool = False  # parameters stay fp32, PyTorch casts
    source: str = "random"
    device: str = "cpu"
    graph: bool = False  # every contender a CUDA graph that is replayed

    @property
    def label(self) -> str:
        """The shape in words: 56x56x96, or the variant for a model."""
        return self.shape.variant if self.subject == "model" else self.shape.label


@dataclass(frozen=True)
class Problem:
    """A differentiable function of `leaves`, on fixed inputs: what the contenders of a cell are made from."""

    forward: Callable[[], Tensor]
    leaves: dict[str, Tensor]  # what a training step differentiates by
    module: nn.Module | None = None  # where forward is module(x)
    x: Tensor | None = None


@dataclass(frozen=True)
class Workload:
    """The contenders of a cell, and why one could not be built, by its name."""

    contenders: list[Contender]
    failures: dict[str, str]


@contextmanager
def running(cell: Cell, name: str) -> Iterator[None]:
    """The context a contender runs in; all but ours run the reference. On CUDA without TF32, ours and theirs."""
    with ExitStack() as stack:
        if name in FORCED:
            stack.enter_context(backends.force(name))
        elif name not in OWN:
            stack.enter_context(backends.force("reference"))
        if cell.device == "cuda":
            tries = name == "cudnn-benchmark"
            stack.enter_context(torch.backends.cudnn.flags(enabled=True, benchmark=tries, allow_tf32=False))
        if cell.autocast:
            stack.enter_context(torch.autocast(cell.device, DTYPES[cell.dtype]))
        if cell.mode == "fwd":
            stack.enter_context(torch.inference_mode())
        yield


def stored_dtype(cell: Cell) -> torch.dtype:
    """Of parameters and inputs."""
    return torch.float32 if cell.autocast else DTYPES[cell.dtype]


def _op_problem(cell: Cell, full_channel: bool, dtype: torch.dtype) -> Problem:
    u, weight, bias = inputs.op_inputs(cell.shape, cell.batch, cell.source, full_channel)
    leaves = {
        name: t.to(cell.device, stored_dtype(cell)).to(dtype).requires_grad_(cell.mode != "fwd")
        for name, t in (("u", u), ("weight", weight), ("bias", bias))
    }
    return Problem(lambda: gated_dwconv(leaves["u"], leaves["weight"], leaves["bias"], cell.shape.act), leaves)


def _block_problem(cell: Cell, full_channel: bool, dtype: torch.dtype) -> Problem:
    variant = VARIANTS[cell.shape.variant]
    block = FusedGatedCNNBlock(
        cell.shape.dim,
        expansion_ratio=variant.expansion_ratio,
        kernel_size=cell.shape.kernel_size,
        conv_ratio=variant.expansion_ratio if full_channel else variant.conv_ratio,
        act_layer=ACTIVATION_LAYERS[variant.act_layer],
        ls_init_value=variant.ls_init_value,
    )
    x = inputs.block_input(cell.shape, cell.batch, cell.source)
    return _module_problem(cell, block, x, dtype, wrt_input=True)


def _model_problem(cell: Cell, full_channel: bool, dtype: torch.dtype) -> Problem:
    name = cell.shape.variant
    overrides = {"conv_ratio": VARIANTS[name].expansion_ratio} if full_channel else {}
    model = create_model(name, **overrides).train(cell.mode != "fwd")
    images = inputs.images(cell.batch, cell.shape.image_size, cell.source)
    return _module_problem(cell, model, images, dtype, wrt_input=False)


def _module_problem(cell: Cell, module: nn.Module, x: Tensor, dtype: torch.dtype, wrt_input: bool) -> Problem:
    stored = stored_dtype(cell)
    module = inputs.enlivened(module).to(cell.device, stored).to(dtype)
    x = x.to(cell.device, stored).to(dtype).requires_grad_(wrt_input and cell.mode != "fwd")
    leaves: dict[str, Tensor] = dict(module.named_parameters())
    if wrt_input:
        leaves["x"] = x
    return Problem(partial(module, x), leaves, module, x)


_PROBLEMS = {"op": _op_problem, "block": _block_problem, "model": _model_problem}


def problem(cell: Cell, full_channel: bool = False, dtype: torch.dtype | None = None) -> Problem:
    """The cell's function on its inputs; in fp64, the same (rounded) values in fp64."""
    return _PROBLEMS[cell.subject](cell, full_channel, dtype or stored_dtype(cell))


def gradient_of(y: Tensor) -> Tensor:
    """A fixed random dy for this y."""
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.device, y.dtype)


def make_contender(name: str, cell: Cell, posed: Problem) -> Contender:
    """The problem in the cell's mode, in the context of the contender of this name."""
    context = partial(running, cell, name)
    if cell.mode == "fwd":
        return Contender(name, lambda _: posed.forward(), context=context)
    with context():
        dy = gradient_of(posed.forward())
    leaves = list(posed.leaves.values())
    if cell.mode == "train":
        return Contender(name, lambda _: torch.autograd.grad(posed.forward(), leaves, dy), context=context)
    return Contender(name, lambda y: torch.autograd.grad(y, leaves, dy), posed.forward, context)


def _compiled(posed: Problem, mode: str) -> Problem:
    torch.compiler.reset()  # else shapes met before make this one dynamic
    return replace(posed, forward=torch.compile(posed.forward, fullgraph=True, dynamic=False, mode=mode))


def optimized(cell: Cell, posed: Problem, cuda_graphs: bool = False) -> Problem:
    """What "fused" runs: in inference, a frozen copy of the module."""
    if posed.module is None or cell.mode != "fwd" or cell.autocast:
        return posed
    module = optimize_for_inference(posed.module, cuda_graphs=cuda_graphs)
    return Problem(partial(module, posed.x), posed.leaves, module, posed.x)


def _own(name: str, cell: Cell, posed: Problem) -> Problem:
    """What one of ours runs."""
    if name in ("fused", "fused-graphs", "compile-fused"):
        posed = optimized(cell, posed, name == "fused-graphs")
    return _compiled(posed, _COMPILED[name]) if name in _COMPILED else posed


def _timm_problem(cell: Cell, ours: Problem, channels_last: bool) -> Problem:
    """timm's model with our model's weights, on its images.

    Raises:
        peers.NotAvailable: the cell is no model's, or timm is not installed.
    """
    if cell.subject != "model" or find_spec("timm") is None:
        raise peers.NotAvailable("of models, where timm is installed")
    import timm

    assert ours.module is not None
    assert ours.x is not None
    model = timm.create_model(cell.shape.variant)
    model.load_state_dict(to_timm(ours.module.state_dict()))
    model = model.to(ours.x.device, ours.x.dtype).train(ours.module.training)
    x = ours.x.contiguous(memory_format=torch.channels_last) if channels_last else ours.x
    return Problem(partial(model, x), dict(model.named_parameters()), model, x)


def _peer(name: str, cell: Cell, folder: Path) -> Contender:
    """A peer on the cell's model and inputs in fp32, which it rounds itself; compared with eager before it is timed.

    Raises:
        peers.NotAvailable: it does not compute in the cell's dtype. ValueError: its output is wrong.
    """
    posed = problem(in_fp32(cell))
    assert posed.module is not None
    assert posed.x is not None
    module, x = posed.module, posed.x
    run = peers.build(name, lambda: peers.export(folder, export_name(cell), module.eval(), x), x, cell.dtype)
    y = run()[:CHECKED_BATCH].clone()  # a runtime may write over its last output
    eager, exact = references(cell)
    found = accuracy.compare("y", y.to(eager.dtype), eager, exact, slack=peers.SLACK)
    if not found.passed:
        raise ValueError(f"its output is wrong: {found}")
    return Contender(name, lambda _: run(), context=partial(running, cell, name))


def in_fp32(cell: Cell) -> Cell:
    """The same in fp32: what other runtimes are given, and round themselves."""
    return replace(cell, dtype="fp32", autocast=False)


def export_name(cell: Cell) -> str:
    return f"{cell.subject}-{cell.shape.variant}-{cell.shape.stage}"


def references(cell: Cell) -> tuple[Tensor, Tensor]:
    """(eager, exact): the first samples' output by eager in the cell's dtype, and in fp64 of what is not rounded."""
    return _output(cell, problem(cell)), _output(in_fp32(cell), problem(in_fp32(cell), dtype=torch.float64))


def _output(cell: Cell, posed: Problem) -> Tensor:
    """Of the first samples, by eager."""
    assert posed.module is not None
    assert posed.x is not None
    with running(cell, "eager"):
        return posed.module(posed.x[:CHECKED_BATCH])


def _built(name: str, cell: Cell, partial_channel: Problem, folder: Path) -> Contender:
    if name in peers.NAMES:
        return _peer(name, cell, folder)
    if name in FORCED and (reason := backends.status()[name]) is not None:
        raise peers.NotAvailable(reason)
    if name == "fused-graphs" and (
        cell.device != "cuda" or cell.subject == "op" or cell.mode != "fwd" or cell.autocast
    ):
        raise peers.NotAvailable("of blocks and models in mode fwd on a GPU, outside autocast")
    if name == "modules" and (cell.subject == "op" or cell.mode != "fwd"):
        raise peers.NotAvailable("what fused is, but for blocks and models in mode fwd")
    posed = problem(cell, full_channel=True) if name == "naive" else partial_channel
    if name.startswith("timm"):
        posed = _timm_problem(cell, posed, name == "timm-channels-last")
    if name in OWN:
        posed = _own(name, cell, posed)
    elif name in _COMPILED:
        posed = _compiled(posed, _COMPILED[name])
    contender = make_contender(name, cell, posed)
    if name in _COMPILED:
        with contender.context():
            contender.run(contender.prepare())
    return captured(contender) if cell.graph else contender


def build(cell: Cell, folder: Path | None = None) -> Workload:
    """Every contender of the cell, ready to run; one that cannot be built is named with its reason instead.

    `folder` is where exported models are kept for further calls, in other processes too.
    """
    partial_channel = problem(cell)
    workload = Workload([], {})
    with TemporaryDirectory(prefix="mambaout-kernels-") as own:
        for name in cell.contenders:
            try:
                workload.contenders.append(_built(name, cell, partial_channel, folder or Path(own)))
            except Exception as error:
                if not isinstance(error, peers.NotAvailable) and name not in MAY_FAIL and not cell.graph:
                    raise
                workload.failures[name] = failure(error)
    return workload


def failure(error: Exception) -> str:
    """Why a contender is not there, as results state it."""
    if isinstance(error, peers.NotAvailable):
        return f"{NOT_AVAILABLE}: {error}"
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"


def verify(cell: Cell, name: str = "fused") -> list[accuracy.Comparison]:
    """One of ours against fp64 beside eager: the output, and unless the mode is "fwd" every gradient; at most two
    samples.

    The gradients of a model are compared as one, those of a block in both ways.
    """
    cell = replace(cell, batch=min(cell.batch, CHECKED_BATCH))
    posed = problem(cell)
    exact = results(replace(cell, autocast=False), problem(cell, dtype=torch.float64), "eager")
    actual, eager = results(cell, _own(name, cell, posed), name), results(cell, posed, "eager")
    found = [] if cell.subject == "op" else accuracy.compare_model(actual, eager, exact)
    if cell.subject != "model":
        # Without kernels ours is eager, whose convolutions in two bytes may add up in two bytes: beyond any bound.
        bounds = None if backends.uses_reference(cell.device) else _bounds(cell, posed, actual["y"])
        found += accuracy.compare_all(actual, eager, exact, bounds)
    return found


def _bounds(cell: Cell, posed: Problem, y: Tensor) -> dict[str, Tensor]:
    """Of the results of an op or a block."""
    dy = None if cell.mode == "fwd" else _upstream(cell, y)
    if cell.subject == "op":
        u, weight, bias = posed.leaves.values()
        found = error_bounds.of_op(u, weight, bias, dy, cell.shape.act)
        names = ("y", *(f"d{leaf}" for leaf in posed.leaves))
        return dict(zip(names, found, strict=dy is not None))
    low = DTYPES[cell.dtype] if cell.autocast else None
    assert posed.x is not None
    bounds = error_bounds.of_block(posed.module, posed.x, dy, low)
    return {name if name == "y" else f"d{name}": bound for name, bound in bounds.items()}


def results(cell: Cell, posed: Problem, name: str) -> dict[str, Tensor]:
    """The output "y", and unless the mode is "fwd" the gradient of every leaf, "d" and its name."""
    with running(cell, name):
        y = posed.forward()
        if cell.mode == "fwd":
            return {"y": y}
        gradients = torch.autograd.grad(y, list(posed.leaves.values()), _upstream(cell, y))
    return {"y": y, **{f"d{leaf}": t for leaf, t in zip(posed.leaves, gradients, strict=True)}}


def _upstream(cell: Cell, y: Tensor) -> Tensor:
    """dy, rounded to the cell's dtype, so that it is the same in fp64."""
    return gradient_of(y).to(DTYPES[cell.dtype]).to(y.dtype)
