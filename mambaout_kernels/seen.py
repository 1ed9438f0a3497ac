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

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
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


class Seen:
    """What a call found, by which the next one is told to be its like.

    Args:
        children: `_modules` of the module that called.
        modules: those whose type, hooks and parameters count; in `children` or not.
        settings: attributes that count, of whichever of the modules has them.
        parameters: what was packed.
        x: what the call was given.
        arguments: what the native op was given besides.
    """

    def __init__(
        self,
        children: dict[str, Any],
        modules: Iterable[nn.Module],
        settings: Sequence[str],
        parameters: Iterable[Tensor | None],
        x: Tensor,
        arguments: tuple[Any, ...],
    ):
        self.arguments = arguments
        self._mode = _mode(x)
        modules, packed = list(modules), [p for p in parameters if p is not None]
        self._types = [(m, type(m)) for m in modules]
        self._empty = [getattr(m, name) for m in modules for name in _HOOKS]
        self._entries = [(children, name, child) for name, child in children.items()]
        for m in modules:
            attributes = vars(m)
            self._entries += [(attributes, name, attributes.get(name, ...)) for name in (*_HOOKS, *settings, "forward")]
            self._entries += [(m._parameters, name, p) for name, p in m._parameters.items()]
        self._tensors = [
            (p, p.data_ptr(), None if p.is_inference() else p._version, p.dtype, p.stride()) for p in packed
        ]
        self._memory = [(p.data_ptr(), p.numel() * p.element_size() if p.is_contiguous() else 0, 0) for p in packed]
        self._fingerprint = cpu.fingerprint(self._memory)
        self._lasting = all(bytes for _, bytes, _ in self._memory)

    def again(self, x: Tensor) -> bool:
        """Whether the modules, asked for x, would do what they did."""
        return (
            self._lasting
            and not observed()
            and _mode(x) == self._mode
            and cpu.unchanged(self._entries, self._types, self._empty, self._tensors)
            and cpu.fingerprint(self._memory) == self._fingerprint
        )
