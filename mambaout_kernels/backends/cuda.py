"""The compiled CUDA C++ kernels (csrc/cuda): NVIDIA GPUs of compute capability 8.0 and later."""

import functools
import re
from typing import Any

import torch
from torch import Tensor

from ..reference import ACTIVATIONS

_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
_ACT_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}
_MIN_CAPABILITY = (8, 0)


@functools.cache
def unavailable() -> str | None:
    """Why the CUDA C++ kernels cannot be used here; None where they can. Loads the module where there is a GPU."""
    if torch.version.hip is not None:
        return "they are for NVIDIA GPUs, and this torch is for AMD's"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < _MIN_CAPABILITY:
        return f"they need compute capability 8.0; {torch.cuda.get_device_name()} has {capability[0]}.{capability[1]}"
    try:
        _ops()
    except ImportError as error:
        return (
            f"the compiled module cannot be loaded ({error}); with nvcc, from the sources: "
            "pip install cmake ninja pybind11 'setuptools>=77' && pip install --no-build-isolation ."
        )
    if not has_code_for(_architectures(), capability):
        return f"the compiled module is for {_architectures()}; {torch.cuda.get_device_name()} needs another"
    return None


def has_code_for(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether a build for these architectures, as CMake writes them, runs on a GPU of this compute capability.

    "90-real" is machine code, for 9.x from 9.0 on; "120" has PTX besides, for everything newer. An "a" binds to the
    very architecture, an "f" to its generation.
    """
    wanted = 10 * capability[0] + capability[1]
    for number, kind, real in re.findall(r"(\d+)([af]?)(-real)?", architectures):
        built = int(number)
        if kind == "a" and wanted == built:
            return True
        if kind != "a" and wanted >= built and (wanted // 10 == built // 10 or not (kind or real)):
            return True
    return False


@functools.cache
def _architectures() -> str:
    from .. import _C_cuda

    return _C_cuda.build_info()["architectures"]


@functools.cache
def _runs_on(device_index: int) -> bool:
    capability = torch.cuda.get_device_capability(device_index)
    return capability >= _MIN_CAPABILITY and has_code_for(_architectures(), capability)


@functools.cache
def _ops() -> tuple[Any, Any]:
    import mambaout_kernels._C_cuda  # noqa: F401  (registers them; relative, its absence would read as a circular import)

    native = torch.ops.mambaout_kernels
    return native.gated_dwconv_cuda.default, native.gated_dwconv_backward_cuda.default


def supports(u: Tensor, weight: Tensor) -> bool:
    """fp32, bf16 and fp16 on CUDA devices that the build has machine code or PTX for."""
    return u.is_cuda and u.dtype in _DTYPES and _runs_on(u.device.index)


def gated_dwconv(u: Tensor, weight: Tensor, bias: Tensor, act: str) -> Tensor:
    """y (N, H, W, D), contiguous, for any strides; the compiled op refuses what it cannot run."""
    return _ops()[0](u, weight, bias, _ACT_CODES[act])


def gated_dwconv_backward(
    dy: Tensor, u: Tensor, weight: Tensor, bias: Tensor, act: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(du, dweight, dbias), contiguous, for any strides; the compiled op refuses what it cannot run."""
    return _ops()[1](dy, u, weight, bias, _ACT_CODES[act])
