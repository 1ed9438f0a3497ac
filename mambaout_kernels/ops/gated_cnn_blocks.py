"""Whole Gated CNN blocks as one op, for inference on the CPU, on packed weights.

    out = x + ls(fc2(act(g) * concat(i, dwconv(c)))),   [g, i, c] = fc1(layer_norm(x))

Rows of x go through all of a block while they are in cache: the 2 * hidden channels of fc1's output are never written
to memory. csrc/torch/gated_cnn_blocks.cpp defines the op; a packed tensor begins with what it is and for which
instruction set (csrc/torch/packed.h).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import cpu
from ..backends.checks import check_devices
from ..backends.namespace import NAMESPACE, ops


def pack(
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    scale: Tensor | None,
    *,
    eps: float,
    act: str,
    bf16: bool = False,
) -> Tensor:
    """One block's weights as the kernels of the instruction set in use read them: a vector of bytes.

    Args:
        norm_weight, norm_bias, fc2_bias, scale (layer scale): (dim,). fc1_weight: (2 * hidden, dim), fc1_bias.
        conv_weight: (conv_channels, 1, K, K), K odd, 1 to 31; conv_bias. fc2_weight: (dim, hidden). float32 or
            bfloat16; None for what is not there.
        eps: of the norm. act: as for gated_dwconv.
        bf16: multiply in bfloat16, where the instruction set in use does (`cpu.multiplies_bf16`).

    Raises:
        RuntimeError: a wrong shape, dtype or act.
    """
    return ops.pack_gated_cnn_block(
        norm_weight, norm_bias, fc1_weight, fc1_bias, conv_weight, conv_bias, fc2_weight, fc2_bias, scale, eps, act,
        bf16,
    )  # fmt: skip


def join(packed: Sequence[Tensor]) -> Tensor:
    """Blocks that run one after the other, as one packed tensor."""
    return ops.join_packed(list(packed))


def repack(packed: Tensor) -> Tensor:
    """The same blocks for the instruction set in use, whichever they were packed for."""
    return ops.repack_gated_cnn_blocks(packed)


def runs(packed: Tensor) -> bool:
    """Whether the instruction set in use is the one that they are packed for."""
    return bool(ops.runs_packed_gated_cnn_blocks(packed))


def shapes(packed: Tensor) -> list[tuple[int, ...]]:
    """Of each block, or of a convolution, in packed weights that are not damaged: which op it is of, and its sizes.

    These are fields of PackedHeader (csrc/torch/packed.h), which is 16 numbers of 8 bytes.
    """
    found, words = [], packed.view(torch.int64)
    while words.numel():
        op, count, sizes = words[2], words[6], words[10:14]
        found.append((int(op), *sizes.tolist()))
        words = words[int(count) // 8 :]
    return found


def gated_cnn_blocks(x: Tensor, packed: Tensor) -> Tensor:
    """x (N, H, W, dim), float32 or bfloat16, any strides, through the packed blocks: the same shape and dtype.

    Raises:
        RuntimeError: a wrong x; weights that are damaged, or packed for another instruction set.
    """
    return ops.gated_cnn_blocks.default(x, packed)


def _fake(x: Tensor, packed: Tensor) -> Tensor:
    check_devices(x, packed)
    return x.new_empty(x.shape)


if cpu.unavailable() is None:
    torch.library.register_fake(f"{NAMESPACE}::gated_cnn_blocks", _fake)
