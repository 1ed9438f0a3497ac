"""Parts of a frozen network on packed weights: each is one op, made from modules that computed the same."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..backends import cpu
from ..nn.eligibility import GatedCNNBlock
from ..nn.plain import activation_name, layer_scale_of
from ..ops import conv3x3s2 as conv_op
from ..ops import gated_cnn_blocks as blocks_op
from ..ops.head import head


def refuse_gradients(x: Tensor) -> None:
    tangent = forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None
    if tangent or (torch.is_grad_enabled() and x.requires_grad):
        raise RuntimeError(
            "x requires a gradient, which an inference model does not compute: call the model that it was made from"
        )


def _multiply_bf16(dtype: torch.dtype) -> bool:
    """As torch.set_float32_matmul_precision asks: "medium" allows fp32 products in bf16, the others do not."""
    wanted = dtype == torch.bfloat16 or torch.get_float32_matmul_precision() == "medium"
    return wanted and cpu.multiplies_bf16()


class PackedPart(nn.Module):
    """A part with packed weights, as buffers. What was packed for another instruction set is packed again on load."""

    packed_names: tuple[str, ...] = ("packed",)
    _runs: Callable[[Tensor], bool]
    _repack: Callable[[Tensor], Tensor]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.adapt()

    def adapt(self) -> None:
        """Pack again for the instruction set in use where that is another.

        Raises:
            RuntimeError: what is packed is damaged.
        """
        for name in self.packed_names:
            packed = getattr(self, name)
            if not self._runs(packed):
                setattr(self, name, self._repack(packed))


class PackedBlocks(PackedPart):
    """Gated CNN blocks that follow each other: x (N, H, W, dim) to the same shape and dtype."""

    packed: Tensor
    _runs, _repack = staticmethod(blocks_op.runs), staticmethod(blocks_op.repack)

    def __init__(self, blocks: Sequence[GatedCNNBlock], dtype: torch.dtype):
        super().__init__()
        self.count, self.dim = len(blocks), blocks[0].dim
        self.register_buffer("packed", blocks_op.join([_pack_block(block, dtype) for block in blocks]))

    def forward(self, x: Tensor) -> Tensor:
        refuse_gradients(x)
        return blocks_op.gated_cnn_blocks(x, self.packed)

    def extra_repr(self) -> str:
        return f"{self.count} blocks, dim={self.dim}, {self.packed.numel()} bytes"


def _pack_block(block: GatedCNNBlock, dtype: torch.dtype) -> Tensor:
    norm, fc1, conv, fc2 = (cast(Any, m) for m in (block.norm, block.fc1, block.conv, block.fc2))
    return blocks_op.pack(
        norm.weight, norm.bias, fc1.weight, fc1.bias, getattr(conv, "weight", None), getattr(conv, "bias", None),
        fc2.weight, fc2.bias, layer_scale_of(block.ls), eps=norm.eps, act=str(activation_name(block.act)),
        bf16=_multiply_bf16(dtype),
    )  # fmt: skip


def _pack_conv(conv: Any, norm: Any, act: nn.Module | None, dtype: torch.dtype) -> Tensor:
    return conv_op.pack(
        conv.weight, conv.bias, getattr(norm, "weight", None), getattr(norm, "bias", None), normed=norm is not None,
        eps=0.0 if norm is None else norm.eps, act="identity" if act is None else str(activation_name(act)),
        bf16=_multiply_bf16(dtype),
    )  # fmt: skip


class PackedStem(PackedPart):
    """Images (N, in_chans, H, W) to (N, H/4, W/4, dim): two convolutions of stride 2, their norms, and act between."""

    packed1: Tensor
    packed2: Tensor
    packed_names = ("packed1", "packed2")
    _runs, _repack = staticmethod(conv_op.runs), staticmethod(conv_op.repack)

    def __init__(self, stem: Any, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.mid_channels, self.dim = stem.conv1.out_channels, stem.conv2.out_channels
        self.register_buffer("packed1", _pack_conv(stem.conv1, stem.norm1, stem.act, dtype))
        self.register_buffer("packed2", _pack_conv(stem.conv2, stem.norm2, None, dtype))

    def forward(self, x: Tensor) -> Tensor:
        refuse_gradients(x)
        x = conv_op.conv3x3s2(x.permute(0, 2, 3, 1), self.packed1, self.mid_channels, self.dtype)
        return conv_op.conv3x3s2(x, self.packed2, self.dim, self.dtype)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class PackedDownsample(PackedPart):
    """(N, H, W, in_dim) to (N, H/2, W/2, dim): a convolution of stride 2, and its norm after or before it."""

    packed: Tensor
    _runs, _repack = staticmethod(conv_op.runs), staticmethod(conv_op.repack)

    def __init__(self, conv: Any, norm: Any, norm_first: bool, dtype: torch.dtype):
        super().__init__()
        self.dtype, self.dim = dtype, conv.out_channels
        self.norm: nn.Module = norm if norm_first else nn.Identity()
        self.register_buffer("packed", _pack_conv(conv, None if norm_first else norm, None, dtype))

    def forward(self, x: Tensor) -> Tensor:
        refuse_gradients(x)
        return conv_op.conv3x3s2(self.norm(x), self.packed, self.dim, self.dtype)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class FusedHead(nn.Module):
    """The last map (N, H, W, channels) to logits (N, classes): mean, norm, fc1, GELU, norm if there is one, fc2."""

    norm_weight: Tensor | None
    norm_bias: Tensor | None
    fc1_weight: Tensor
    fc1_bias: Tensor | None
    mid_weight: Tensor | None
    mid_bias: Tensor | None
    fc2_weight: Tensor | None
    fc2_bias: Tensor | None

    def __init__(self, norm: Any, fc1: Any, mid_norm: Any, fc2: Any, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.eps, self.mid_eps = norm.eps, 0.0 if mid_norm is None else mid_norm.eps
        self.mid_normed = mid_norm is not None
        for name, module in (("norm", norm), ("fc1", fc1), ("mid", mid_norm), ("fc2", fc2)):
            for kind in ("weight", "bias"):
                given = getattr(module, kind, None)
                self.register_buffer(f"{name}_{kind}", None if given is None else given.detach().clone())

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        refuse_gradients(x)
        fc2_weight, fc2_bias = (None, None) if pre_logits else (self.fc2_weight, self.fc2_bias)
        return head(
            x, self.norm_weight, self.norm_bias, self.fc1_weight, self.fc1_bias, self.mid_weight, self.mid_bias,
            fc2_weight, fc2_bias, self.eps, self.mid_eps, self.mid_normed, self.dtype,
        )  # fmt: skip
