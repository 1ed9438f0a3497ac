"""Tensors to the kernels of block.py. Inputs are valid, contiguous and of one dtype."""

import torch
import triton
from torch import Tensor

from . import block_tiles, tiles
from .block import conv3x3s2_norm_fwd, depthwise_fwd, gated_linear_fwd, gated_mlp_fwd, layer_norm_fwd, norm_linear_fwd
from .conv import PACK_BLOCK
from .launch import _aligned, _blocks, _constants, _guard, _pack, _vector, architecture
from .layer_norm_backward import layer_norm_bwd
from .weight_gradient import weight_gradient_sum

_SUM_ROWS, _SUM_COLUMNS = 256, 16  # of partial sums, at a time
TAPS_BLOCK = int(PACK_BLOCK.value)  # rows of `pack_filter` are multiples of it


def precision(x: Tensor) -> str:
    """Of products of x: those of 16 bits are exact; float32 is as torch.set_float32_matmul_precision says."""
    exact = x.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


def _tile(kernel: str, x: Tensor) -> block_tiles.BlockTile:
    return block_tiles.choose(architecture(x.device), kernel, 8 * x.element_size(), x.shape[-1])


def _conv_tile(x: Tensor, dim: int) -> block_tiles.BlockTile:
    kernel = "image_conv" if x.shape[1] < 16 else "conv3x3s2_norm"
    return block_tiles.choose(architecture(x.device), kernel, 8 * x.element_size(), dim)


def pack_filter(weight: Tensor, bias: Tensor) -> Tensor:
    """weight (C, 1, K, K) and bias as `depthwise` reads them."""
    with _guard(weight):
        return _pack(weight, bias)[0]


def round_tf32(t: Tensor) -> Tensor:
    """float32 numbers to the nearest of TF32, ties away from zero: so weights must be before tensor cores cut them."""
    nearest = ((t.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
    return torch.where(t.abs() < 3.4e38, nearest, t)


def layer_norm(
    x: Tensor, gamma: Tensor, beta: Tensor, eps: float,
    x_bias: Tensor | None = None, act: str = "identity", factor: bool = False, dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """act(layer_norm(x + x_bias)): x (..., dim), contiguous. factor: of products, that may be in TF32."""
    dim = x.shape[-1]
    y, P = torch.empty_like(x, dtype=dtype), x.numel() // dim
    tile, (k0, k1) = _tile("layer_norm", x), block_tiles.parts(dim)
    if P:
        with _guard(x):
            layer_norm_fwd[(triton.cdiv(P, tile.block_m),)](
                x, x if x_bias is None else x_bias, gamma, beta, y, P, eps, DIM=dim, K0=k0, K1=k1,
                BIASED=x_bias is not None, ACT=act, PRECISION=precision(x) if factor else "ieee",
                BLOCK_M=tile.block_m, **tile.options(),
            )  # fmt: skip
    return y


def layer_norm_backward(
    dy: Tensor, x: Tensor, gamma: Tensor, beta: Tensor, eps: float, act: str, normed: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dgamma, dbeta, layer_norm(x) if `normed`) of act(layer_norm(x)): dy and x (..., dim), contiguous.

    The same bits in every run: no atomics.
    """
    dim = x.shape[-1]
    dx, P = torch.empty_like(x), x.numel() // dim
    y = torch.empty_like(dy) if normed else dy.new_empty(0)
    if not P:
        return dx, gamma.new_zeros(dim), beta.new_zeros(dim), y
    dgamma, dbeta = torch.empty_like(gamma), torch.empty_like(beta)
    tile, (k0, k1) = _tile("layer_norm_backward", x), block_tiles.parts(dim)
    blocks = triton.cdiv(P, tile.block_m)
    programs = block_tiles.programs_of_backward(blocks)
    partials = torch.empty((programs, 2, dim), dtype=torch.float32, device=x.device)
    with _guard(x):
        layer_norm_bwd[(programs,)](
            dy, x, gamma, beta, dx, y, partials, P, triton.cdiv(blocks, programs), eps, DIM=dim, K0=k0, K1=k1,
            ACT=act, NORMED=normed, BLOCK_M=tile.block_m, **tile.options(),
        )  # fmt: skip
        weight_gradient_sum[(2, triton.cdiv(dim, _SUM_COLUMNS))](
            partials, dgamma, dbeta, programs, dim, 1, VEC=1 if dim % 4 else 4, BLOCK_P=_SUM_ROWS,
            BLOCK_D=_SUM_COLUMNS,
        )  # fmt: skip
    return dx, dgamma, dbeta, y


def conv3x3s2_norm(
    x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, eps: float, act: str
) -> Tensor:
    """act(layer_norm(conv(x) + bias)), (N, OH, OW, dim): x (N, C, H, W) of 16 bits, weight (9 * C, dim)."""
    (N, C, H, W), dim = x.shape, weight.shape[1]
    OH, OW = (H + 1) // 2, (W + 1) // 2
    y, P = x.new_empty((N, OH, OW, dim)), N * OH * OW
    nhwc = x.is_contiguous(memory_format=torch.channels_last)
    tile, (k0, k1) = _conv_tile(x, dim), block_tiles.parts(dim)
    if P:
        with _guard(x):
            conv3x3s2_norm_fwd[(triton.cdiv(P, tile.block_m),)](
                x, weight, bias, gamma, beta, y, P, H, W, OH, OW, *(x.stride(i) for i in (0, 2, 3, 1)), eps, C=C,
                DIM=dim, K0=k0, K1=k1, ACT=act, NHWC=nhwc, BLOCK_M=tile.block_m, BLOCK_K=tile.block_k,
                STAGES=tile.stages, **tile.options(),
            )  # fmt: skip
    return y


def norm_linear(x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """layer_norm(x) weight^T + bias: x (..., dim), weight (out_features, dim)."""
    dim, N = x.shape[-1], weight.shape[0]
    y, P = x.new_empty((*x.shape[:-1], N)), x.numel() // dim
    tile, (k0, k1) = _tile("norm_linear", x), block_tiles.parts(dim)
    if P and N:
        with _guard(x):
            norm_linear_fwd[(triton.cdiv(P, tile.block_m),)](
                x, gamma, beta, weight, bias, y, P, eps, N=N, DIM=dim, K0=k0, K1=k1, PRECISION=precision(x),
                BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, **tile.options(),
            )  # fmt: skip
    return y


def depthwise(x: Tensor, taps: Tensor, K: int) -> Tensor:
    """dwconv(x) + bias: x (N, H, W, C), of filters as pack_filter gives them."""
    N, H, W, C = x.shape
    y = torch.empty_like(x)
    if not y.numel():
        return y
    vector = _vector(x, C)
    tile = tiles.choose(architecture(x.device), "forward", 8 * x.element_size(), W, K, _aligned(vector, x))
    programs, *blocks = _blocks(tile, (N, H, W), C)
    pack_blocks = taps.shape[1] // TAPS_BLOCK
    with _guard(x):
        depthwise_fwd[(programs,)](x, taps, y, H, W, C, pack_blocks, *blocks, VEC=vector, **_constants(tile, K))
    return y


def gated_mlp(
    x: Tensor, s: Tensor, gamma: Tensor, beta: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor,
    fc2_bias: Tensor, scale: Tensor | None, eps: float, act: str,
) -> Tensor:  # fmt: skip
    """x + scale * fc2(act(g) * concat(i, s)), [g, i] = fc1(layer_norm(x)): x (..., dim), s (..., C)."""
    dim, C, D = x.shape[-1], s.shape[-1], fc2_weight.shape[1]
    out, P = torch.empty_like(x), x.numel() // dim
    tile, (k0, k1) = _tile("gated_mlp", x), block_tiles.parts(dim)
    if P:
        with _guard(x):
            gated_mlp_fwd[(triton.cdiv(P, tile.block_m),)](
                x, s, gamma, beta, fc1_weight, fc1_bias, fc2_weight, fc2_bias, fc2_bias if scale is None else scale,
                out, P, eps, DIM=dim, K0=k0, K1=k1, D=D, C=C, ACT=act, SCALED=scale is not None,
                PRECISION=precision(x), BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, STAGES=tile.stages,
                **tile.options(),
            )  # fmt: skip
    return out


def gated_linear(a: Tensor, s: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, act: str) -> Tensor:
    """act(g) * concat(i, s), [g, i] = fc1(a): a (..., dim), s (..., C); (..., D)."""
    dim, C, D = a.shape[-1], s.shape[-1], fc1_weight.shape[0] // 2
    y, P = a.new_empty((*a.shape[:-1], D)), a.numel() // dim
    tile = _tile("gated_linear", a)
    blocks = triton.cdiv(D - C, tile.block_n) + triton.cdiv(C, tile.block_n)
    if P:
        with _guard(a):
            gated_linear_fwd[(triton.cdiv(P, tile.block_m) * blocks,)](
                a, s, fc1_weight, fc1_bias, y, P, DIM=dim, D=D, C=C, ACT=act, PRECISION=precision(a),
                BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, STAGES=tile.stages,
                **tile.options(),
            )  # fmt: skip
    return y
