"""Modules that were found to be plain: whether they still are, told without looking at all of them again.

Whether an op on packed parameters may run in place of modules depends on dozens of attributes of theirs. For one image
that takes a thirtieth of the time of a whole model in Python, a hundredth of that here.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import backends
from .backends import cpu
from .linear import HOOKS
from .packs import Pack, kept, memory_of

_dispatch_modes: Any = getattr(torch._C, "_len_torch_dispatch_stack", None)


def _observed() -> bool:
    """Whether somebody looks at every operator that is called: a compiler, a tracer, a dispatch mode."""
    if torch.compiler.is_compiling() or _dispatch_modes is None:
        return True
    return bool(_dispatch_modes()) or torch.jit.is_tracing()


def _mode(x: Tensor) -> tuple[Any, ...]:
    """What else decides what runs on x."""
    autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    return type(x), x.dtype, x.device.type, torch.is_grad_enabled(), autocast, backends.forced(), cpu.instruction_set()


class Seen:
    """What a call found, by which the next one is told to be its like; see `remember`."""

    def __init__(
        self,
        children: dict[str, Any],
        settings: Sequence[str],
        parameters: Iterable[Tensor | None],
        x: Tensor,
        arguments: tuple[Any, ...],
    ):
        self.arguments = arguments
        self._mode = _mode(x)
        modules = [m for m in children.values() if m is not None]
        packed = [p for p in parameters if p is not None]
        self._types = [(m, type(m)) for m in modules]
        self._empty = [getattr(m, name) for m in modules for name in HOOKS]
        self._entries = [(children, name, child) for name, child in children.items()]
        for m in modules:
            attributes = vars(m)
            self._entries += [(attributes, name, attributes.get(name, ...)) for name in (*HOOKS, *settings, "forward")]
            self._entries += [(m._parameters, name, p) for name, p in m._parameters.items()]
        self._tensors = [
            (p, p.data_ptr(), None if p.is_inference() else p._version, p.dtype, p.stride()) for p in packed
        ]
        self._memory = memory_of(packed)
        self._fingerprint = cpu.fingerprint(self._memory)
        self._lasting = all(bytes for _, bytes, _ in self._memory)

    def again(self, x: Tensor) -> bool:
        """Whether the modules, asked for x, would do what they did."""
        return (
            self._lasting
            and not _observed()
            and _mode(x) == self._mode
            and cpu.unchanged(self._entries, self._types, self._empty, self._tensors)
            and cpu.fingerprint(self._memory) == self._fingerprint
        )


def remember(
    pack: Pack,
    owner: nn.Module,
    settings: Sequence[str],
    parameters: Iterable[Tensor | None],
    x: Tensor,
    *arguments: Any,
) -> None:
    """Let the next call with this pack be known, unless somebody looks at every operator.

    Args:
        pack: whose packed parameters the call used.
        owner: the module that called; the types, hooks and parameters of its children count.
        settings: attributes that count, of whichever of the children has them.
        parameters: what was packed.
        x: what the native op was given, besides the packed parameters and `arguments`.
    """
    if not _observed() and type(x) is Tensor:
        pack.seen = Seen(owner._modules, settings, parameters, x, (kept(pack), *arguments))


def known(pack: Pack, x: Tensor) -> tuple[Any, ...] | None:
    """What to give the native op after x, where everything is as it was at the last call; else None."""
    if torch.compiler.is_compiling():
        return None
    seen: Seen | None = pack.seen
    return seen.arguments if seen is not None and seen.again(x) else None
