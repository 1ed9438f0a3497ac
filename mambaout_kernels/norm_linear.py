"""The block's linear layers on NHWC tensors.

`norm_linear`: u = linear(layer_norm(x)), which keeps x for backward and recomputes layer_norm(x). PyTorch keeps both;
the latter is cheap to have again, and is a tenth of what a Gated CNN block keeps.

`linear`: the same product as a 1 x 1 convolution where that is faster. On CPUs PyTorch gives the one to a BLAS and the
other to oneDNN, which is 1.2 to 1.4 times as fast here (benchmarks/NOTES.md).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import backends

# Below this many pixels in bf16, the BLAS is as fast.
_MIN_BF16_PIXELS = 1024


def _by_convolution(x: Tensor) -> bool:
    if x.device.type != "cpu" or x.ndim != 4 or x.numel() == 0 or not torch.backends.mkldnn.is_available():
        return False
    pixels = x.numel() // x.shape[-1]
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and pixels >= _MIN_BF16_PIXELS)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not _by_convolution(x):
        return F.linear(x, weight, bias)
    return F.conv2d(x.permute(0, 3, 1, 2), weight[:, :, None, None], bias).permute(0, 2, 3, 1)


def _product_backward(
    du: Tensor, x: Tensor, weight: Tensor, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias) of `_product`."""
    rows = du.reshape(-1, du.shape[-1])
    # not oneDNN's: it adds the pixels one after the other, which loses digits that torch's pairwise sum keeps
    dbias = rows.sum(dim=0) if needs_bias else None
    if _by_convolution(x):
        dx, dweight, _ = torch.ops.aten.convolution_backward(
            du.permute(0, 3, 1, 2),
            x.permute(0, 3, 1, 2),
            weight[:, :, None, None],
            None,
            [1, 1],
            [0, 0],
            [1, 1],
            False,
            [0, 0],
            1,
            [True, needs_weight, False],
        )
        return dx.permute(0, 2, 3, 1), dweight[:, :, 0, 0] if needs_weight else None, dbias
    dweight = rows.t() @ x.reshape(-1, x.shape[-1]) if needs_weight else None
    return (rows @ weight).view(x.shape), dweight, dbias


class _Linear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _product(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias = inputs
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        _, needs_weight, needs_bias = ctx.needs_input_grad
        return _product_backward(dy, x, weight, needs_weight, needs_bias and ctx.has_bias)


class _NormLinear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, gamma: Tensor, beta: Tensor | None, eps: float, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        normed, mean, rstd = torch.native_layer_norm(x, (x.shape[-1],), gamma, beta, eps)
        return _product(normed, weight, bias), mean, rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, gamma, beta, ctx.eps, weight, bias = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x, gamma, beta, weight, mean, rstd)

    @staticmethod
    def backward(ctx: Any, du: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, gamma, beta, weight, mean, rstd = ctx.saved_tensors
        needs_x, needs_gamma, needs_beta, _, needs_weight, needs_bias = ctx.needs_input_grad
        normed = F.layer_norm(x, (x.shape[-1],), gamma, beta, ctx.eps)
        dnormed, dweight, dbias = _product_backward(du, normed, weight, needs_weight, needs_bias and ctx.has_bias)
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
        return dx, dgamma, dbeta, None, dweight, dbias


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


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """module(x); for a plain nn.Linear without hooks, outside compilers and the reference, in the faster way."""
    if type(module) is not nn.Linear or hooked(module) or torch.compiler.is_compiling():
        return module(x)
    if backends.uses_reference(x.device.type) or torch.is_autocast_enabled(x.device.type) or not _by_convolution(x):
        return module(x)
    return _Linear.apply(x, module.weight, module.bias)


def hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
