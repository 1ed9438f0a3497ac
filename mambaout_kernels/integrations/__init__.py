"""Other people's models: `patch` and `unpatch`; timm's registry in `.timm`, which is the only module to import timm."""

from .patching import patch, unpatch

__all__ = ["patch", "unpatch"]
