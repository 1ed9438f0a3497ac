"""u = linear(layer_norm(x)), which keeps x for backward and recomputes layer_norm(x).

PyTorch keeps both; the latter is cheap to have again, and is a tenth of what a Gated CNN block keeps.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .conv_norm import layer_norm_act, layer_norm_act_backward, normalises
from .linear import linear, linear_dweight, linear_dx


class _NormLinear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, gamma: Tensor, beta: Tensor | None, eps: float, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if beta is not None and normalises(x, gamma, beta):  # without mean and rstd: see backward
            normed = layer_norm_act(x, None, gamma, beta, eps, "identity", weight.dtype)
            return linear(normed, weight, bias), x.new_empty(0), x.new_empty(0)
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
        dnormed = linear_dx(du, weight)
        if mean.shape != (0,):
            normed = F.layer_norm(x, (x.shape[-1],), gamma, beta, ctx.eps)
            wanted = [needs_x, needs_gamma, needs_beta and beta is not None]
            dx, dgamma, dbeta = torch.ops.aten.native_layer_norm_backward(
                dnormed, x, [x.shape[-1]], mean, rstd, gamma, beta, wanted
            )
        else:
            dx, dgamma, dbeta, normed = layer_norm_act_backward(dnormed, x, gamma, beta, ctx.eps, "identity", True)
            dx, dgamma, dbeta = (
                g if needed else None for g, needed in ((dx, needs_x), (dgamma, needs_gamma), (dbeta, needs_beta))
            )
        dweight, dbias = linear_dweight(du, normed) if needs_weight or needs_bias else (None, None)
        return dx, dgamma, dbeta, None, dweight if needs_weight else None, dbias if needs_bias else None


def norm_linear(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, eps: float, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """linear(layer_norm(x), weight, bias), (..., dim) to (..., out_features). Once differentiable.

    weight and bias may have another dtype than x where layer_norm_act runs, which then returns that.
    """
    u, _, _ = _NormLinear.apply(x, norm_weight, norm_bias, eps, weight, bias)
    return u
