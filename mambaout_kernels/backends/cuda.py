"""The compiled CUDA C++ kernels (csrc/cuda): NVIDIA GPUs of compute capability 8.0 and later."""

import functools
import re
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..reference import ACTIVATIONS
from .namespace import PACKAGE, ops

_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
_ACT_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}
_MIN_CAPABILITY = (8, 0)
# Of the depthwise convolution alone: csrc/cuda/depthwise.h and gated_dwconv_cuda.h have the same.
_DEPTHWISE_KERNEL_SIZE = 7
_PACKET_BYTES = 16
_MOST_CHANNELS, _MOST_PIXELS, _MOST_SPACING, _MOST_IN_A_ROW = 2**20, 2**31 - 1024, 2**24, 2**31 - 1


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
def _ops() -> tuple[Any, Any, Any]:
    import_module("._C_cuda", PACKAGE)  # registers them
    return ops.gated_dwconv_cuda.default, ops.gated_dwconv_backward_cuda.default, ops.depthwise_cuda.default


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


def supports_depthwise(x: Tensor, weight: Tensor) -> bool:
    """Whether `depthwise` takes them: what `supports` asks for, filters of 7 x 7, and pixels that are evenly spaced and
    begin and end at multiples of 16 bytes, as a slice of channels of a wider tensor may have them."""
    return supports(x, weight) and _reads_depthwise(x, weight)


def _reads_depthwise(x: Tensor, weight: Tensor) -> bool:
    N, H, W, C = x.shape
    if weight.shape != (C, 1, _DEPTHWISE_KERNEL_SIZE, _DEPTHWISE_KERNEL_SIZE):
        return False
    if weight.dtype not in (x.dtype, torch.float32) or not _fits_depthwise(N, H, W, C):
        return False
    if x.numel() == 0:
        return True
    spacing, packet = _pixel_spacing(x), _PACKET_BYTES // x.element_size()
    return (
        x.stride(3) == 1
        and 0 <= spacing <= _MOST_SPACING
        and C % packet == spacing % packet == 0
        and x.data_ptr() % _PACKET_BYTES == 0
    )


def _fits_depthwise(N: int, H: int, W: int, C: int) -> bool:
    return C <= _MOST_CHANNELS and N * H * W <= _MOST_PIXELS and W * C <= _MOST_IN_A_ROW


def _pixel_spacing(x: Tensor) -> int:
    """Elements from one pixel to the next where all are evenly spaced; otherwise -1."""
    spacing, pixels = -1, 1
    for dim in (2, 1, 0):
        if x.shape[dim] == 1:
            continue
        spacing = x.stride(dim) if spacing < 0 else spacing
        if x.stride(dim) != pixels * spacing:
            return -1
        pixels *= x.shape[dim]
    return x.shape[3] if spacing < 0 else spacing


def depthwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """dwconv(x) + bias (N, H, W, C), contiguous, without gate or identity channels: zero padding, sums in fp32, the
    bias added last, rounded once. weight (C, 1, 7, 7) and bias (C,) in x's dtype or fp32. The compiled op refuses, with
    RuntimeError, what `supports_depthwise` says no to; it copies nothing of x."""
    return _ops()[2](x, weight, bias)
