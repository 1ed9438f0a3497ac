"""Tensors to kernel arguments: strides, tiles, grids, outputs."""

import functools
import math
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

from ... import reference
from . import tiles
from .backward import gate_backward, input_gradient
from .conv import PACK_BLOCK, pack_filter
from .forward import gated_dwconv_fwd
from .weight_gradient import weight_gradient_partials, weight_gradient_sum

_SUM_BLOCK = 32
_LARGEST_OFFSET = 2**31 - 1


@functools.cache
def architecture(device: torch.device) -> str:
    """The name by which tiles.json knows a device: sm_90, gfx942; "any" under the interpreter."""
    if device.type != "cuda":
        return "any"
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def _guard(u: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(u.device) if u.is_cuda else nullcontext()


def _nhwc(x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """x with channel stride 1, and its other strides; those of dimensions of one element, which are free, as 0."""
    if x.stride(3) != 1 and x.shape[3] > 1:
        x = x.contiguous()
    n, h, w = (stride if size > 1 else 0 for stride, size in zip(x.stride()[:3], x.shape[:3], strict=True))
    return x, (n, h, w)


def _vector(u: Tensor, *counts: int) -> int:
    """The largest power of two that divides all of them, up to as many elements as an access takes."""
    return math.gcd(tiles.VECTOR_BYTES // u.element_size(), *counts)


def _aligned(vector: int, u: Tensor) -> bool:
    """Whether accesses of 16 bytes are, when so many elements divide all offsets."""
    return vector * u.element_size() == tiles.VECTOR_BYTES


def _too_wide(K: int, rows: int, W: int, D: int, *strides: tuple[int, int, int]) -> bool:
    """Whether a tile with its halo spans more elements than 32-bit offsets reach."""
    return any((rows + K) * (h + W * D) + K * w + 2 * D > _LARGEST_OFFSET for _, h, w in strides)


def _pack(weight: Tensor, bias: Tensor) -> tuple[Tensor, int]:
    """The filter as conv.py reads it, and how many blocks of channels its rows are long."""
    C, taps = weight.shape[0], weight.shape[2] * weight.shape[3]
    blocks = triton.cdiv(C, PACK_BLOCK.value)
    packed = torch.empty((taps + 1, blocks * PACK_BLOCK.value), dtype=torch.float32, device=weight.device)
    if C:
        pack_filter[(taps + 1, blocks)](weight.contiguous(), bias.contiguous(), packed, C, taps, blocks)
    return packed, blocks


def _blocks(tile: tiles.Tile, shape: tuple[int, int, int], *channels: int) -> tuple[int, int, int, int]:
    """(programs, columns, channel blocks, blocks of columns)."""
    N, H, W = shape
    along_d, along_w = sum(triton.cdiv(c, tile.block_d) for c in channels), triton.cdiv(N * W, tile.block_w)
    return along_d * along_w * triton.cdiv(H, tile.block_h), N * W, along_d, along_w


def _constants(tile: tiles.Tile, K: int) -> dict[str, int]:
    return {"K": K, "BLOCK_H": tile.block_h, "BLOCK_W": tile.block_w, "BLOCK_D": tile.block_d, **tile.options()}


def forward(u: Tensor, weight: Tensor, bias: Tensor, act: str) -> Tensor:
    """y of valid inputs."""
    (N, H, W, _), D, C, K = u.shape, u.shape[3] // 2, weight.shape[0], weight.shape[2]
    y = torch.empty((N, H, W, D), dtype=u.dtype, device=u.device)
    if y.numel() == 0:
        return y
    u, strides = _nhwc(u)
    vector = _vector(u, D, C, *strides)
    aligned = _aligned(vector, u)
    tile = tiles.choose(architecture(u.device), "forward", u.element_size() * 8, W, K, aligned)
    if _too_wide(K, tile.block_h, W, D, strides):
        return reference.gated_dwconv(u, weight, bias, act).contiguous()
    programs, *blocks = _blocks(tile, (N, H, W), C, D - C)
    with _guard(u):
        taps, pack_blocks = _pack(weight, bias)
        gated_dwconv_fwd[(programs,)](
            u, taps, y, H, W, D, C, pack_blocks, *strides, *blocks,
            ACT=act, VEC=vector, STAGES=tile.stages, **_constants(tile, K),
        )  # fmt: skip
    return y


def backward(dy: Tensor, u: Tensor, weight: Tensor, bias: Tensor, act: str) -> tuple[Tensor, Tensor, Tensor]:
    """(du, dweight, dbias) of valid inputs."""
    (N, H, W, _), D, C, K = u.shape, u.shape[3] // 2, weight.shape[0], weight.shape[2]
    if u.numel() == 0:
        return u.new_empty(u.shape), weight.new_zeros(weight.shape), bias.new_zeros(bias.shape)
    (dy, dy_strides), (u, strides) = _nhwc(dy), _nhwc(u)
    vector = _vector(u, D, C, *dy_strides, *strides)
    choose = functools.partial(
        tiles.choose, architecture(u.device), bits=u.element_size() * 8, width=W, K=K, aligned=_aligned(vector, u)
    )
    tile = choose("gate_backward")
    if _too_wide(K, tile.block_h, W, 2 * D, strides, dy_strides):
        return reference.gated_dwconv_backward(dy, u, weight, bias, act)
    du = torch.empty((N, H, W, 2 * D), dtype=u.dtype, device=u.device)
    e = torch.empty((N, H, W, C), dtype=u.dtype, device=u.device)
    with _guard(u):
        taps, pack_blocks = _pack(weight, bias)
        programs, *blocks = _blocks(tile, (N, H, W), C, D - C)
        gate_backward[(programs,)](
            dy, u, taps, du, e, H, W, D, C, pack_blocks, *dy_strides, *strides, *blocks,
            ACT=act, VEC=vector, STAGES=tile.stages, **_constants(tile, K),
        )  # fmt: skip
        if C == 0:
            return du, weight.new_zeros(weight.shape), bias.new_zeros(bias.shape)
        tile = choose("input_gradient")
        programs, *blocks = _blocks(tile, (N, H, W), C)
        input_gradient[(programs,)](
            e, taps, du, H, W, D, C, pack_blocks, *blocks, VEC=vector, **_constants(tile, K)
        )  # fmt: skip
        return du, *_weight_gradient(e, u, strides, weight, bias, choose("weight_gradient"), vector)


def _weight_gradient(
    e: Tensor,
    u: Tensor,
    strides: tuple[int, int, int],
    weight: Tensor,
    bias: Tensor,
    tile: tiles.Tile,
    vector: int,
) -> tuple[Tensor, Tensor]:
    (N, H, W, C), D, K = e.shape, u.shape[3] // 2, weight.shape[2]
    group, items = tiles.group(K), triton.cdiv(N * W, tile.block_w)
    channel_programs = triton.cdiv(C, tile.block_d) * (K // group)
    # As many shares as fill the device, and equal ones: from the shape alone, so that sums keep their order.
    shares = triton.cdiv(items, triton.cdiv(items * channel_programs, tile.programs))
    taps = K * K
    partials = torch.empty((shares, taps + 1, C), dtype=torch.float32, device=u.device)
    weight_gradient_partials[(channel_programs, shares)](
        e, u, partials, items, H, W, D, C, *strides, N * W, K=K, GROUP=group, VEC=min(vector, tile.per_thread()),
        BLOCK_W=tile.block_w, BLOCK_D=tile.block_d, **tile.options(),
    )  # fmt: skip
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=u.device)
    dbias = torch.empty(bias.shape, dtype=bias.dtype, device=u.device)
    weight_gradient_sum[(taps + 1, triton.cdiv(C, _SUM_BLOCK))](
        partials, dweight, dbias, shares, C, taps, VEC=1 if C % 4 else 4, BLOCK_P=_SUM_BLOCK, BLOCK_D=_SUM_BLOCK
    )
    return dweight, dbias
