"""What torch.utils.flop_counter.FlopCounterMode counts of each op.

As of the modules that it stands for: matrix products and convolutions. Activations and norms count nothing there.
Formulas are registered when this module is imported, which optimize_for_inference does: it takes a tenth of a second.
In the drop-in modules nothing needs them, since the mode's hooks have the blocks run as PyTorch's own operators.
"""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from ..backends import cpu
from ..backends.namespace import ops
from . import conv_norm, gated_dwconv, linear, split_block  # noqa: F401 - they define their ops
from .gated_cnn_blocks import shapes

Shape = tuple[int, ...]


def _product(rows: Shape, weight: Shape) -> int:
    """Of (..., in_features) by a weight (out_features, in_features), or a filter of as many elements per pixel."""
    return 2 * torch.Size(rows[:-1]).numel() * torch.Size(weight).numel()


def _block(pixels: int, dim: int, hidden: int, conv_channels: int, kernel_size: int) -> int:
    return 2 * pixels * (3 * hidden * dim + conv_channels * kernel_size**2)


@register_flop_formula(ops.gated_dwconv)
def _gated_dwconv(u: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return _product(u, weight)


@register_flop_formula(ops.gated_dwconv_backward)
def _gated_dwconv_backward(dy: Shape, u: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    """Of the input and of the weight; the convolution that is computed again is not counted, as PyTorch's is not."""
    return 2 * _product(dy, weight)


@register_flop_formula(ops.split_gated_cnn_block)
def _split_gated_cnn_block(x: Shape, *arguments: Any, **_: Any) -> int:
    conv_weight, fc2_weight = arguments[4], arguments[7]
    (dim, hidden), (C, _, K, _) = fc2_weight, conv_weight
    return _block(torch.Size(x[:-1]).numel(), dim, hidden, C, K)


@register_flop_formula([ops.layer_norm_act, ops.layer_norm_act_backward])
def _layer_norm_act(*_: Any, **__: Any) -> int:
    return 0


@register_flop_formula(ops.conv3x3s2_norm_act)
def _conv3x3s2_norm_act(x: Shape, weight: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    return _product(out_shape, weight)


if cpu.unavailable() is None:

    @register_flop_formula(ops.linear)
    def _linear(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
        return _product(x, weight)

    @register_flop_formula(ops.linear_dx)
    def _linear_dx(dy: Shape, weight: Shape, *_: Any, **__: Any) -> int:
        return _product(dy, weight)

    @register_flop_formula(ops.linear_dweight)
    def _linear_dweight(dy: Shape, x: Shape, *_: Any, **__: Any) -> int:
        return _product(dy, (dy[-1], x[-1]))

    @register_flop_formula(ops.head)
    def _head(x: Shape, *arguments: Any, **_: Any) -> int:
        fc1_weight, fc2_weight = arguments[2], arguments[6]
        rows = (x[0], 0)
        return _product(rows, fc1_weight) + (0 if fc2_weight is None else _product(rows, fc2_weight))

    @register_flop_formula(ops.conv3x3s2, get_raw=True)
    def _conv3x3s2(x: Tensor, packed: Tensor, out_channels: int, *_: Any, out_val: Tensor, **__: Any) -> int:
        return _product(out_val.shape, (out_channels, x.shape[-1], 3, 3))

    @register_flop_formula(ops.gated_cnn_blocks, get_raw=True)
    def _gated_cnn_blocks(x: Tensor, packed: Tensor, *_: Any, **__: Any) -> int:
        """0 of weights without numbers, which do not tell their sizes."""
        if not packed.is_cpu or isinstance(packed, FakeTensor):
            return 0
        return sum(_block(x.shape[:-1].numel(), *sizes) for _, *sizes in shapes(packed))
