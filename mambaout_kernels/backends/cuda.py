"""The CUDA C++ kernels: not written yet."""

from torch import Tensor


def unavailable() -> str | None:
    """Why the CUDA C++ kernels cannot be used."""
    return "the CUDA C++ kernels are not part of this version"


def supports(u: Tensor, weight: Tensor) -> bool:
    """Nothing yet."""
    return False
