"""One selective scan for every state space mixer: the order in which tokens are visited is data.

    h_t = exp(delta_t A) h_{t-1} + delta_t x_t B_t,     y_t = C_t h_t + skip x_t,     delta_t = softplus(delta + bias)

Equations 2 to 4 of Mamba (arXiv 2312.00752), x discretised by Euler's rule as in its code. Tokens lie where the image
has them, channels last; a scan reads and writes them through its row of `order`, so that neither a crossed nor a
windowed scan copies anything. Nothing is saved for backward but the inputs: states are computed again.
"""

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends import triton
from ..backends.namespace import NAMESPACE, ops
from . import reference

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_NAMES = ("x", "delta", "A", "B", "C", "skip", "delta_bias", "order")
_ARGUMENTS = ", ".join(f"Tensor {name}" for name in _NAMES)
_TAGS = (torch.Tag.pt2_compliant_tag,)
_library.define(f"selective_scan({_ARGUMENTS}) -> Tensor", tags=_TAGS)
_library.define(
    f"selective_scan_backward(Tensor dy, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
MOST_STATES = 256
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def selective_scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, skip: Tensor, delta_bias: Tensor, order: Tensor
) -> Tensor:
    """G scans of L tokens, D channels and S states each.

    Args:
        x: (N, 1, L, D), read by all scans, or (N, G, L, D), each scan's own. float32, bfloat16, float16 or float64.
        delta: (N, G, L, D), the step sizes before bias and softplus, in x's dtype.
        A: (G, D, S), negative where the state is to decay; S at most 256. float32, or float64 beside a float64 x, as
            are skip and delta_bias.
        B, C: (N, G, L, S), in x's dtype.
        skip: (G, D), Mamba's "D". delta_bias: (G, D).
        order: (G, L), int32: the token that a scan visits at each step; every token once.

    Any strides. States and sums are in float32 (float64 for float64).

    Returns:
        y, of x's shape and dtype, contiguous; the sum over the scans where x is (N, 1, L, D).

    Raises:
        ValueError: a wrong shape, or an order that does not visit every token once (on the CPU; on a GPU, where looking
            would wait for the device, tokens that are not there are left out).
        TypeError: a dtype that is not allowed.
        RuntimeError: tensors on different devices.

    Differentiable once.
    """
    return _op(x, delta, A, B, C, skip, delta_bias, order)


def check(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, skip: Tensor, delta_bias: Tensor, order: Tensor
) -> None:
    """Shapes, dtypes and devices; the numbers in `order` are looked at where they are on the CPU."""
    if x.dtype not in _DTYPES:
        raise TypeError(f"x must be float32, bfloat16, float16 or float64; got {x.dtype}")
    parameter = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, t in zip(_NAMES, (x, delta, A, B, C, skip, delta_bias, order), strict=True):
        if t.device != x.device:
            raise RuntimeError(f"{name} must be on the device of x, {x.device}; got {t.device}")
    for name, t, dtype in (("delta", delta, x.dtype), ("B", B, x.dtype), ("C", C, x.dtype), ("A", A, parameter),
                           ("skip", skip, parameter), ("delta_bias", delta_bias, parameter),
                           ("order", order, torch.int32)):  # fmt: skip
        if t.dtype != dtype:
            raise TypeError(f"{name} must be {dtype} beside an x of {x.dtype}; got {t.dtype}")
    if delta.ndim != 4 or min(delta.shape[1:]) < 1:
        raise ValueError(f"delta must be (N, G, L, D), G, L and D of 1 or more; got shape {tuple(delta.shape)}")
    N, G, L, D = delta.shape
    if A.ndim != 3 or A.shape[:2] != (G, D) or not 1 <= A.shape[2] <= MOST_STATES:
        raise ValueError(
            f"A must be (G, D, S) = ({G}, {D}, S), S of 1 to {MOST_STATES}; got shape {tuple(A.shape)}"
        )  # fmt: skip
    S = A.shape[2]
    if x.shape not in ((N, 1, L, D), (N, G, L, D)):
        raise ValueError(f"x must be (N, 1 or G, L, D) = ({N}, 1 or {G}, {L}, {D}); got shape {tuple(x.shape)}")
    for name, t, shape in (("B", B, (N, G, L, S)), ("C", C, (N, G, L, S)), ("skip", skip, (G, D)),
                           ("delta_bias", delta_bias, (G, D)), ("order", order, (G, L))):  # fmt: skip
        if t.shape != shape:
            raise ValueError(f"{name} must have shape {shape}; got {tuple(t.shape)}")


def check_order(order: Tensor) -> None:
    """ValueError unless every row of `order` names every token once."""
    G, L = order.shape
    for scan, row in enumerate(order):
        if not torch.equal(row.sort().values, torch.arange(L, dtype=row.dtype, device=row.device)):
            raise ValueError(f"order must visit each of {L} tokens once; scan {scan} of {G} does not")


def _check_memory(name: str, t: Tensor) -> None:
    """Dense, and all of it there: a storage may have been released, or made smaller than the tensors on it."""
    if t.layout != torch.strided:
        raise TypeError(f"{name} must be dense, of layout torch.strided; got {t.layout}")
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    size = t.untyped_storage().nbytes()
    if t.numel() and (t.storage_offset() + last + 1) * t.itemsize > size:
        raise ValueError(f"{name} must lie within its storage, which has {size} bytes; got shape {tuple(t.shape)}")


def _check_tensors(*arguments: Tensor) -> None:
    for name, t in zip(_NAMES, arguments, strict=True):
        _check_memory(name, t)
    check(*arguments)


def _check_all(*arguments: Tensor) -> None:
    _check_tensors(*arguments)
    if arguments[-1].is_cpu:
        check_order(arguments[-1])


def _check_gradient(dy: Tensor, x: Tensor, memory: bool = True) -> None:
    if memory:
        _check_memory("dy", dy)
    if dy.device != x.device:
        raise RuntimeError(f"dy must be on the device of x, {x.device}; got {dy.device}")
    if dy.dtype != x.dtype:
        raise TypeError(f"dy must have x's dtype, {x.dtype}; got {dy.dtype}")
    if dy.shape != x.shape:
        raise ValueError(f"dy must have x's shape, {tuple(x.shape)}; got {tuple(dy.shape)}")


def chosen(x: Tensor) -> str:
    """ "cpu", "triton" or "reference": what runs a scan of x."""
    if x.dtype == torch.float64 or backends.forced() == "reference":
        return "reference"
    if (x.is_cuda or backends.forced() == "triton") and triton.usable_on(x.device.type, x.device.index):
        return "triton"
    return "cpu" if x.is_cpu and backends.preferred("cpu") == "cpu" else "reference"


def _forward_impl(*arguments: Tensor) -> Tensor:
    runs_on = chosen(arguments[0])
    if runs_on == "triton":
        from .triton_kernels import launch

        _check_tensors(*arguments)
        return launch.forward(*arguments)
    if runs_on == "cpu":
        try:
            return ops.selective_scan_cpu(*arguments)
        except Exception:  # it refuses what is not valid; only then is it asked what was wrong
            _check_all(*arguments)
            raise
    _check_all(*arguments)
    return reference.selective_scan(*arguments).contiguous()


def _backward_impl(dy: Tensor, *arguments: Tensor) -> tuple[Tensor, ...]:
    runs_on = chosen(arguments[0])
    if runs_on == "triton":
        from .triton_kernels import launch

        _check_tensors(*arguments)
        _check_gradient(dy, arguments[0])
        return launch.backward(dy, *arguments)
    if runs_on == "cpu":
        try:
            return ops.selective_scan_backward_cpu(dy, *arguments)
        except Exception:
            _check_all(*arguments)
            _check_gradient(dy, arguments[0])
            raise
    _check_all(*arguments)
    _check_gradient(dy, arguments[0])
    return tuple(g.contiguous() for g in reference.selective_scan_backward(dy, *arguments))


def _forward_fake(*arguments: Tensor) -> Tensor:
    check(*arguments)
    return arguments[0].new_empty(arguments[0].shape)


def _backward_fake(dy: Tensor, *arguments: Tensor) -> tuple[Tensor, ...]:
    check(*arguments)
    _check_gradient(dy, arguments[0], memory=False)
    return tuple(t.new_empty(t.shape) for t in arguments[:-1])


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.backend = backends.forced()  # here: backward may run on a thread of autograd's


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    with backends.force(ctx.backend):
        gradients = _backward_op(dy, *ctx.saved_tensors)
    return (*(g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad, strict=False)), None)


_library.impl("selective_scan", _forward_impl, "CompositeExplicitAutograd")
_library.impl("selective_scan_backward", _backward_impl, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::selective_scan", _forward_fake, lib=_library)
torch.library.register_fake(f"{NAMESPACE}::selective_scan_backward", _backward_fake, lib=_library)
torch.library.register_autograd(f"{NAMESPACE}::selective_scan", _differentiate, setup_context=_save, lib=_library)
_op = ops.selective_scan.default
_backward_op = ops.selective_scan_backward.default
