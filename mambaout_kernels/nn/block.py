"""The Gated CNN block of MambaOut (arXiv 2405.07992, section 3.3), with its middle run by one fused op.

    u = fc1(norm(x));   y = act(g) * concat(i, dwconv(c)),   u = [g, i, c];   out = x + drop_path(ls(fc2(y)))

Submodules carry the authors' names (norm, fc1, act, conv, fc2), so their state_dict loads strictly; `ls.gamma` is
timm's.
"""

import functools
import inspect
import warnings
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .. import backends
from ..backends.checks import MAX_KERNEL_SIZE
from ..ops import gated_dwconv
from .alignment import aligned, with_zeros
from .causal import CausalConv2d
from .eligibility import GatedCNNBlock, gated_dwconv_reason
from .layers import DropPath, LayerScale
from .linear import linear, norm_linear
from .plain import activation_name, all_have_hooks, is_plain, is_plain_layer_norm, is_plain_linear

LAYER_NORM = partial(nn.LayerNorm, eps=1e-6)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def refuse_unknown(owner: str, given: Iterable[str], allowed: Iterable[str]) -> None:
    """Raise a TypeError that names the unknown arguments in `given`, their likely spelling, and all of `allowed`."""
    allowed = list(allowed)
    unknown = [name for name in given if name not in allowed]
    if not unknown:
        return
    hints = []
    for name in unknown:
        match = get_close_matches(name, allowed, n=1)
        hints.append(f"{name!r} (did you mean {match[0]!r}?)" if match else repr(name))
    raise TypeError(f"{owner}: unknown argument {', '.join(hints)}; allowed: {', '.join(allowed)}")


class FusedGatedCNNBlock(nn.Module):
    """Gated CNN block, (N, H, W, dim) to (N, H, W, dim), any floating dtype that its norm and linears take.

    Source: `GatedCNNBlock` of the authors' repository, `GatedConvBlock` of timm.

    Args:
        dim: block width.
        expansion_ratio: hidden = int(expansion_ratio * dim), the width of the gate.
        kernel_size: odd, 1 to 31.
        conv_ratio: int(conv_ratio * dim) channels are convolved, at most hidden. `conv_ratio=expansion_ratio` convolves
            all of them: the paper's naive block.
        norm_layer: called with `dim`.
        act_layer: called without arguments. nn.GELU (erf or tanh), nn.SiLU and nn.Identity are fused, as are timm's
            classes that compute the same; any other runs as a plain PyTorch composition, with one warning.
        drop_path: probability in [0, 1) of dropping the branch of a sample in training.
        ls_init_value: initial layer scale (`ls.gamma`); None for no layer scale.
        causal: every pixel sees only those before it (causal.py); for the paper's ablation, not for its models.
        recompute: in training, keep only x for backward and compute the branch again there, to the same bits: `dim`
            numbers of a pixel instead of `dim + 3 * hidden + 2`. Also an attribute, to be set at any time, of patched
            blocks too.

    Raises:
        TypeError: an unknown argument, or one of the wrong type.
        ValueError: an argument out of range, or an input that is not (N, H, W, dim) floating point.

    norm, fc1 and fc2 are called as modules where they have hooks or are not the plain ones; else their parameters may
    be read instead (linear.py). The fused op reads conv's parameters and act's settings without calling these two.
    Where that would change the result (hooks, or a conv that is no longer the plain depthwise one: parametrized,
    dilated, replaced) the block calls them, with one warning; `unfused_reason()` tells. Nothing is kept from call to
    call: for inference with packed weights, see `optimize_for_inference`.
    """

    recompute = False  # of patched blocks, which __init__ does not make

    def __init__(
        self,
        dim: int,
        expansion_ratio: float = 8 / 3,
        kernel_size: int = 7,
        conv_ratio: float = 1.0,
        norm_layer: Callable[..., nn.Module] = LAYER_NORM,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        drop_path: float = 0.0,
        ls_init_value: float | None = None,
        causal: bool = False,
        recompute: bool = False,
        **unknown: Any,
    ):
        super().__init__()
        refuse_unknown(type(self).__name__, unknown, list(inspect.signature(FusedGatedCNNBlock).parameters)[:-1])
        hidden, conv_channels = _checked_widths(dim, expansion_ratio, conv_ratio)
        _check_kernel_size(kernel_size)
        if not 0.0 <= drop_path < 1.0:
            raise ValueError(f"drop_path must be in [0, 1), got {drop_path}")

        self.dim = dim
        self.recompute = recompute
        self.split_indices = (hidden, hidden - conv_channels, conv_channels)
        self.norm = _checked_module("norm_layer", norm_layer(dim))
        self.fc1: nn.Module = nn.Linear(dim, 2 * hidden)
        self.act = _checked_module("act_layer", act_layer())
        self.conv: nn.Module = nn.Identity()
        if conv_channels > 0:
            self.conv = (CausalConv2d if causal else nn.Conv2d)(
                conv_channels, conv_channels, kernel_size, padding=kernel_size // 2, groups=conv_channels
            )
        self.fc2: nn.Module = nn.Linear(hidden, dim)
        self.ls: nn.Module = nn.Identity() if ls_init_value is None else LayerScale(dim, ls_init_value)
        self.drop_path: nn.Module = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        if self.op_act is None:
            _warn_once(_unfused_warning(str(self.unfused_reason())))

    @property
    def op_act(self) -> str | None:
        """The op's name for what `act` computes; None where it has none."""
        return activation_name(self.act)

    def unfused_reason(self) -> str | None:
        """Why forward composes PyTorch calls instead of running the fused op; None when it runs the op."""
        return gated_dwconv_reason(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim != 4 or x.shape[-1] != self.dim or not x.is_floating_point():
            raise ValueError(
                f"x must be (N, H, W, {self.dim}), channels last, floating point; got {tuple(x.shape)} of {x.dtype}"
            )
        if self.recompute and self.training and torch.is_grad_enabled():
            added = checkpoint(partial(branch, self), x, use_reentrant=False)
        else:
            added = branch(self, x)
        return self.drop_path(added) + x

    def __prepare_scriptable__(self) -> None:
        raise RuntimeError(
            "torch.jit.script cannot compile the fused block. Use torch.compile, torch.export (AOTInductor, ONNX: "
            "mambaout_kernels.integrations.export) or torch.jit.trace; or script a timm model that is not patched: "
            "unpatch(model), timm.create_model(name, scriptable=True)"
        )

    def extra_repr(self) -> str:
        hidden, _, conv_channels = self.split_indices
        device = next((p.device.type for p in self.parameters()), "cpu")
        fused = self.unfused_reason() is None and backends.has_kernels(device)
        text = f"dim={self.dim}, hidden={hidden}, conv_channels={conv_channels}, fused={fused}"
        return f"{text}, recompute=True" if self.recompute else text


def branch(block: GatedCNNBlock, x: torch.Tensor) -> torch.Tensor:
    """ls(fc2(y)) of a block, ours or timm's: what it adds to x (N, H, W, dim)."""
    fc1, fc2, zeros = aligned(block, x)
    if _compiled_rows(block, x):
        u = norm_linear(block.norm, fc1, x.flatten(0, 2)).unflatten(0, x.shape[:3])
        y = _gated_dwconv(block, u, zeros).flatten(0, 2)
        return block.ls(linear(fc2, y)).unflatten(0, x.shape[:3])
    u = norm_linear(block.norm, fc1, x)
    y = _gated_dwconv(block, u, zeros)
    return block.ls(linear(fc2, y))


def _gated_dwconv(block: GatedCNNBlock, u: torch.Tensor, zeros: int | None) -> torch.Tensor:
    """act(g) * concat(i, conv(c)), (N, H, W, 2 * hidden) to (N, H, W, hidden); `zeros`: see `aligned`."""
    reason = gated_dwconv_reason(block) if zeros is None else None
    if reason is not None:
        if not torch.compiler.is_compiling() and not all_have_hooks():
            _warn_once(_unfused_warning(reason))
        g, i, c = u.split(block.split_indices, dim=-1)
        c = block.conv(c.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return block.act(g) * torch.cat((i, c), dim=-1)
    conv: Any = block.conv
    if block.split_indices[2] == 0:
        weight, bias = u.new_empty(0, 1, 1, 1), u.new_empty(0)
    else:
        weight, bias = conv.filter() if type(conv) is CausalConv2d else conv.weight, conv.bias
        if weight.dtype not in (u.dtype, torch.float32) and torch.is_autocast_enabled(u.device.type):
            weight, bias = weight.to(u.dtype), bias.to(u.dtype)  # as autocast does for conv2d
    if zeros:
        weight, bias = with_zeros(weight, zeros), with_zeros(bias, zeros)
    return gated_dwconv(u, weight, bias, str(activation_name(block.act)))


def _compiled_rows(block: GatedCNNBlock, x: torch.Tensor) -> bool:
    """Whether to show a compiler rows of pixels around the fused op: it takes what has four dimensions for images
    of convolutions, and keeps for backward what it transposed (on an H100 a sixth of a training step)."""
    if not torch.compiler.is_compiling() or torch.compiler.is_exporting() or not torch.is_grad_enabled():
        return False
    if backends.uses_reference(x.device.type) or gated_dwconv_reason(block) is not None:
        return False
    norm: Any = block.norm
    return (
        is_plain(block.ls, nn.Identity, LayerScale)
        and is_plain_layer_norm(norm)
        and norm.normalized_shape == x.shape[-1:]
        and is_plain_linear(block.fc1)
        and is_plain_linear(block.fc2)
    )


def _unfused_warning(reason: str) -> str:
    return f"FusedGatedCNNBlock runs as separate PyTorch operations: {reason}"


def _checked_widths(dim: int, expansion_ratio: float, conv_ratio: float) -> tuple[int, int]:
    """(hidden, conv_channels) of a block, or a ValueError or TypeError."""
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim must be an int, got {dim!r}")
    if dim <= 0:
        raise ValueError(f"dim must be positive, got {dim}")
    hidden, conv_channels = int(expansion_ratio * dim), int(conv_ratio * dim)
    if hidden < 1:
        raise ValueError(
            f"expansion_ratio must give int(expansion_ratio * dim) >= 1, got {expansion_ratio} at dim {dim}"
        )
    if not 0 <= conv_channels <= hidden or conv_ratio < 0:
        raise ValueError(
            f"conv_ratio must be in [0, expansion_ratio]: int(conv_ratio * dim) of the {hidden} hidden channels are "
            f"convolved; got conv_ratio {conv_ratio}, that is {conv_channels} channels at dim {dim}"
        )
    return hidden, conv_channels


def _checked_module(argument: str, module: Any) -> nn.Module:
    if not isinstance(module, nn.Module):
        raise TypeError(f"{argument} must return a torch.nn.Module when called, returned {module!r}")
    return module


def _check_kernel_size(kernel_size: int) -> None:
    if isinstance(kernel_size, bool) or not isinstance(kernel_size, int):
        raise TypeError(f"kernel_size must be an int, got {kernel_size!r}")
    if kernel_size % 2 == 0 or not 1 <= kernel_size <= MAX_KERNEL_SIZE:
        raise ValueError(f"kernel_size must be odd, 1 to {MAX_KERNEL_SIZE}, got {kernel_size}")
