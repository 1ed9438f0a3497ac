"""The fused op: its schema, checks, fake kernel and gradients, once for every backend.

    y = act(g) * concat(i, dwconv(c)),   u = [g, i, c]

Saved for backward: u, weight and bias, nothing else; the convolution is recomputed. gated_dwconv_backward takes u as
(N, H, W, 2D) or as its rows (N * H * W, 2D), and returns du like it.
"""

from typing import Any

import torch
from torch import Tensor

from .. import backends, reference
from ..backends.checks import check, check_gradient
from ..backends.namespace import NAMESPACE, ops

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_library.define("gated_dwconv(Tensor u, Tensor weight, Tensor bias, str act) -> Tensor", tags=_TAGS)
_library.define(
    "gated_dwconv_backward(Tensor dy, Tensor u, Tensor weight, Tensor bias, str act) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


def gated_dwconv(u: Tensor, weight: Tensor, bias: Tensor, act: str = "gelu") -> Tensor:
    """y = act(g) * concat(i, dwconv(c)), the middle of MambaOut's Gated CNN block (arXiv 2405.07992), fused.

    Args:
        u: (N, H, W, 2D), float32, bfloat16, float16 or float64, any strides: gate g (D channels), identity i (D - C)
            and conv c (C), in this order; the output of the block's first linear layer.
        weight: (C, 1, K, K), the parameter of a depthwise nn.Conv2d with padding K // 2; K odd, 1 to 31; 0 <= C <= D.
            In u's dtype, or float32 beside a bfloat16 or float16 u.
        bias: (C,), dtype as for weight.
        act: "gelu" (erf), "gelu_tanh", "silu" or "identity".

    Returns:
        y: (N, H, W, D), contiguous, in u's dtype. Sums are accumulated in float32 (float64 for float64).

    Raises:
        ValueError: a wrong shape, kernel size or act.
        TypeError: a dtype that is not allowed.
        RuntimeError: tensors on different devices.

    Differentiable twice. Which kernels run it: `mambaout_kernels.backends`.
    """
    if backends.uses_reference(u.device.type):  # plain PyTorch, so that autograd and compilers see its parts
        check(u, weight, bias, act)
        return reference.gated_dwconv(u, weight, bias, act)
    return _op(u, weight, bias, act)


# A backend refuses what is not valid before it touches memory; only then is it asked what was wrong. So a valid call
# pays for one set of checks, in C++ where the backend is compiled.
def _forward_impl(u: Tensor, weight: Tensor, bias: Tensor, act: str) -> Tensor:
    try:
        backend = backends.select(u, weight)
        if backend is reference:  # which computes what PyTorch can
            check(u, weight, bias, act)
        return backend.gated_dwconv(u, weight, bias, act)
    except Exception:
        check(u, weight, bias, act)
        raise


def _backward_impl(dy: Tensor, u: Tensor, weight: Tensor, bias: Tensor, act: str) -> tuple[Tensor, Tensor, Tensor]:
    if u.ndim == 2:
        du, dweight, dbias = _backward_impl(dy, _map_of(u, dy), weight, bias, act)
        return du.view(u.shape), dweight, dbias
    try:
        backend = backends.select(u, weight, backward=True)
        if backend is reference:
            check(u, weight, bias, act)
            check_gradient(dy, u)
        return backend.gated_dwconv_backward(dy, u, weight, bias, act)
    except Exception:
        check(u, weight, bias, act)
        check_gradient(dy, u)
        raise


def _forward_fake(u: Tensor, weight: Tensor, bias: Tensor, act: str) -> Tensor:
    check(u, weight, bias, act)
    return u.new_empty((*u.shape[:3], u.shape[3] // 2))


def _map_of(rows: Tensor, like: Tensor) -> Tensor:
    """u (N, H, W, 2D) of its rows (N * H * W, 2D), beside a dy."""
    if rows.ndim != 2:
        return rows
    if like.ndim != 4 or rows.shape[0] != like.shape[0] * like.shape[1] * like.shape[2]:
        raise ValueError(f"u must have a row for each pixel of dy, {tuple(like.shape)}; got shape {tuple(rows.shape)}")
    return rows.unflatten(0, like.shape[:3])


def _backward_fake(dy: Tensor, u: Tensor, weight: Tensor, bias: Tensor, act: str) -> tuple[Tensor, Tensor, Tensor]:
    u_map = _map_of(u, dy)
    check(u_map, weight, bias, act)
    check_gradient(dy, u_map)
    return u.new_empty(u.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _save_forward(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, str], output: Tensor) -> None:
    *tensors, ctx.act = inputs
    ctx.save_for_backward(*tensors)
    ctx.backend = backends.forced()  # here: backward may run on a thread of autograd's


def _differentiate_forward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    u, weight, bias = ctx.saved_tensors
    if u.is_contiguous():  # torch.compile takes what has four dimensions for an image of a convolution's, and keeps it
        u = u.flatten(0, 2)  # transposed
    with backends.force(ctx.backend):
        du, *others = _backward_op(dy, u, weight, bias, ctx.act)
    gradients = (_map_of(du, dy), *others)
    return (*(g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad, strict=False)), None)


def _save_backward(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor, str], output: Any) -> None:
    *tensors, ctx.act = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of (du, dweight, dbias) with respect to (dy, u, weight, bias), through the reference's formula."""
    needed = ctx.needs_input_grad[:4]
    with torch.enable_grad():
        inputs = [t.detach().requires_grad_(n) for t, n in zip(ctx.saved_tensors, needed, strict=True)]
        dy, u, weight, bias = inputs
        du, *others = reference.gated_dwconv_backward(dy, _map_of(u, dy), weight, bias, ctx.act)
        outputs = (du.view(u.shape), *others)
    wanted = [t for t in inputs if t.requires_grad]
    differentiable = [(o, up) for o, up in zip(outputs, upstream, strict=True) if o.requires_grad]
    found = iter(
        torch.autograd.grad([o for o, _ in differentiable], wanted, [up for _, up in differentiable], allow_unused=True)
    )
    return (*(next(found) if n else None for n in needed), None)


_library.impl("gated_dwconv", _forward_impl, "CompositeExplicitAutograd")
_library.impl("gated_dwconv_backward", _backward_impl, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::gated_dwconv", _forward_fake, lib=_library)
torch.library.register_fake(f"{NAMESPACE}::gated_dwconv_backward", _backward_fake, lib=_library)
torch.library.register_autograd(
    f"{NAMESPACE}::gated_dwconv", _differentiate_forward, setup_context=_save_forward, lib=_library
)
torch.library.register_autograd(
    f"{NAMESPACE}::gated_dwconv_backward", _differentiate_backward, setup_context=_save_backward, lib=_library
)
_op = ops.gated_dwconv.default
_backward_op = ops.gated_dwconv_backward.default
