"""The modules of a MambaOut: plain mathematics on the ops, with weights read as they lie at each call."""

from .block import FusedGatedCNNBlock

__all__ = ["FusedGatedCNNBlock"]
