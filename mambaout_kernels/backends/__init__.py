"""Which backend runs a call: the only place that knows what is available.

A backend is a module with `unavailable`, `supports`, `gated_dwconv` and `gated_dwconv_backward`. It takes tensors with
any strides, and refuses what is not valid (`mambaout_kernels.checks`) before it touches memory.
"""

import functools
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import preferences
from .namespace import PACKAGE

NAMES = ("reference", "cpu", "triton", "cuda")
ENVIRONMENT_VARIABLE = "MAMBAOUT_KERNELS_BACKEND"

# In order of preference; where Triton and CUDA C++ can both run a call, preferences.json decides.
_CANDIDATES = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}


class Backend(Protocol):
    """What every backend module offers. `unavailable`: why it cannot be used here, or None."""

    def unavailable(self) -> str | None: ...
    def supports(self, u: Tensor, weight: Tensor) -> bool: ...
    def gated_dwconv(self, u: Tensor, weight: Tensor, bias: Tensor, act: str) -> Tensor: ...
    def gated_dwconv_backward(
        self, dy: Tensor, u: Tensor, weight: Tensor, bias: Tensor, act: str
    ) -> tuple[Tensor, Tensor, Tensor]: ...


@functools.cache
def load(name: str) -> Backend:
    """The backend module called `name`; ValueError for an unknown name."""
    if name not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}, got {name!r}")
    package = PACKAGE if name == "reference" else __name__
    return cast(Backend, import_module(f"{package}.{name}"))


def status() -> dict[str, str | None]:
    """Every backend by name, with the reason why it cannot be used on this machine, or None where it can."""
    return {name: load(name).unavailable() for name in NAMES}


def _usable(name: str) -> str:
    reason = load(name).unavailable()
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot be used here: {reason}")
    return name


_default: str | None = os.environ.get(ENVIRONMENT_VARIABLE) or None  # of the process
if _default is not None and _default not in NAMES:
    raise ValueError(f"{ENVIRONMENT_VARIABLE} must be one of {', '.join(NAMES)}, got {_default!r}")
_forced: ContextVar[str | None] = ContextVar("mambaout_kernels.backends.forced", default=None)
_forced_here = threading.local()  # its value, by thread: for torch.compile, which cannot trace a ContextVar before 2.14


def forced() -> str | None:
    """The backend asked for: here by `force`, or in the process by `set_default` or the environment; or None."""
    if (torch.compiler.is_exporting() or torch.jit.is_tracing()) and torch.onnx.is_in_onnx_export():
        return "reference"  # to PyTorch's own operators only
    name = getattr(_forced_here, "name", None) if torch.compiler.is_dynamo_compiling() else _forced.get()
    return name or _default


def _set_forced(name: str | None) -> None:
    _forced.set(name)
    if name is None:
        vars(_forced_here).pop("name", None)  # as in a thread that forces nothing, for one compiled graph
    else:
        _forced_here.name = name


@contextmanager
def force(name: str | None) -> Iterator[None]:
    """Run the calls inside the `with` block on one backend: those of this thread or asyncio task, and their backward.

    None leaves the choice as it is. Other threads, and the backward of functions that torch.compile made, which runs on
    threads of PyTorch on a GPU: `set_default`.

    Raises ValueError for an unknown name and RuntimeError for a backend that cannot be used here.
    """
    previous = _forced.get()
    _set_forced(previous if name is None else _usable(name))
    try:
        yield
    finally:
        _set_forced(previous)


def set_default(name: str | None) -> None:
    """Run every call of the process on one backend, but for those inside `force`; None: on the best for each call.

    Raises ValueError for an unknown name and RuntimeError for a backend that cannot be used here.
    """
    global _default
    _default = None if name is None else _usable(name)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


@functools.cache
def _available(device_type: str) -> dict[str, Backend]:
    return {name: load(name) for name in _CANDIDATES.get(device_type, ()) if load(name).unavailable() is None}


_usable_for: dict[tuple[str, int | None, torch.dtype], dict[str, Backend]] = {}


def select(u: Tensor, weight: Tensor, backward: bool = False) -> Backend:
    """The backend for a call with this u (N, H, W, 2D) and weight, forward or backward.

    The forced one; else, of the available ones that support device and dtype, the one that is (on the CPU) or is
    predicted to be (see preferences.py) the fastest; else the reference.
    """
    name = forced()
    if name is not None:
        return _select_forced(name, u, weight)
    key = (u.device.type, u.device.index, u.dtype)
    usable = _usable_for.get(key)
    if usable is None:
        found = {name: b for name, b in _available(key[0]).items() if b.supports(u, weight)}
        usable = _usable_for[key] = found or {"reference": load("reference")}
    if len(usable) == 1:
        return next(iter(usable.values()))
    return usable[preferences.preferred(u, weight, backward)]


def _select_forced(name: str, u: Tensor, weight: Tensor) -> Backend:
    backend = load(_usable(name))
    if not backend.supports(u, weight):
        raise RuntimeError(f"backend {name!r} does not support u of {u.dtype} on {u.device}")
    return backend


def _without_kernels(device_type: str) -> str | None:
    """Why no backend but the reference can be used on this type of device; None where one can."""
    if _available(device_type):
        return None
    return "; ".join(f"{name}: {load(name).unavailable()}" for name in _CANDIDATES[device_type])


# Known once the package is imported, so that a compiler that traces `uses_reference` reads constants.
_no_kernels: dict[str, str | None] = {"cpu": _without_kernels("cpu")}
if torch.cuda.is_available():
    _no_kernels["cuda"] = _without_kernels("cuda")


def _transformed() -> bool:
    """Whether a transform of torch.func or forward-mode AD is at work, which know PyTorch's own operators only."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


# Compilers call it as they trace: what torch.compiler.assume_constant_result does, which imports all of the compiler.
_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def preferred(device_type: str) -> str:
    """The name of the backend that calls on this type of device run on, as far as the device alone decides."""
    if _transformed():
        return "reference"
    name = forced()
    if name is not None:
        return name
    available = _no_kernels.get(device_type, "none") is None
    return _CANDIDATES[device_type][0] if available and len(_CANDIDATES[device_type]) == 1 else "reference"


def has_kernels(device_type: str) -> bool:
    """Whether something other than the reference may run calls on this type of device, for all that is forced."""
    name = forced()
    return name != "reference" if name is not None else _no_kernels.get(device_type, "none") is None


def uses_reference(device_type: str) -> bool:
    """Whether calls on this type of device run as plain PyTorch.

    They do where the reference is forced, under `torch.func` and forward-mode AD, and for lack of anything faster. The
    last warns once per type of device on which a compiled or Triton backend could be had.
    """
    name = forced()
    if name == "reference" or _transformed():
        return True
    if name is not None:
        return False
    if device_type not in _no_kernels:
        return True
    reason = _no_kernels[device_type]
    if reason is not None and not torch.compiler.is_compiling():
        _warn_once(f"mambaout_kernels runs its PyTorch reference on {device_type} tensors ({reason})")
    return reason is not None
