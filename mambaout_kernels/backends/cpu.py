"""The compiled CPU kernels (csrc/cpu): AMX, AVX-512, AVX2 or portable, chosen when the module loads."""

import os
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from ..reference import ACTIVATIONS
from .namespace import PACKAGE, ops

_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
_ACT_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}

module: ModuleType | None
try:
    # By `from .. import`, its absence would read as "a circular import".
    module, _reason = import_module("._C", PACKAGE), None
    _forward = ops.gated_dwconv_cpu.default
    _backward = ops.gated_dwconv_backward_cpu.default
except ImportError as error:
    module = None
    _reason = (
        f"the compiled module cannot be loaded ({error}); with a C++ compiler, from the sources: "
        "pip install cmake ninja pybind11 'setuptools>=77' && pip install --no-build-isolation ."
    )


def _after_fork() -> None:
    """In the child. OpenMP's threads stayed with the parent, and what needs them waits for ever: compute without them.

    That goes for PyTorch's operators, too. Where no thread was ever started, nothing is changed.
    """
    if module is not None and module.started_threads():
        torch.set_num_threads(1)


if module is not None and hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def unavailable() -> str | None:
    """Why the compiled CPU kernels cannot be used here; None where they can."""
    return _reason


def supports(u: Tensor, weight: Tensor) -> bool:
    """fp32, bf16, fp16 and fp64 on the CPU."""
    return u.device.type == "cpu" and u.dtype in _DTYPES


def gated_dwconv(u: Tensor, weight: Tensor, bias: Tensor, act: str) -> Tensor:
    """y (N, H, W, D), contiguous, for any strides; the compiled op refuses what it cannot run."""
    return _forward(u, weight, bias, _ACT_CODES[act])


def gated_dwconv_backward(
    dy: Tensor, u: Tensor, weight: Tensor, bias: Tensor, act: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(du, dweight, dbias), contiguous, for any strides; the compiled op refuses what it cannot run."""
    return _backward(dy, u, weight, bias, _ACT_CODES[act])


def instruction_set() -> str:
    """The instruction set in use: packed weights are for one."""
    assert module is not None
    return str(module.cpu_capability())


def multiplies_bf16() -> bool:
    """Whether the instruction set in use multiplies bfloat16 in what is packed; if not, it multiplies float32."""
    return module is not None and module.cpu_capability() in ("avx512_bf16", "amx_bf16")
