"""The Gated CNN block in inference on a GPU: fc1's output u is never written to memory, the convolved channels alone.

    c = fc1_c(layer_norm(x));   s = dwconv(c)
    out = x + ls(fc2(act(g) * concat(i, s))),   [g, i] = fc1_gi(layer_norm(x))

Up to NARROW channels g, i and y stay in registers: three kernels, 7 * dim elements moved per pixel instead of 25.
Above, y is written, and the products around it are PyTorch's (triton_kernels/block.py). float32 is computed so where it
may be multiplied in TF32; at full precision cuBLAS is faster, and u is written.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends, reference
from ..backends import cuda, triton
from ..backends.checks import check_beside, check_parameters
from ..backends.namespace import NAMESPACE, ops

_LONGEST_ROW = 2**24  # elements, of W * C
NARROW = 256  # a program keeps x's and out's channels of its pixels

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_library.define(
    "split_gated_cnn_block(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor fc1_weight, Tensor fc1_bias, "
    "Tensor conv_weight, Tensor conv_bias, Tensor taps, Tensor fc2_weight, Tensor fc2_bias, Tensor? scale, "
    "float eps, str act) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def pack_filter(conv_weight: Tensor, conv_bias: Tensor) -> Tensor:
    """The filter as the Triton kernel reads it, `taps`: float32, made once per weight."""
    from ..backends.triton_kernels import block_launch

    return block_launch.pack_filter(conv_weight, conv_bias)


def round_weight(weight: Tensor) -> Tensor:
    """A factor of products as they will be: in float32 where TF32 is allowed, rounded to that, which would be cut."""
    from ..backends.triton_kernels import block_launch

    return block_launch.round_tf32(weight) if block_launch.precision(weight) == "tf32" else weight


def split_gated_cnn_block(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, conv_weight: Tensor,
    conv_bias: Tensor, taps: Tensor, fc2_weight: Tensor, fc2_bias: Tensor, scale: Tensor | None, eps: float, act: str,
) -> Tensor:  # fmt: skip
    """x + scale * fc2(act(g) * concat(i, dwconv(c))), [g, i, c] = fc1(layer_norm(x)), without gradients.

    Args:
        x: (N, H, W, dim), float32, bfloat16 or float16, any strides, on a GPU that Triton runs on.
        norm_weight, norm_bias, fc2_bias, scale (layer scale; None for none): (dim,).
        fc1_weight: (2 * hidden, dim), rows [g | i | c] of hidden, hidden - C and C; fc1_bias: (2 * hidden,).
        fc2_weight: (dim, hidden). In float32 both are cut to TF32 where that is allowed, unless round_weight was there.
        conv_weight: (C, 1, K, K), K odd, 1 to 31; conv_bias: (C,); taps: what pack_filter makes of these.
        eps: of the norm. act: "gelu", "gelu_tanh", "silu" or "identity".

    Returns:
        (N, H, W, dim), contiguous. g, i and y are rounded less often than by the modules. In float32 products are
        as torch.set_float32_matmul_precision says.

    Raises:
        ValueError: a wrong shape or act. TypeError: a dtype that is not x's. RuntimeError: an x that Triton does not
            run on.
    """
    return _op(
        x, norm_weight, norm_bias, fc1_weight, fc1_bias, conv_weight, conv_bias, taps, fc2_weight, fc2_bias, scale,
        eps, act,
    )  # fmt: skip


def _check(tensors: tuple[Tensor, ...], scale: Tensor | None, act: str, taps_block: int) -> None:
    x, norm_weight, norm_bias, fc1_weight, fc1_bias, conv_weight, conv_bias, taps, fc2_weight, fc2_bias = tensors
    if x.ndim != 4 or x.shape[-1] == 0:
        raise ValueError(f"x must have 4 dimensions (N, H, W, dim), dim at least 1; got shape {tuple(x.shape)}")
    if x.dtype not in triton.DTYPES:
        raise TypeError(f"x must be float32, bfloat16 or float16; got {x.dtype}")
    if fc2_weight.ndim != 2:
        raise ValueError(f"fc2_weight must have 2 dimensions (dim, hidden); got shape {tuple(fc2_weight.shape)}")
    dim, hidden = x.shape[-1], fc2_weight.shape[1]
    check_parameters(x, hidden, conv_weight, conv_bias, act)
    C, K = conv_weight.shape[0], conv_weight.shape[2]
    rows = K * K + 1
    for name, t, shape in (
        ("norm_weight", norm_weight, (dim,)), ("norm_bias", norm_bias, (dim,)),
        ("fc1_weight", fc1_weight, (2 * hidden, dim)), ("fc1_bias", fc1_bias, (2 * hidden,)),
        ("fc2_weight", fc2_weight, (dim, hidden)), ("fc2_bias", fc2_bias, (dim,)), ("scale", scale, (dim,)),
        ("conv_bias", conv_bias, (C,)), ("taps", taps, (rows, taps.shape[-1] if taps.ndim == 2 else -1)),
    ):  # fmt: skip
        if t is not None:
            check_beside(x, name, t, shape, torch.float32 if name == "taps" else x.dtype)
    if taps.shape[1] < C or taps.shape[1] % taps_block:
        raise ValueError(f"taps must have shape ({rows}, {C} rounded up to {taps_block}s); got {tuple(taps.shape)}")


def _by_cuda(c: Tensor, weight: Tensor) -> bool:
    """Whether the compiled kernel runs it: on an H100 twice as fast as Triton's (benchmarks/NOTES.md)."""
    return c.is_cuda and cuda.unavailable() is None and cuda.supports_depthwise(c, weight)


def _whole(x: Tensor) -> bool:
    """Whether products are at full float32 precision, which tensor cores do not have."""
    from ..backends.triton_kernels import block_launch

    return x.dtype == torch.float32 and block_launch.precision(x) == "ieee"


def _depthwise(c: Tensor, weight: Tensor, bias: Tensor, taps: Tensor) -> Tensor:
    from ..backends.triton_kernels import block_launch

    if weight.shape[0] == 0:
        return c
    if backends.forced() in (None, "cuda") and _by_cuda(c, weight):
        return cuda.depthwise(c, weight, bias)
    if c.stride(1) > _LONGEST_ROW:  # 32-bit offsets reach through the rows of a tile
        return reference.dwconv(c, weight, bias)
    return block_launch.depthwise(c, taps, weight.shape[-1])


def _split_gated_cnn_block(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, conv_weight: Tensor,
    conv_bias: Tensor, taps: Tensor, fc2_weight: Tensor, fc2_bias: Tensor, scale: Tensor | None, eps: float, act: str,
) -> Tensor:  # fmt: skip
    from ..backends.triton_kernels import block_launch

    _check(
        (x, norm_weight, norm_bias, fc1_weight, fc1_bias, conv_weight, conv_bias, taps, fc2_weight, fc2_bias),
        scale, act, block_launch.TAPS_BLOCK,
    )  # fmt: skip
    triton.check_runs(x)
    x, first_c = x.contiguous(), 2 * fc2_weight.shape[1] - conv_weight.shape[0]
    if _whole(x):
        u = F.linear(block_launch.layer_norm(x, norm_weight, norm_bias, eps), fc1_weight, fc1_bias)
        y = backends.select(u, conv_weight).gated_dwconv(u, conv_weight, conv_bias, act)
        return _add(x, F.linear(y, fc2_weight, fc2_bias), scale)
    c_weight, c_bias = fc1_weight[first_c:], fc1_bias[first_c:]
    if x.shape[-1] <= NARROW:
        c = block_launch.norm_linear(x, norm_weight, norm_bias, c_weight, c_bias, eps)
        s = _depthwise(c, conv_weight, conv_bias, taps)
        return block_launch.gated_mlp(
            x, s, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, scale, eps, act
        )
    a = block_launch.layer_norm(x, norm_weight, norm_bias, eps, factor=True)
    s = _depthwise(F.linear(a, c_weight, c_bias), conv_weight, conv_bias, taps)
    branch = F.linear(block_launch.gated_linear(a, s, fc1_weight, fc1_bias, act), fc2_weight, fc2_bias)
    return _add(x, branch, scale)


def _add(x: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
    return x + branch if scale is None else torch.addcmul(x, branch, scale)


def _fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


_library.impl("split_gated_cnn_block", _split_gated_cnn_block, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::split_gated_cnn_block", _fake, lib=_library)
_op = ops.split_gated_cnn_block.default
