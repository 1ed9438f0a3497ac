"""Odd widths: zeros between a block's weights, so that the rows of u and y fill whole 16-byte accesses.

hidden is 341, 682 and 1365 in mambaout_base. GPUs read rows that are no multiple of 16 bytes in smaller accesses, in
matrix products as in the op: on an H100 the CUDA C++ forward has 16 % of the bandwidth there, elsewhere 60. 16 bytes
are what cuBLAS and the kernels ask for; whole 128-byte lines would be up to an eighth longer, for as many tiles.

u = [g_i, 0, g_c, 0, i, 0, c, 0]: zeros are rows of fc1 and conv, and columns of fc2. act(0) * 0 = 0, so the results are
those of the block without them. A pixel that is Inf or NaN before fc1 is so in the zeros' channels as well, as it is in
all others. Parameters are read as they lie, at each call; autograd drops the gradients of the zeros.
"""

import torch
from torch import Tensor, nn

from .. import backends
from .eligibility import GatedCNNBlock, gated_dwconv_reason
from .plain import Weights, linear_weights

_ACCESS = 16  # bytes
_ALWAYS = 8  # channels that are whole accesses in every dtype of these
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def prefers_alignment(device_type: str) -> bool:
    """Whether what runs on this type of device is faster on whole accesses: GPU kernels; not those of the CPU."""
    return not backends.uses_reference(device_type) and backends.preferred(device_type) != "cpu"


def padding(dtype: torch.dtype, hidden: int, conv_channels: int) -> tuple[int, int]:
    """How many zeros make whole accesses of the identity channels, and of the conv channels."""
    if dtype not in _DTYPES:
        return 0, 0
    multiple = _ACCESS // dtype.itemsize
    return -(hidden - conv_channels) % multiple, -conv_channels % multiple


def aligned(block: GatedCNNBlock, x: Tensor) -> tuple[nn.Module | Weights, nn.Module | Weights, int | None]:
    """(fc1, fc2, None) of `block`; or what to use instead, and how many zeros then follow the conv channels.

    The latter only where the block can run as the fused op.
    """
    hidden, identity, conv_channels = block.split_indices
    odd = identity % _ALWAYS or conv_channels % _ALWAYS
    if not odd or not prefers_alignment(x.device.type):
        return block.fc1, block.fc2, None
    dtype, low = x.dtype, None
    if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
        dtype = low = torch.get_autocast_dtype(x.device.type)
    after_i, after_c = padding(dtype, hidden, conv_channels)
    plain = _plain_weights(block) if after_i or after_c else None
    if plain is None:
        return block.fc1, block.fc2, None
    fc1, fc2 = (_cast(fc, low) for fc in plain)
    gates = [(identity, after_i), (conv_channels, after_c)]
    zeros = fc1.weight.new_zeros(max(after_i, after_c), fc1.weight.shape[1])
    weight = spread(fc1.weight, 2 * gates, zeros)
    bias = None if fc1.bias is None else spread(fc1.bias, 2 * gates, zeros[:, 0])
    return Weights(weight, bias), Weights(spread(fc2.weight, gates, zeros.t(), dim=1), fc2.bias), after_c


def with_zeros(t: Tensor, pad: int) -> Tensor:
    """t, then `pad` zeros along its first dimension."""
    return torch.cat((t, t.new_zeros(pad, *t.shape[1:]))) if pad else t


def _plain_weights(block: GatedCNNBlock) -> tuple[Weights, Weights] | None:
    """Of fc1 and fc2, if they are plain linear layers of the block's widths, and act and conv run as the fused op."""
    one, two = linear_weights(block.fc1), linear_weights(block.fc2)
    if one is None or two is None or gated_dwconv_reason(block) is not None:
        return None
    hidden, dim = block.split_indices[0], two.weight.shape[0]
    fits = one.weight.shape == (2 * hidden, dim) and two.weight.shape == (dim, hidden)
    return (one, two) if fits and one.weight.dtype == two.weight.dtype else None  # zeros take fc1's


def _cast(fc: Weights, low: torch.dtype | None) -> Weights:
    """As autocast does for a linear layer, before the zeros are added: half the bytes to move."""
    if low is None or fc.weight.dtype == torch.float64:
        return fc
    return Weights(fc.weight.to(low), None if fc.bias is None else fc.bias.to(low))


def spread(t: Tensor, parts: list[tuple[int, int]], zeros: Tensor, dim: int = 0) -> Tensor:
    """t, for every (size, pad) of `parts` so many of its elements along `dim`, then so many of `zeros`.

    One launch each way: the gradient of a split is one concatenation, that of slices would be a sum of padded ones.
    """
    sizes, pads = [0], []
    for size, pad in parts:
        sizes[-1] += size
        if pad:
            pads.append(pad)
            sizes.append(0)
    pieces = list(t.split(sizes, dim))
    for at, pad in enumerate(pads):
        pieces.insert(2 * at + 1, zeros if pad == zeros.shape[dim] else zeros.narrow(dim, 0, pad))
    return torch.cat(pieces, dim)
