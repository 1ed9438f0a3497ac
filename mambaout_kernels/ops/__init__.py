"""The operators: schema, fake kernel and gradients of each, on tensors alone."""

from . import flops  # noqa: F401 - registers its formulas
from .gated_dwconv import gated_dwconv

__all__ = ["gated_dwconv"]
