"""The decorator of what is launched."""

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl


def kernel(function: Callable[..., None]) -> Any:
    """triton.jit, with one variant for all sizes and strides.

    By default Triton compiles anew where an integer becomes 1, or a multiple of 16. What matters of that is VEC here.
    """
    parameters = inspect.signature(function).parameters.values()
    sizes = [p.name for p in parameters if p.annotation is not tl.constexpr and not p.name.endswith("_ptr")]
    return triton.jit(function, do_not_specialize=sizes)
