"""A classifier's head: the module, and from the last map to the logits as one op, for inference on the CPU.

    out = fc2(norm(gelu(fc1(layer_norm(mean over H and W of x)))))

For one image it takes as long as reading its weights does, if nothing else has to be fetched for it: its layers, called
one after the other, take twice that.
"""

from typing import Any

import torch
from torch import Tensor, nn

from . import linear, seen
from .backends import cpu
from .linear import all_hooked, hooked
from .norm_linear import is_layer_norm
from .packs import Pack, check_dtype, low_precision, stored_dtype

_library = torch.library.Library("mambaout_kernels", "FRAGMENT")
_library.define(
    "head(Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor fc1_weight, Tensor? fc1_bias, Tensor? mid_weight, "
    "Tensor? mid_bias, Tensor? fc2_weight, Tensor? fc2_bias, float eps, float mid_eps, bool mid_normed, "
    "ScalarType dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _check(x: Tensor, fc1_weight: Tensor, fc2_weight: Tensor | None) -> None:
    if fc1_weight.ndim != 2 or 0 in fc1_weight.shape:
        raise ValueError(f"fc1_weight must be (hidden, channels); got {tuple(fc1_weight.shape)}")
    hidden, channels = fc1_weight.shape
    if x.ndim != 4 or x.shape[3] != channels or 0 in x.shape[1:3]:
        raise ValueError(f"x must be (N, H, W, {channels}), as fc1_weight's inputs, H, W >= 1; got {tuple(x.shape)}")
    check_dtype(x=x, fc1_weight=fc1_weight)
    if fc2_weight is not None and (fc2_weight.ndim != 2 or fc2_weight.shape[1] != hidden or fc2_weight.shape[0] == 0):
        raise ValueError(f"fc2_weight must be (classes, {hidden}), for fc1_weight's; got {tuple(fc2_weight.shape)}")


def _impl(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    mid_weight: Tensor | None,
    mid_bias: Tensor | None,
    fc2_weight: Tensor | None,
    fc2_bias: Tensor | None,
    eps: float,
    mid_eps: float,
    mid_normed: bool,
    dtype: torch.dtype,
) -> Tensor:
    _check(x, fc1_weight, fc2_weight)
    parameters = (norm_weight, norm_bias, fc1_weight, fc1_bias, mid_weight, mid_bias, fc2_weight, fc2_bias)
    return cpu.head(x, parameters, eps, mid_eps, mid_normed, dtype == torch.bfloat16)


def _fake(x: Tensor, *arguments: Any) -> Tensor:
    fc1_weight, fc2_weight, dtype = arguments[2], arguments[6], arguments[11]
    _check(x, fc1_weight, fc2_weight)
    outputs = fc1_weight.shape[0] if fc2_weight is None else fc2_weight.shape[0]
    return x.new_empty((x.shape[0], outputs), dtype=dtype)


_library.impl("head", _impl, "CPU")
torch.library.register_fake("mambaout_kernels::head", _fake, lib=_library)
_op = torch.ops.mambaout_kernels.head.default


class Head(nn.Module):
    """(N, dim) to (N, num_classes): fc1, GELU, norm unless None, dropout, fc2. GELU whatever the blocks use."""

    def __init__(self, dim: int, hidden: int, num_classes: int, norm: nn.Module | None, drop_rate: float):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.norm = norm
        self.fc2: nn.Module = nn.Linear(hidden, num_classes) if num_classes > 0 else nn.Identity()
        self.head_dropout = nn.Dropout(drop_rate)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.act(self._linear(self.fc1, x))
        if self.norm is not None:
            x = self.norm(x)
        x = self.head_dropout(x)
        return x if pre_logits else self._linear(self.fc2, x)

    @staticmethod
    def _linear(fc: nn.Module, x: Tensor) -> Tensor:
        return fc(x) if torch.is_grad_enabled() else linear.call(fc, x, used_once=True)


_forward = Head.forward


def _parameters(norm: Any, head: Any) -> tuple[Any, ...]:
    """Weight and bias of the norm, of fc1, of the norm between and of fc2; None for what is not there."""
    modules = (norm, head.fc1, head.norm, head.fc2)
    return tuple(getattr(m, name, None) for m in modules for name in ("weight", "bias"))


def applies(norm: Any, head: Any, x: Tensor) -> bool:
    """Whether the op computes head(norm(mean of x over H and W)), x (N, H, W, channels).

    It does on the compiled CPU kernels, when no gradient is wanted, for plain modules without hooks, in float32 or
    bfloat16, or with float32 parameters under bfloat16 autocast.
    """
    stored = stored_dtype(x)
    if stored is None or 0 in x.shape[1:3] or type(head) is not Head:
        return False
    fc1, fc2, mid, dropout = head.fc1, head.fc2, head.norm, head.head_dropout
    if type(fc1) is not nn.Linear or type(head.act) is not nn.GELU or head.act.approximate != "none":
        return False
    if type(dropout) is not nn.Dropout or (dropout.training and dropout.p > 0):
        return False
    if fc1.in_features != x.shape[3] or any(map(hooked, (norm, head, fc1, head.act, dropout, fc2))):
        return False
    if not is_layer_norm(norm) or norm.normalized_shape != (fc1.in_features,):
        return False
    if mid is not None and (not is_layer_norm(mid) or hooked(mid) or mid.normalized_shape != (fc1.out_features,)):
        return False
    if type(fc2) is nn.Linear:
        if fc2.in_features != fc1.out_features or fc2.out_features == 0:
            return False
    elif type(fc2) is not nn.Identity:
        return False
    return all(p is None or (p.dtype == stored and p.device == x.device) for p in _parameters(norm, head))


# Attributes of the modules that `applies` looks at.
_SETTINGS = ("normalized_shape", "eps", "_fast_norm", "approximate", "training", "p", "in_features", "out_features")


def call(model: Any, pack: Pack, x: Tensor) -> Tensor | None:
    """model.head(model.norm(mean of x over H and W)), (N, H, W, channels) to (N, outputs); None where not `applies`.

    pack: where what the last call found is kept.
    """
    if Head.forward is not _forward:
        return None
    if not torch.compiler.is_compiling() and all_hooked():
        return None
    y = seen.again(pack, cpu.head, x)
    if y is not None:
        return y
    norm, head = model.norm, model.head
    if not applies(norm, head, x):
        return None
    parameters, mid = _parameters(norm, head), head.norm
    settings = (norm.eps, 0.0 if mid is None else mid.eps, mid is not None)
    dtype = torch.bfloat16 if low_precision(x) else torch.float32
    y = _op(x, *parameters, *settings, dtype)
    arguments = (parameters, *settings, dtype == torch.bfloat16)
    seen.remember(pack, (model, head), _SETTINGS, parameters, cpu.head, x, y, *arguments, packed=False)
    return y
