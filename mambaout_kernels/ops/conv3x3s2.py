"""What stands between the stages as one op, for inference on the CPU, on packed weights.

    out = act(layer_norm(conv3x3(x))),   stride 2, zero padding of 1, channels last

csrc/torch/conv3x3s2.cpp defines the op; see gated_cnn_blocks.py for packed tensors.
"""

import torch
from torch import Tensor

from ..backends import cpu
from ..backends.checks import check_devices
from ..backends.namespace import NAMESPACE, ops


def pack(
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    *,
    normed: bool,
    eps: float,
    act: str,
    bf16: bool = False,
) -> Tensor:
    """A convolution's weights as the kernels of the instruction set in use read them: a vector of bytes.

    Args:
        weight: (out_channels, in_channels, 3, 3). bias, norm_weight, norm_bias: (out_channels,), or None.
        normed: whether there is a LayerNorm after it, with this eps. act: as for gated_dwconv.
        bf16: multiply in bfloat16, where the instruction set in use does.

    Raises:
        RuntimeError: a wrong shape, dtype or act.
    """
    return ops.pack_conv3x3s2(weight, bias, norm_weight, norm_bias, normed, eps, act, bf16)


def repack(packed: Tensor) -> Tensor:
    """The same convolution for the instruction set in use, whichever it was packed for."""
    return ops.repack_conv3x3s2(packed)


def runs(packed: Tensor) -> bool:
    """Whether the instruction set in use is the one that it is packed for."""
    return bool(ops.runs_packed_conv3x3s2(packed))


def conv3x3s2(x: Tensor, packed: Tensor, out_channels: int, dtype: torch.dtype) -> Tensor:
    """x (N, H, W, in_channels), float32 or bfloat16, any strides, to (N, ceil(H / 2), ceil(W / 2), out_channels).

    Raises:
        RuntimeError: a wrong x, out_channels or dtype (float32 or bfloat16, of the result); weights that are damaged,
            or packed for another instruction set.
    """
    return ops.conv3x3s2.default(x, packed, out_channels, dtype)


def _fake(x: Tensor, packed: Tensor, out_channels: int, dtype: torch.dtype) -> Tensor:
    check_devices(x, packed)
    return x.new_empty((x.shape[0], (x.shape[1] + 1) // 2, (x.shape[2] + 1) // 2, out_channels), dtype=dtype)


if cpu.unavailable() is None:
    torch.library.register_fake(f"{NAMESPACE}::conv3x3s2", _fake)
