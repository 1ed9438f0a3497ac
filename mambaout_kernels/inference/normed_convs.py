"""The stem and what stands between stages, of a frozen network on a GPU: convolutions with bias, norm and activation.

Narrow ones of 16 bits are one kernel; others are cuDNN's without their biases, before a kernel that adds them,
normalises and activates (ops/conv_norm.py).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.plain import activation_name
from ..ops.conv_norm import NARROW_CONV, conv3x3s2_norm_act, layer_norm_act, pack_conv
from ..reference import activation
from .parts import refuse_gradients


class NormedConv(nn.Module):
    """act(layer_norm(conv(x))): x (N, in_channels, H, W) to (N, H/2, W/2, out_channels), contiguous.

    Without norm, act(conv(x)).
    """

    def __init__(self, conv: Any, norm: Any, act: nn.Module | None):
        super().__init__()
        self.stride, self.padding, self.normed = conv.stride, conv.padding, norm is not None
        self.eps = norm.eps if self.normed else 0.0
        self.act = "identity" if act is None else str(activation_name(act))
        weight = conv.weight.detach()
        like = weight[:, 0, 0, 0]
        self.own = self.normed and weight.dtype.itemsize == 2 and weight.shape[0] <= NARROW_CONV
        packed = pack_conv(weight) if self.own else weight.contiguous(memory_format=torch.channels_last)
        for name, t, otherwise in (
            ("weight", packed, None),
            ("bias", conv.bias, torch.zeros_like(like)),
            ("norm_weight", getattr(norm, "weight", None), torch.ones_like(like)),
            ("norm_bias", getattr(norm, "bias", None), torch.zeros_like(like)),
        ):
            self.register_buffer(name, otherwise if t is None else t.detach())

    def forward(self, x: Tensor) -> Tensor:
        b: Any = self
        if self.own:
            return conv3x3s2_norm_act(x, b.weight, b.bias, b.norm_weight, b.norm_bias, self.eps, self.act)
        x = x.contiguous(memory_format=torch.channels_last)
        if not self.normed:
            y = F.conv2d(x, b.weight, b.bias, self.stride, self.padding).permute(0, 2, 3, 1)
            return activation(y, self.act).contiguous()
        y = F.conv2d(x, b.weight, None, self.stride, self.padding).permute(0, 2, 3, 1)
        return layer_norm_act(y, b.bias, b.norm_weight, b.norm_bias, self.eps, self.act)

    def extra_repr(self) -> str:
        return f"out_channels={self.get_buffer('bias').shape[0]}, normed={self.normed}, act={self.act}"


class NormedStem(nn.Module):
    """Images (N, in_chans, H, W) to (N, H/4, W/4, dim): two convolutions of stride 2, their norms, and act between."""

    def __init__(self, stem: Any):
        super().__init__()
        self.first = NormedConv(stem.conv1, stem.norm1, stem.act)
        self.second = NormedConv(stem.conv2, stem.norm2, None)

    def forward(self, x: Tensor) -> Tensor:
        refuse_gradients(x)
        y: Tensor = self.second(self.first(x).permute(0, 3, 1, 2))
        return y


class NormedDownsample(nn.Module):
    """(N, H, W, in_dim) to (N, H/2, W/2, dim): a convolution of stride 2, and its norm after or before it."""

    def __init__(self, conv: Any, norm: Any, norm_first: bool):
        super().__init__()
        self.norm: nn.Module = norm if norm_first else nn.Identity()
        self.conv = NormedConv(conv, None if norm_first else norm, None)

    def forward(self, x: Tensor) -> Tensor:
        refuse_gradients(x)
        y: Tensor = self.conv(self.norm(x).permute(0, 3, 1, 2))
        return y
