"""The Triton kernels: not written yet."""

from torch import Tensor


def unavailable() -> str | None:
    """Why the Triton kernels cannot be used."""
    return "the Triton kernels are not part of this version"


def supports(u: Tensor, weight: Tensor) -> bool:
    """Nothing yet."""
    return False
