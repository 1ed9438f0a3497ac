"""The Triton kernels (triton_kernels/): CUDA and ROCm tensors, compiled at the first call of each shape class.

With TRITON_INTERPRET=1, set before the first import of triton, they run on CPU tensors in Triton's interpreter: slow,
for tests.
"""

import functools
import os
from importlib.util import find_spec

import torch
from torch import Tensor

from .checks import check, check_gradient

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST = (8, 0)  # Ampere: what the tiles are made for, and the first with bfloat16


def interpreting() -> bool:
    """Whether kernels run on CPU tensors in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def unavailable() -> str | None:
    """Why the Triton kernels cannot be used here; None where they can. Does not import triton."""
    if find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if interpreting():
        return None
    if not torch.cuda.is_available():
        return "torch sees no CUDA or ROCm device"
    capabilities = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    if max(capabilities) < _OLDEST and not torch.version.hip:
        return f"its kernels need a GPU of compute capability 8.0 or newer; this one has {capabilities[0]}"
    return None


@functools.cache
def _recent(device_index: int) -> bool:
    return torch.version.hip is not None or torch.cuda.get_device_capability(device_index) >= _OLDEST


def _runs_on(device_type: str, index: int) -> bool:
    return _recent(index) if device_type == "cuda" else interpreting() and device_type == "cpu"


def usable_on(device_type: str, index: int) -> bool:
    """Whether the kernels can be used on this device."""
    return unavailable() is None and _runs_on(device_type, index)


# Compilers call it as they trace, and keep what it says.
usable_on._dynamo_marked_constant = True  # type: ignore[attr-defined]


def supports(u: Tensor, weight: Tensor | None = None) -> bool:
    """fp32, bf16 and fp16 on CUDA and ROCm; on the CPU under the interpreter alone."""
    return u.dtype in DTYPES and _runs_on(u.device.type, u.device.index)


def check_runs(x: Tensor) -> None:
    """RuntimeError where kernels cannot run on such an x, of a dtype that they take."""
    if x.layout != torch.strided or not supports(x):
        raise RuntimeError(
            f"x must be a plain tensor on a GPU that Triton runs on; got {x.layout} on {x.device} "
            f"({unavailable() or 'a GPU that is too old, or no GPU'})"
        )


def gated_dwconv(u: Tensor, weight: Tensor, bias: Tensor, act: str) -> Tensor:
    """y (N, H, W, D), contiguous, for any strides."""
    check(u, weight, bias, act)
    from .triton_kernels import launch

    return launch.forward(u, weight, bias, act)


def gated_dwconv_backward(
    dy: Tensor, u: Tensor, weight: Tensor, bias: Tensor, act: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(du, dweight, dbias), contiguous, for any strides. The same bits in every run: no atomics."""
    check(u, weight, bias, act)
    check_gradient(dy, u)
    from .triton_kernels import launch

    return launch.backward(dy, u, weight, bias, act)
