"""Fused kernels for MambaOut (CVPR 2025, arXiv 2405.07992): the Gated CNN block and its models."""

from . import interrupt  # isort: skip - before torch is imported

with interrupt.errors_are_sentences():  # of the environment
    from . import backends
from . import layers
from .inference import InferenceModel, load_inference_model, optimize_for_inference
from .integrations import patch, unpatch
from .models import VARIANTS, MambaOut, create_model
from .nn import FusedGatedCNNBlock
from .ops import gated_dwconv
from .version import __version__
from .weights.pretrained import from_pretrained

__all__ = [
    "VARIANTS",
    "FusedGatedCNNBlock",
    "InferenceModel",
    "MambaOut",
    "__version__",
    "backends",
    "create_model",
    "from_pretrained",
    "gated_dwconv",
    "layers",
    "load_inference_model",
    "optimize_for_inference",
    "patch",
    "unpatch",
]
