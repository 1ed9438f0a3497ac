"""The compiled CUDA C++ kernels (csrc/cuda): NVIDIA GPUs of compute capability 8.0 and later."""

import functools
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
    return None


@functools.cache
def _ops() -> tuple[Any, Any]:
    from .. import _C_cuda  # noqa: F401  (registers them)

    native = torch.ops.mambaout_kernels_native
    return native.gated_dwconv_cuda.default, native.gated_dwconv_backward_cuda.default


def supports(u: Tensor, weight: Tensor) -> bool:
    """fp32, bf16 and fp16 on CUDA devices."""
    return u.device.type == "cuda" and u.dtype in _DTYPES


def gated_dwconv(u: Tensor, weight: Tensor, bias: Tensor, act: str) -> Tensor:
    """y (N, H, W, D), contiguous, for any strides; the compiled op refuses what it cannot run."""
    return _ops()[0](u, weight, bias, _ACT_CODES[act])


def gated_dwconv_backward(
    dy: Tensor, u: Tensor, weight: Tensor, bias: Tensor, act: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(du, dweight, dbias), contiguous, for any strides; the compiled op refuses what it cannot run."""
    return _ops()[1](dy, u, weight, bias, _ACT_CODES[act])
