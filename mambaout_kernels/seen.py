"""Modules that were found to be plain: whether they still are, told without looking at all of them again.

Whether an op on packed parameters may run in place of modules depends on dozens of attributes of theirs. For one image
that takes a thirtieth of the time of a whole model in Python, a hundredth of that here.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from . import backends
from .backends import cpu
from .linear import HOOKS
from .packs import Pack, kept, memory_of

_dispatch_modes: Any = getattr(torch._C, "_len_torch_dispatch_stack", None)


def observed() -> bool:
    """Whether somebody looks at every operator that is called: a compiler, a tracer, a dispatch mode."""
    if torch.compiler.is_compiling() or _dispatch_modes is None:
        return True
    return bool(_dispatch_modes()) or torch.jit.is_tracing()


def _mode(x: Tensor) -> tuple[Any, ...]:
    """What else decides what runs on x."""
    autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    return type(x), x.dtype, x.device.type, torch.is_grad_enabled(), autocast, backends.forced(), cpu.instruction_set()


@dataclass
class Objects:
    """What an answer depends on, as cpu.snapshot takes it."""

    entries: list[tuple[dict[str, Any], str, Any]] = field(default_factory=list)
    types: list[tuple[Any, type]] = field(default_factory=list)
    sizes: list[tuple[Any, int]] = field(default_factory=list)
    tensors: list[tuple[Any, ...]] = field(default_factory=list)
    memory: list[tuple[int, int, int]] = field(default_factory=list)

    def add_called(self, modules: Iterable[nn.Module], settings: Sequence[str] = ()) -> None:
        """Modules whose class's forward has to be all that calling them does; and attributes of theirs."""
        for m in modules:
            attributes = vars(m)
            self.types.append((m, type(m)))
            self.sizes += [(getattr(m, name), 0) for name in HOOKS]
            self.entries += [(attributes, name, attributes.get(name, ...)) for name in (*HOOKS, *settings, "forward")]

    def add_entries(self, entries: dict[str, Any]) -> None:
        self.entries += [(entries, name, value) for name, value in entries.items()]

    def add_tensors(self, tensors: Iterable[Tensor]) -> None:
        self.tensors += [
            (t, t.data_ptr(), None if t.is_inference() else t._version, t.dtype, t.stride()) for t in tensors
        ]

    def add(self, other: "Objects") -> None:
        for part in fields(self):
            getattr(self, part.name).extend(getattr(other, part.name))


class Seen:
    """What a call with x found, by which the next one is told to be its like."""

    def __init__(self, objects: Objects, x: Tensor, arguments: tuple[Any, ...]):
        self.objects = objects
        self.arguments = arguments
        self._mode = _mode(x)
        self._snapshot = cpu.snapshot(*(getattr(objects, part.name) for part in fields(objects)))
        self._lasting = all(bytes for _, bytes, _ in objects.memory)

    def again(self, x: Tensor) -> bool:
        """Whether the modules, asked for x, would do what they did."""
        return self._lasting and not observed() and _mode(x) == self._mode and bool(self._snapshot.holds())


Run = Callable[..., Tensor]  # of a native op: (x, *arguments)


class Recording:
    """Native ops that ran one after the other, each on what the one before gave."""

    def __init__(self) -> None:
        self.steps: list[tuple[Run, Seen]] = []
        self.first: Tensor | None = None
        self.last: Tensor | None = None
        self.chained = True

    def add(self, run: Run, seen: Seen, x: Tensor, y: Tensor) -> None:
        if self.first is None:
            self.first = x
        else:
            self.chained = self.chained and x is self.last
        self.last = y
        self.steps.append((run, seen))


_recordings = threading.local()


@contextmanager
def recording() -> Iterator[Recording]:
    """What runs inside, in this thread."""
    before = getattr(_recordings, "now", None)
    _recordings.now = Recording()
    try:
        yield _recordings.now
    finally:
        _recordings.now = before


def _record(run: Run, seen: Seen, x: Tensor, y: Tensor) -> None:
    now: Recording | None = getattr(_recordings, "now", None)
    if now is not None:
        now.add(run, seen, x, y)


def remember(
    pack: Pack,
    owners: Iterable[nn.Module],
    settings: Sequence[str],
    parameters: Iterable[Tensor | None],
    run: Run,
    x: Tensor,
    y: Tensor,
    *arguments: Any,
    packed: bool = True,
) -> None:
    """Let the next call with this pack be known, unless somebody looks at every operator.

    Args:
        pack: whose packed parameters the call used.
        owners: the modules that called; the types, hooks and parameters of their children count.
        settings: attributes that count, of whichever of the children has them.
        parameters: what was packed, or what the op reads.
        run, x, y: the native op, what it was given besides the packed parameters and `arguments`, and what it gave.
        packed: whether parameters were; if not, the op reads them as they are at each call, and takes only `arguments`.
    """
    if observed() or type(x) is not Tensor:
        return
    objects = Objects()
    for children in (owner._modules for owner in owners):
        modules = [m for m in children.values() if m is not None]
        objects.add_entries(children)
        objects.add_called(modules, settings)
        for m in modules:
            objects.add_entries(m._parameters)
    tensors = [p for p in parameters if p is not None]
    objects.add_tensors(tensors)
    if packed:
        objects.memory += memory_of(tensors)
    pack.seen = Seen(objects, x, (kept(pack), *arguments) if packed else arguments)
    _record(run, pack.seen, x, y)


def again(pack: Pack, run: Run, x: Tensor) -> Tensor | None:
    """What the native op gives for x, where everything is as it was at the last call with this pack; else None."""
    if torch.compiler.is_compiling():
        return None
    seen: Seen | None = pack.seen
    if seen is None or not seen.again(x):
        return None
    y = run(x, *seen.arguments)
    _record(run, seen, x, y)
    return y
