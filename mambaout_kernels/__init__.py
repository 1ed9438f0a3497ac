"""Fused kernels for MambaOut (CVPR 2025, arXiv 2405.07992): the Gated CNN block and its models."""

from . import backends
from .block import FusedGatedCNNBlock
from .integrations import patch, unpatch
from .models import VARIANTS, MambaOut, create_model
from .ops import gated_dwconv
from .pretrained import from_pretrained
from .version import __version__

__all__ = [
    "VARIANTS",
    "FusedGatedCNNBlock",
    "MambaOut",
    "__version__",
    "backends",
    "create_model",
    "from_pretrained",
    "gated_dwconv",
    "patch",
    "unpatch",
]
