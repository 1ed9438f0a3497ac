"""Whether a fused op may stand in for modules, and if not why: the one place that knows.

A reason is a sentence for the user; None means that the op computes what calling the modules would.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..backends.checks import MAX_KERNEL_SIZE
from ..reference import ACTIVATIONS
from .causal import CausalConv2d
from .layers import DropPath
from .plain import (
    activation_name,
    class_of,
    has_hooks,
    is_plain,
    is_plain_layer_norm,
    is_plain_linear,
    is_plain_tensor,
    layer_scale_of,
    watched,
)  # fmt: skip


class GatedCNNBlock(Protocol):
    """What a Gated CNN block is made of: FusedGatedCNNBlock, and blocks that `patch` fused."""

    dim: int
    split_indices: tuple[int, int, int]
    norm: nn.Module
    fc1: nn.Module
    act: nn.Module
    conv: nn.Module
    fc2: nn.Module
    ls: nn.Module
    drop_path: nn.Module


def _differs(name: str, module: nn.Module, wanted: str) -> str:
    """What is there instead of `wanted`."""
    if has_hooks(module):
        return f"{name} has hooks"
    kind = type(module)
    own = kind.__module__.partition(".")[0] in ("torch", __name__.partition(".")[0])
    return f"{name} is a {kind.__qualname__ if own else f'{kind.__module__}.{kind.__qualname__}'}, not {wanted}"


def _tensors_reason(name: str, module: Any) -> str | None:
    """Which of a module's parameters may mean something else than its numbers."""
    for part in ("weight", "bias"):
        p = getattr(module, part, None)
        if isinstance(p, Tensor) and not is_plain_tensor(p):
            layout = "" if p.layout == torch.strided else f" of layout {p.layout}"
            return f"{name}.{part} is a {type(p).__name__}{layout}, not a plain tensor"
    return None


def gated_dwconv_reason(block: GatedCNNBlock) -> str | None:
    """Why `gated_dwconv` cannot stand in for a block's act and conv."""
    if watched():
        return "a TorchFunctionMode is active"
    if activation_name(block.act) is None:
        return f"act {type(block.act).__name__} is none of {', '.join(ACTIVATIONS)}"
    if has_hooks(block.act):
        return "act has hooks"
    conv: Any = block.conv
    channels = block.split_indices[2]
    if channels == 0:
        return None
    if class_of(conv) not in (nn.Conv2d, CausalConv2d):
        return f"conv is a {type(conv).__name__}, not a plain nn.Conv2d"
    if (reason := _tensors_reason("conv", conv)) is not None:
        return reason
    weight, bias = conv.weight, conv.bias
    kernel, radius = conv.kernel_size, conv.kernel_size[0] // 2
    if (
        not conv.out_channels == conv.groups == channels
        or bias is None
        or conv.stride != (1, 1)
        or conv.dilation != (1, 1)
        or conv.padding != (radius, radius)
        or kernel[0] != kernel[1]
        or conv.padding_mode != "zeros"
        or kernel[0] > MAX_KERNEL_SIZE
        or weight.shape != (channels, 1, *kernel)
    ):
        return f"conv is {conv}, not depthwise with a bias, stride 1, dilation 1 and zero padding kernel_size // 2"
    return "conv has hooks" if has_hooks(conv) else None


# --- whole parts of a network, for inference (inference/) ---

_CPU = torch.device("cpu")
_DTYPES = (torch.float32, torch.bfloat16)


def _parameters(name: str, module: Any, *shape: int) -> dict[str, tuple[Tensor | None, tuple[int, ...]]]:
    """A module's weight, with the shape that it is to have, and its bias, by name; of None and nn.Identity nothing."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    return {f"{name}.weight": (weight, shape), f"{name}.bias": (bias, shape[:1])}


def _parameters_reason(
    named: dict[str, tuple[Tensor | None, tuple[int, ...]]],
    dtype: torch.dtype,
    device: torch.device = _CPU,
    dtypes: Sequence[torch.dtype] = _DTYPES,
) -> str | None:
    if dtype not in dtypes:
        names = [str(d).removeprefix("torch.") for d in dtypes]
        return f"the fused ops compute in {', '.join(names[:-1])} and {names[-1]}, not in {dtype}"
    for name, (p, shape) in named.items():
        if p is None:
            continue
        if not is_plain_tensor(p):
            return f"{name} is a {type(p).__name__}, not a plain tensor"
        if p.shape != shape:
            return f"{name} is {tuple(p.shape)}, not {shape}"
        if p.dtype != dtype or p.device != device:
            where = "the CPU" if device.type == "cpu" else str(device)
            return f"{name} is {p.dtype} on {p.device}, not {dtype} on {where}"
    return None


def _layer_norm_reason(name: str, norm: nn.Module, features: int) -> str | None:
    if not is_plain_layer_norm(norm):
        return _tensors_reason(name, norm) or _differs(name, norm, "a plain LayerNorm")
    if norm.normalized_shape != (features,):
        return f"{name} normalises {norm.normalized_shape}, not ({features},)"
    return None


def _linear_reason(name: str, fc: nn.Module) -> str | None:
    if is_plain_linear(fc):
        return None
    return _tensors_reason(name, fc) or _differs(name, fc, "a plain nn.Linear")


def _no_op(module: nn.Module) -> bool:
    """Whether it returns its input: nothing there, or stochastic depth outside training."""
    kind = class_of(module)
    return kind is nn.Identity or (kind is DropPath and not module.training)


def gated_cnn_block_reason(
    block: GatedCNNBlock, dtype: torch.dtype, device: torch.device = _CPU, dtypes: Sequence[torch.dtype] = _DTYPES
) -> str | None:
    """Why the whole block cannot run as one op in inference, in `dtype` on `device`, of an op that takes `dtypes`."""
    norm, fc1, conv, fc2, ls = block.norm, block.fc1, block.conv, block.fc2, block.ls
    module: Any = block
    if has_hooks(module):
        return "it has hooks"
    reason = gated_dwconv_reason(block) or _linear_reason("fc1", fc1) or _linear_reason("fc2", fc2)
    reason = reason or _layer_norm_reason("norm", norm, block.dim)
    if reason is not None:
        return reason
    if type(conv) is CausalConv2d:
        return "conv is causal"
    scale = layer_scale_of(ls)
    if has_hooks(ls) or (scale is None and class_of(ls) is not nn.Identity):
        return _differs("ls", ls, "a LayerScale")
    if has_hooks(block.drop_path) or not _no_op(block.drop_path):
        return _differs("drop_path", block.drop_path, "idle")
    dim, hidden = block.dim, block.split_indices[0]
    named = _parameters("norm", norm, dim) | _parameters("fc1", fc1, 2 * hidden, dim)
    named |= _parameters("fc2", fc2, dim, hidden) | {"ls.gamma": (scale, (dim,))}
    return _parameters_reason(named | _conv_parameters(block), dtype, device, dtypes)


def _conv_parameters(block: GatedCNNBlock) -> dict[str, tuple[Tensor | None, tuple[int, ...]]]:
    conv: Any = block.conv
    channels = block.split_indices[2]
    return _parameters("conv", conv, channels, 1, *conv.kernel_size) if channels else {}


def conv3x3s2_reason(
    conv: nn.Module, norm: nn.Module | None, act: nn.Module | None, dtype: torch.dtype,
    device: torch.device = _CPU, dtypes: Sequence[torch.dtype] = _DTYPES,
) -> str | None:  # fmt: skip
    """Why act(norm(conv(x))) cannot be fused in inference, in `dtype` on `device`, by ops that take `dtypes`.

    None skips norm and act.
    """
    if not is_plain(conv, nn.Conv2d):
        return _differs("conv", conv, "a plain nn.Conv2d")
    geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    if geometry != ((3, 3), (2, 2), (1, 1), (1, 1), 1, "zeros"):
        return f"conv is {conv}, not 3 x 3 with stride 2 and zero padding of 1"
    if act is not None and (has_hooks(act) or activation_name(act) is None):
        return _differs("act", act, f"one of {', '.join(ACTIVATIONS)}")
    c: Any = conv
    reason = None if norm is None else _layer_norm_reason("norm", norm, c.out_channels)
    named = _parameters("conv", conv, c.out_channels, c.in_channels, 3, 3) | _parameters("norm", norm, c.out_channels)
    return reason or _parameters_reason(named, dtype, device, dtypes)


def head_reason(
    norm: nn.Module,
    fc1: nn.Module,
    act: nn.Module,
    mid_norm: nn.Module | None,
    dropout: nn.Module,
    fc2: nn.Module,
    dtype: torch.dtype,
) -> str | None:
    """Why fc2(dropout(mid_norm(act(fc1(norm(mean of x)))))) cannot run as one op in inference, in `dtype` on the CPU.

    mid_norm may be None; fc2 may be an nn.Identity.
    """
    reason = _linear_reason("fc1", fc1)
    if reason is not None:
        return reason
    hidden: Any = fc1.out_features
    if has_hooks(act) or activation_name(act) != "gelu":
        return _differs("act", act, "a GELU")
    if not is_plain(dropout, nn.Dropout):
        return _differs("dropout", dropout, "an nn.Dropout")
    if not is_plain(fc2, nn.Identity):
        reason = _linear_reason("fc2", fc2)
        if reason is None and (fc2.in_features != hidden or fc2.out_features == 0):
            reason = f"fc2 is {fc2}, beside {hidden} features"
    inputs: Any = fc1.in_features
    reason = reason or _layer_norm_reason("norm", norm, inputs)
    if mid_norm is not None:
        reason = reason or _layer_norm_reason("the norm after fc1", mid_norm, hidden)
    if reason is not None:
        return reason
    classes: Any = fc2.out_features if isinstance(fc2, nn.Linear) else 0
    named = _parameters("norm", norm, inputs) | _parameters("fc1", fc1, hidden, inputs)
    named |= _parameters("the norm after fc1", mid_norm, hidden) | _parameters("fc2", fc2, classes, hidden)
    return _parameters_reason(named, dtype)
