"""The operators: schema, fake kernel and gradients of each, on tensors alone."""

from .gated_dwconv import gated_dwconv

__all__ = ["gated_dwconv"]
