"""y = x weight^T + bias and its gradients, by the compiled CPU kernels in float32, elsewhere by PyTorch.

PyTorch's own float32 product runs at less than half of what an AMD processor can do.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import backends
from .backends import cpu

_library = torch.library.Library("mambaout_kernels", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_library.define("linear(Tensor x, Tensor weight, Tensor? bias, bool used_once=False) -> Tensor", tags=_TAGS)
_library.define("linear_dx(Tensor dy, Tensor weight) -> Tensor", tags=_TAGS)
_library.define("linear_dweight(Tensor dy, Tensor x) -> (Tensor, Tensor)", tags=_TAGS)


def _features(name: str, tensor: Tensor, features: int, of: str) -> None:
    if tensor.ndim == 0 or tensor.shape[-1] != features:
        raise ValueError(f"{name} must be (..., {features}), as {of}; got {tuple(tensor.shape)}")


def _check_float32(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != torch.float32:
            raise TypeError(f"{name} must be float32; got {tensor.dtype}")


def _check_matrix(weight: Tensor) -> None:
    if weight.ndim != 2:
        raise ValueError(f"weight must be (out_features, in_features); got {tuple(weight.shape)}")


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    _check_float32(x=x, weight=weight, bias=bias)
    _check_matrix(weight)
    _features("x", x, weight.shape[1], "weight's inputs")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]},), as weight's outputs; got {tuple(bias.shape)}")


def _check_dx(dy: Tensor, weight: Tensor) -> None:
    _check_float32(dy=dy, weight=weight)
    _check_matrix(weight)
    _features("dy", dy, weight.shape[0], "weight's outputs")


def _check_dweight(dy: Tensor, x: Tensor) -> None:
    _check_float32(dy=dy, x=x)
    if dy.ndim == 0 or x.ndim == 0 or dy.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"dy must be {(*x.shape[:-1], 'out_features')}, as x; got {tuple(dy.shape)}")


def _rows(tensor: Tensor) -> Tensor:
    """(..., features) as (rows, features)."""
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, used_once: bool = False) -> Tensor:
    _check(x, weight, bias)
    y = cpu.linear(_rows(x), weight, weight.new_empty(0) if bias is None else bias, used_once)
    return y.view(*x.shape[:-1], weight.shape[0])


def _linear_dx(dy: Tensor, weight: Tensor) -> Tensor:
    _check_dx(dy, weight)
    return cpu.linear_dx(_rows(dy), weight).view(*dy.shape[:-1], weight.shape[1])


def _linear_dweight(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    _check_dweight(dy, x)
    return cpu.linear_dweight(_rows(dy), _rows(x))


def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None, used_once: bool = False) -> Tensor:
    _check(x, weight, bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _linear_dx_fake(dy: Tensor, weight: Tensor) -> Tensor:
    _check_dx(dy, weight)
    return dy.new_empty((*dy.shape[:-1], weight.shape[1]))


def _linear_dweight_fake(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    _check_dweight(dy, x)
    return dy.new_empty((dy.shape[-1], x.shape[-1])), dy.new_empty((dy.shape[-1],))


# Each of the three has its gradients in the other two.
def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:2])


def _differentiate_linear(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, *of_used_once = ctx.needs_input_grad  # PyTorch leaves out a default
    dx = linear_dx(dy, weight) if needs_x else None
    dweight, dbias = linear_dweight(dy, x) if needs_weight or needs_bias else (None, None)
    return dx, dweight if needs_weight else None, dbias if needs_bias else None, *(None for _ in of_used_once)


def _differentiate_dx(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
    dy, weight = ctx.saved_tensors
    needs_dy, needs_weight = ctx.needs_input_grad
    return linear(ddx, weight, None) if needs_dy else None, linear_dweight(dy, ddx)[0] if needs_weight else None


def _differentiate_dweight(ctx: Any, ddweight: Tensor, ddbias: Tensor) -> tuple[Tensor | None, ...]:
    dy, x = ctx.saved_tensors
    needs_dy, needs_x = ctx.needs_input_grad
    return linear(x, ddweight, ddbias) if needs_dy else None, linear_dx(dy, ddweight) if needs_x else None


for _name, _impl, _fake, _differentiate in (
    ("linear", _linear, _linear_fake, _differentiate_linear),
    ("linear_dx", _linear_dx, _linear_dx_fake, _differentiate_dx),
    ("linear_dweight", _linear_dweight, _linear_dweight_fake, _differentiate_dweight),
):
    _library.impl(_name, _impl, "CPU")
    torch.library.register_fake(f"mambaout_kernels::{_name}", _fake, lib=_library)
    torch.library.register_autograd(f"mambaout_kernels::{_name}", _differentiate, setup_context=_save, lib=_library)
_linear_op = torch.ops.mambaout_kernels.linear.default
_linear_dx_op = torch.ops.mambaout_kernels.linear_dx.default
_linear_dweight_op = torch.ops.mambaout_kernels.linear_dweight.default


_PLAIN = (Tensor, nn.Parameter)


def _ours(*tensors: Tensor | None) -> bool:
    """Whether the compiled kernels run it: plain tensors, on the CPU, in float32, with AVX2 at least."""
    for t in tensors:
        if t is not None and (type(t) not in _PLAIN or t.device.type != "cpu" or t.dtype != torch.float32):
            return False
    if backends.preferred("cpu") != "cpu":
        return False
    return torch.compiler.is_compiling() or cpu.instruction_set() != "portable"  # of which no compiler can ask


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, used_once: bool = False) -> Tensor:
    """x weight^T + bias, (..., in_features) to (..., out_features); weight (out_features, in_features).

    Differentiable any number of times. Sums in float32, the same bits at every number of threads and for every row,
    whatever the others. used_once: x has few rows, so that reading weight takes longer than multiplying it.
    """
    return _linear_op(x, weight, bias, used_once) if _ours(x, weight, bias) else F.linear(x, weight, bias)


def linear_dx(dy: Tensor, weight: Tensor) -> Tensor:
    """The gradient with respect to x: dy weight, (..., out_features) to (..., in_features)."""
    return _linear_dx_op(dy, weight) if _ours(dy, weight) else dy @ weight


def linear_dweight(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients with respect to weight and bias: dy^T x, summed over all but the last dimension; and dy's sum."""
    if _ours(dy, x):
        return _linear_dweight_op(dy, x)
    rows = _rows(dy)
    return rows.t() @ _rows(x), rows.sum(dim=0)


_any_global_hook: Any = getattr(nn.modules.module, "_has_any_global_hook", None)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def all_hooked() -> bool:
    """Whether there are hooks on all modules, or this torch does not tell."""
    return _any_global_hook is None or bool(_any_global_hook())


def hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward."""
    return "forward" in vars(module) or any(getattr(module, name) for name in HOOKS)


def call(fc: nn.Module, x: Tensor, used_once: bool = False) -> Tensor:
    """fc(x); by the compiled kernels for a plain nn.Linear without hooks, outside autocast and, in training, compilers.

    used_once: as for `linear`.
    """
    if x.device.type != "cpu" or type(fc) is not nn.Linear or hooked(fc):
        return fc(x)
    if torch.compiler.is_compiling() and not used_once:  # a compiler does better with what it knows
        return fc(x)
    if torch.is_autocast_enabled("cpu") or x.shape[-1] != fc.in_features:
        return fc(x)
    return linear(x, fc.weight, fc.bias, used_once)
