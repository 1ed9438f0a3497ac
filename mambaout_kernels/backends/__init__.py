"""Which backend runs a call: the only place that knows what is available.

A backend is a module with `unavailable`, `supports`, `gated_dwconv` and `gated_dwconv_backward`. It takes tensors with
any strides, and refuses what is not valid (`mambaout_kernels.checks`) before it touches memory.
"""

import functools
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor

from . import preferences

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
    package = "mambaout_kernels" if name == "reference" else __name__
    return cast(Backend, import_module(f"{package}.{name}"))


def status() -> dict[str, str | None]:
    """Every backend by name, with the reason why it cannot be used on this machine, or None where it can."""
    return {name: load(name).unavailable() for name in NAMES}


def _usable(name: str) -> str:
    reason = load(name).unavailable()
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot be used here: {reason}")
    return name


# Process-wide, not per thread: the backward of a forced forward may run on autograd's own threads.
_forced: str | None = os.environ.get(ENVIRONMENT_VARIABLE) or None
if _forced is not None and _forced not in NAMES:
    raise ValueError(f"{ENVIRONMENT_VARIABLE} must be one of {', '.join(NAMES)}, got {_forced!r}")


def forced() -> str | None:
    """The backend that `force` or the environment asks for, or None."""
    return _forced


@contextmanager
def force(name: str) -> Iterator[None]:
    """Run every call of the process on one backend inside the `with` block.

    Raises ValueError for an unknown name and RuntimeError for a backend that cannot be used here.
    """
    global _forced
    previous, _forced = _forced, _usable(name)
    try:
        yield
    finally:
        _forced = previous


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
    if _forced is not None:
        return _select_forced(_forced, u, weight)
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


def preferred(device_type: str) -> str:
    """The name of the backend that calls on this type of device run on, as far as the device alone decides."""
    if _forced is not None:
        return _forced
    available = _no_kernels.get(device_type, "none") is None
    return _CANDIDATES[device_type][0] if available and len(_CANDIDATES[device_type]) == 1 else "reference"


def uses_reference(device_type: str) -> bool:
    """Whether calls on this type of device run as plain PyTorch: forced to, or for lack of anything faster.

    Warns once per type of device on which a compiled or Triton backend could be had.
    """
    if _forced is not None:
        return _forced == "reference"
    if device_type not in _no_kernels:
        return True
    reason = _no_kernels[device_type]
    if reason is not None and not torch.compiler.is_compiling():
        _warn_once(f"mambaout_kernels runs its PyTorch reference on {device_type} tensors ({reason})")
    return reason is not None
