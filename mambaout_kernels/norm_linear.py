"""u = linear(layer_norm(x)), which keeps x for backward and recomputes layer_norm(x).

PyTorch keeps both; the latter is cheap to have again, and is a tenth of what a Gated CNN block keeps.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import backends
from .linear import hooked, linear, linear_dweight, linear_dx


class _NormLinear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, gamma: Tensor, beta: Tensor | None, eps: float, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        normed, mean, rstd = torch.native_layer_norm(x, (x.shape[-1],), gamma, beta, eps)
        return linear(normed, weight, bias), mean, rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, gamma, beta, ctx.eps, weight, _ = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.save_for_backward(x, gamma, beta, weight, mean, rstd)

    @staticmethod
    def backward(ctx: Any, du: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, gamma, beta, weight, mean, rstd = ctx.saved_tensors
        needs_x, needs_gamma, needs_beta, _, needs_weight, needs_bias = ctx.needs_input_grad
        normed = F.layer_norm(x, (x.shape[-1],), gamma, beta, ctx.eps)
        dnormed = linear_dx(du, weight)
        dweight, dbias = linear_dweight(du, normed) if needs_weight or needs_bias else (None, None)
        dx, dgamma, dbeta = torch.ops.aten.native_layer_norm_backward(
            dnormed,
            x,
            [x.shape[-1]],
            mean,
            rstd,
            gamma,
            beta,
            [needs_x, needs_gamma, needs_beta and beta is not None],
        )
        return dx, dgamma, dbeta, None, dweight if needs_weight else None, dbias if needs_bias else None


def applies(norm: nn.Module, fc: nn.Module, x: Tensor) -> bool:
    """Whether `norm_linear` computes what calling the two modules would, and keeps less.

    It does for plain modules of x's dtype, without hooks, outside autocast and compilers, when gradients are wanted;
    not on the reference, which is plain PyTorch.
    """
    if backends.uses_reference(x.device.type):
        return False
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
        return False
    if not is_layer_norm(norm) or type(fc) is not nn.Linear or hooked(norm) or hooked(fc):
        return False
    gamma: Any = norm.weight
    return gamma is not None and gamma.dtype == fc.weight.dtype == x.dtype and norm.normalized_shape == x.shape[-1:]


def is_layer_norm(module: nn.Module) -> bool:
    """Whether it is nn.LayerNorm, or timm's class of that name, which computes the same unless its fast norm is on."""
    kind = type(module)
    if kind is nn.LayerNorm:
        return True
    return (kind.__module__, kind.__name__) == ("timm.layers.norm", "LayerNorm") and not module._fast_norm


def norm_linear(norm: nn.LayerNorm, fc: nn.Linear, x: Tensor) -> Tensor:
    """fc(norm(x)), (..., dim) to (..., out_features)."""
    u, _, _ = _NormLinear.apply(x, norm.weight, norm.bias, norm.eps, fc.weight, fc.bias)
    return u
