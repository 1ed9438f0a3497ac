"""Layers for the `kernels` package, whose `kernelize` puts their forward in the place of a model's own.

Such a layer has no parameters and no constructor: `self` is the module whose forward it replaces.
"""

from typing import Any

from torch import Tensor, nn

from .nn.block import branch


class GatedConvBlock(nn.Module):
    """timm's block of this name, (N, H, W, dim) to the same: its middle runs as the fused op."""

    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        block: Any = self
        return block.drop_path(branch(block, x)) + x
