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

from . import linear, whole_block
from .causal import CausalConv2d
from .checks import MAX_KERNEL_SIZE
from .linear import hooked
from .norm_linear import applies, norm_linear
from .ops import gated_dwconv
from .packs import Pack
from .reference import ACTIVATIONS, activation

LAYER_NORM = partial(nn.LayerNorm, eps=1e-6)

# Class names under which torch, timm and others ship the op's activations; what such a class computes is verified.
_ACTIVATION_CLASS_NAMES = ("GELU", "GELUTanh", "PytorchGELUTanh", "SiLU", "Swish", "Identity")


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


def activation_name(act: nn.Module) -> str | None:
    """The op's name for what `act` computes: "gelu", "gelu_tanh", "silu" or "identity"; None for anything else.

    torch's own modules are known by type. A class of the same name from elsewhere (timm's GELU, GELUTanh, Swish) is
    called on a few fp64 numbers and compared, so no other package is imported to recognise it.
    """
    if type(act) is nn.GELU:
        return "gelu" if act.approximate == "none" else "gelu_tanh"
    if type(act) is nn.SiLU:
        return "silu"
    if type(act) is nn.Identity:
        return "identity"
    if type(act).__name__ not in _ACTIVATION_CLASS_NAMES or any(True for _ in act.parameters()):
        return None
    x = torch.linspace(-8, 8, 65, dtype=torch.float64, device="cpu")
    try:
        y = act(x.clone())
        return next((name for name in ACTIVATIONS if torch.allclose(y, activation(x, name), rtol=0, atol=1e-9)), None)
    except Exception:  # a foreign class may do anything; if it cannot be checked, it is not fused
        return None


class DropPath(nn.Module):
    """Stochastic depth per sample: in training, a sample's branch is zeroed with probability `drop_prob`.

    Draws (N,1,1,1) in the branch's own dtype, as timm does: the same seed drops the same samples.
    """

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True):
        super().__init__()
        self.drop_prob = drop_prob
        self.scale_by_keep = scale_by_keep

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.drop_prob == 0.0:
            return x
        keep_prob = 1.0 - self.drop_prob
        keep = torch.empty((x.shape[0], *[1] * (x.ndim - 1)), dtype=x.dtype, device=x.device).bernoulli_(keep_prob)
        if self.scale_by_keep and keep_prob > 0.0:
            keep = keep.div_(keep_prob)
        return x * keep

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3f}"


class LayerScale(nn.Module):
    """x * gamma, one learned factor per channel of the last dimension."""

    def __init__(self, dim: int, init_value: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(init_value)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma


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

    Raises:
        TypeError: an unknown argument, or one of the wrong type.
        ValueError: an argument out of range, or an input that is not (N, H, W, dim) floating point.

    norm, fc1, fc2, ls and drop_path are called as modules where they have hooks or are not the plain ones; else their
    parameters may be read instead (norm_linear.py in training, whole_block.py in inference on the CPU). The
    fused op reads conv's parameters and act's name without calling these two. Where that would change the result
    (hooks, or a conv that is no longer the plain depthwise one: parametrized, dilated, replaced) the block calls them,
    with one warning; `unfused_reason()` tells.
    """

    op_act: str | None
    pack: Pack

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
        **unknown: Any,
    ):
        super().__init__()
        refuse_unknown(type(self).__name__, unknown, list(inspect.signature(FusedGatedCNNBlock).parameters)[:-1])
        hidden, conv_channels = _checked_widths(dim, expansion_ratio, conv_ratio)
        _check_kernel_size(kernel_size)
        if not 0.0 <= drop_path < 1.0:
            raise ValueError(f"drop_path must be in [0, 1), got {drop_path}")

        self.dim = dim
        self.split_indices = (hidden, hidden - conv_channels, conv_channels)
        self.norm = _checked_module("norm_layer", norm_layer(dim))
        self.fc1 = nn.Linear(dim, 2 * hidden)
        self.act = _checked_module("act_layer", act_layer())
        self.conv: nn.Module = nn.Identity()
        if conv_channels > 0:
            self.conv = (CausalConv2d if causal else nn.Conv2d)(
                conv_channels, conv_channels, kernel_size, padding=kernel_size // 2, groups=conv_channels
            )
        self.fc2 = nn.Linear(hidden, dim)
        self.ls: nn.Module = nn.Identity() if ls_init_value is None else LayerScale(dim, ls_init_value)
        self.drop_path: nn.Module = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.pack = Pack()
        if self.op_act is None:
            _warn_once(self._unfused_warning(str(self.unfused_reason())))

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "act":  # also when replaced later: what is fused is what the module computes
            object.__setattr__(self, "op_act", activation_name(value))

    def unfused_reason(self) -> str | None:
        """Why forward composes PyTorch calls instead of running the fused op; None when it runs the op."""
        if self.op_act is None:
            return f"act {type(self.act).__name__} is none of {', '.join(ACTIVATIONS)}"
        if hooked(self.act):
            return "act has hooks"
        conv: Any = self.conv
        channels = self.split_indices[2]
        if channels == 0:
            return None
        if type(conv) not in (nn.Conv2d, CausalConv2d):
            return f"conv is a {type(conv).__name__}, not a plain nn.Conv2d"
        kernel, radius = conv.kernel_size, conv.kernel_size[0] // 2
        if (
            not conv.out_channels == conv.groups == channels
            or conv.bias is None
            or conv.stride != (1, 1)
            or conv.dilation != (1, 1)
            or conv.padding != (radius, radius)
            or kernel[0] != kernel[1]
            or conv.padding_mode != "zeros"
        ):
            return f"conv is {conv}, not depthwise with a bias, stride 1, dilation 1 and zero padding kernel_size // 2"
        return "conv has hooks" if hooked(conv) else None

    @staticmethod
    def _unfused_warning(reason: str) -> str:
        return f"FusedGatedCNNBlock runs as separate PyTorch operations: {reason}"

    def _middle(self, u: torch.Tensor) -> torch.Tensor:
        """(N, H, W, 2 * hidden) to (N, H, W, hidden)."""
        reason = self.unfused_reason()
        if reason is not None:
            if not torch.compiler.is_compiling():
                _warn_once(self._unfused_warning(reason))
            g, i, c = u.split(self.split_indices, dim=-1)
            c = self.conv(c.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            return self.act(g) * torch.cat((i, c), dim=-1)
        assert self.op_act is not None
        conv: Any = self.conv
        if self.split_indices[2] == 0:
            weight, bias = u.new_empty(0, 1, 1, 1), u.new_empty(0)
        else:
            weight, bias = conv.filter() if type(conv) is CausalConv2d else conv.weight, conv.bias
            if weight.dtype not in (u.dtype, torch.float32) and torch.is_autocast_enabled(u.device.type):
                weight, bias = weight.to(u.dtype), bias.to(u.dtype)  # as autocast does for conv2d
        return gated_dwconv(u, weight, bias, self.op_act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim != 4 or x.shape[-1] != self.dim or not x.is_floating_point():
            raise ValueError(
                f"x must be (N, H, W, {self.dim}), channels last, floating point; got {tuple(x.shape)} of {x.dtype}"
            )
        known = whole_block.again(self, x)
        if known is not None:
            return known
        if whole_block.applies(self, x):
            return whole_block.run(self, x)
        norm: Any = self.norm
        u = norm_linear(norm, self.fc1, x) if applies(norm, self.fc1, x) else self.fc1(norm(x))
        y = self._middle(u)
        return self.drop_path(self.ls(linear.call(self.fc2, y))) + x

    def __prepare_scriptable__(self) -> None:
        raise RuntimeError(
            "torch.jit.script cannot compile the fused block. Use torch.compile, torch.export (AOTInductor, ONNX: "
            "mambaout_kernels.export) or torch.jit.trace; or script a timm model that is not patched: unpatch(model), "
            "timm.create_model(name, scriptable=True)"
        )

    def extra_repr(self) -> str:
        hidden, _, conv_channels = self.split_indices
        return f"dim={self.dim}, hidden={hidden}, conv_channels={conv_channels}, fused={self.unfused_reason() is None}"


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
