"""Gated CNN blocks of a frozen network on a GPU, whose hidden channels stay out of memory (ops/split_block.py).

float32 weights are rounded to TF32 where torch.set_float32_matmul_precision allows it when the model is optimized.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import backends
from ..backends import triton
from ..nn.alignment import padding, spread, with_zeros
from ..nn.eligibility import GatedCNNBlock, gated_cnn_block_reason
from ..nn.plain import activation_name, layer_scale_of
from ..ops.conv_norm import WIDEST
from ..ops.split_block import pack_filter, round_weight, split_gated_cnn_block
from .parts import refuse_gradients


def unavailable(device: torch.device) -> str | None:
    """Why blocks cannot be split on this device; None where they can."""
    if device.type != "cuda" and not (device.type == "cpu" and triton.interpreting()):
        return f"blocks are split on GPUs, not on {device.type}"
    if backends.forced() not in (None, "triton"):
        return f"the backend {backends.forced()!r} is asked for"
    reason = triton.unavailable()
    if reason is None and not triton.supports(torch.empty(0, dtype=torch.float32, device=device)):
        reason = "its kernels need a GPU of compute capability 8.0 or newer"
    return reason


def split_reason(block: GatedCNNBlock, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a block is not split."""
    reason = gated_cnn_block_reason(block, dtype, device, triton.DTYPES)
    if reason is None and block.dim > WIDEST:
        reason = f"dim is {block.dim}, above {WIDEST}"
    return reason


class SplitBlock(nn.Module):
    """One Gated CNN block: x (N, H, W, dim) to the same shape and dtype. Weights in its dtype; widths that are odd for
    16-byte accesses are filled up with zeros."""

    def __init__(self, block: GatedCNNBlock, dtype: torch.dtype):
        super().__init__()
        norm, fc1, conv, fc2 = (cast(Any, m) for m in (block.norm, block.fc1, block.conv, block.fc2))
        hidden, identity, conv_channels = block.split_indices
        self.dim, self.eps, self.act = block.dim, norm.eps, str(activation_name(block.act))
        after_i, after_c = padding(dtype, hidden, conv_channels)
        parts, like = [(identity, after_i), (conv_channels, after_c)], fc1.weight.detach()
        conv_weight = conv.weight if conv_channels else like.new_zeros(0, 1, 1, 1)
        conv_bias = conv.bias if conv_channels else like.new_zeros(0)
        zeros = like.new_zeros(max(after_i, after_c), self.dim)

        def given(t: Tensor | None, size: int, fill: float = 0.0) -> Tensor:
            return like.new_full((size,), fill) if t is None else t

        fc1_bias = given(fc1.bias, 2 * hidden)
        for name, t in (
            ("norm_weight", given(norm.weight, self.dim, 1.0)), ("norm_bias", given(norm.bias, self.dim)),
            ("fc1_weight", round_weight(spread(fc1.weight.detach(), 2 * parts, zeros))),
            ("fc1_bias", spread(fc1_bias, 2 * parts, zeros[:, 0])),
            ("conv_weight", with_zeros(conv_weight, after_c)), ("conv_bias", with_zeros(conv_bias, after_c)),
            ("fc2_weight", round_weight(spread(fc2.weight.detach(), parts, zeros.t(), dim=1))),
            ("fc2_bias", given(fc2.bias, self.dim)),
            ("scale", layer_scale_of(block.ls)),
        ):  # fmt: skip
            self.register_buffer(name, None if t is None else t.detach().contiguous())
        self.register_buffer("taps", pack_filter(self.get_buffer("conv_weight"), self.get_buffer("conv_bias")))

    def forward(self, x: Tensor) -> Tensor:
        refuse_gradients(x)
        b: Any = self
        return split_gated_cnn_block(
            x, b.norm_weight, b.norm_bias, b.fc1_weight, b.fc1_bias, b.conv_weight, b.conv_bias, b.taps, b.fc2_weight,
            b.fc2_bias, b.scale, self.eps, self.act,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"dim={self.dim}, hidden={self.get_buffer('fc2_weight').shape[1]}, act={self.act}"


class SplitBlocks(nn.Sequential):
    """Such blocks one after the other."""

    def __init__(self, blocks: Sequence[GatedCNNBlock], dtype: torch.dtype):
        super().__init__(*(SplitBlock(block, dtype) for block in blocks))
