"""Fused kernels for MambaOut (CVPR 2025, arXiv 2405.07992): the Gated CNN block and its models."""

from . import backends
from .block import FusedGatedCNNBlock
from .models import VARIANTS, MambaOut, create_model
from .ops import gated_dwconv
from .version import __version__

__all__ = ["VARIANTS", "FusedGatedCNNBlock", "MambaOut", "__version__", "backends", "create_model", "gated_dwconv"]
