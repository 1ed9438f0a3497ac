"""y = x weight^T + bias and its gradients, by the compiled CPU kernels in float32, elsewhere by PyTorch.

PyTorch's own float32 product runs at less than half of what an AMD processor can do.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends
from ..backends import cpu
from ..backends.checks import check_devices
from ..backends.namespace import NAMESPACE, ops

if cpu.unavailable() is not None:  # else csrc/torch/linear.cpp defines them
    _library = torch.library.Library(NAMESPACE, "FRAGMENT")
    _library.define("linear(Tensor x, Tensor weight, Tensor? bias, bool stream_weight=False) -> Tensor")
    _library.define("linear_dx(Tensor dy, Tensor weight) -> Tensor")
    _library.define("linear_dweight(Tensor dy, Tensor x) -> (Tensor, Tensor)")
    for _name, _impl in (
        ("linear", lambda x, weight, bias, stream_weight=False: F.linear(x, weight, bias)),
        ("linear_dx", lambda dy, weight: dy @ weight),
        ("linear_dweight", lambda dy, x: (_rows(dy).t() @ _rows(x), _rows(dy).sum(dim=0))),
    ):
        _library.impl(_name, _impl, "CompositeExplicitAutograd")


def _rows(tensor: Tensor) -> Tensor:
    """(..., features) as (rows, features)."""
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None, stream_weight: bool = False) -> Tensor:
    check_devices(x, weight, bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _linear_dx_fake(dy: Tensor, weight: Tensor) -> Tensor:
    check_devices(dy, weight)
    return dy.new_empty((*dy.shape[:-1], weight.shape[1]))


def _linear_dweight_fake(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    check_devices(dy, x)
    return dy.new_empty((dy.shape[-1], x.shape[-1])), dy.new_empty((dy.shape[-1],))


# Each of the three has its gradients in the other two.
def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:2])


def _differentiate_linear(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, *of_stream_weight = ctx.needs_input_grad  # PyTorch leaves out a default
    dx = linear_dx(dy, weight) if needs_x else None
    dweight, dbias = linear_dweight(dy, x) if needs_weight or needs_bias else (None, None)
    return dx, dweight if needs_weight else None, dbias if needs_bias else None, *(None for _ in of_stream_weight)


def _differentiate_dx(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
    dy, weight = ctx.saved_tensors
    needs_dy, needs_weight = ctx.needs_input_grad
    return linear(ddx, weight, None) if needs_dy else None, linear_dweight(dy, ddx)[0] if needs_weight else None


def _differentiate_dweight(ctx: Any, ddweight: Tensor, ddbias: Tensor) -> tuple[Tensor | None, ...]:
    dy, x = ctx.saved_tensors
    needs_dy, needs_x = ctx.needs_input_grad
    return linear(x, ddweight, ddbias) if needs_dy else None, linear_dx(dy, ddweight) if needs_x else None


for _name, _fake, _differentiate in (
    ("linear", _linear_fake, _differentiate_linear),
    ("linear_dx", _linear_dx_fake, _differentiate_dx),
    ("linear_dweight", _linear_dweight_fake, _differentiate_dweight),
):
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake)
    torch.library.register_autograd(f"{NAMESPACE}::{_name}", _differentiate, setup_context=_save)
_linear_op = ops.linear.default
_linear_dx_op = ops.linear_dx.default
_linear_dweight_op = ops.linear_dweight.default


_PLAIN = (Tensor, nn.Parameter)


def _use_native(*tensors: Tensor | None) -> bool:
    """Whether the compiled kernels run it: plain tensors, on the CPU, in float32, with AVX2 at least."""
    for t in tensors:
        if t is not None and (type(t) not in _PLAIN or t.device.type != "cpu" or t.dtype != torch.float32):
            return False
    if backends.preferred("cpu") != "cpu":
        return False
    return torch.compiler.is_compiling() or cpu.instruction_set() != "portable"  # of which no compiler can ask


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, stream_weight: bool = False) -> Tensor:
    """x weight^T + bias, (..., in_features) to (..., out_features); weight (out_features, in_features).

    Differentiable any number of times. Sums in float32, the same bits at every number of threads and for every row,
    whatever the others. stream_weight: x has few rows, so that reading weight takes longer than multiplying it.

    Raises:
        RuntimeError: a wrong shape.
    """
    return _linear_op(x, weight, bias, stream_weight) if _use_native(x, weight, bias) else F.linear(x, weight, bias)


def linear_dx(dy: Tensor, weight: Tensor) -> Tensor:
    """The gradient with respect to x: dy weight, (..., out_features) to (..., in_features)."""
    return _linear_dx_op(dy, weight) if _use_native(dy, weight) else dy @ weight


def linear_dweight(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients with respect to weight and bias: dy^T x, summed over all but the last dimension; and dy's sum."""
    if _use_native(dy, x):
        return _linear_dweight_op(dy, x)
    rows = _rows(dy)
    return rows.t() @ _rows(x), rows.sum(dim=0)
