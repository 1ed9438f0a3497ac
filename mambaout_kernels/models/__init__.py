"""The MambaOut family: one class, and a table of what its published variants are made of."""

from .mambaout import ACTIVATION_LAYERS, VARIANTS, MambaOut, Variant, create_model

__all__ = ["ACTIVATION_LAYERS", "VARIANTS", "MambaOut", "Variant", "create_model"]
