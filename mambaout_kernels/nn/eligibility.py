"""Whether a fused op may stand in for modules, and if not why: the one place that knows.

A reason is a sentence for the user; None means that the op computes what calling the modules would.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from ..reference import ACTIVATIONS, activation
from .causal import CausalConv2d

# Class names under which torch, timm and others ship the op's activations; what such a class computes is verified.
_ACTIVATION_CLASS_NAMES = ("GELU", "GELUTanh", "PytorchGELUTanh", "SiLU", "Swish", "Identity")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_any_global_hook: Any = getattr(nn.modules.module, "_has_any_global_hook", None)


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


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward."""
    if "forward" in vars(module) or any(getattr(module, name) for name in _HOOKS):
        return True
    if torch.compiler.is_compiling():  # compilers refuse hooks on all modules, or see to them
        return False
    return _any_global_hook is None or bool(_any_global_hook())


def is_plain_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear and not has_hooks(module)


def is_plain_tensor(t: Tensor) -> bool:
    """Neither a DTensor nor quantized nor any other subclass, whose operations may mean something else.

    FakeTensor is what exporters have in a parameter's place.
    """
    return type(t) in (Tensor, nn.Parameter) or (type(t) is FakeTensor and torch.compiler.is_compiling())


def is_plain_layer_norm(module: nn.Module) -> bool:
    """nn.LayerNorm, or timm's class of that name, which computes the same unless its fast norm is on; without hooks."""
    kind = type(module)
    ours = kind is nn.LayerNorm
    timms = (kind.__module__, kind.__name__) == ("timm.layers.norm", "LayerNorm") and not module._fast_norm
    return (ours or timms) and not has_hooks(module)


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))

# What instances of other packages' activation classes compute, by their class, its forward and their attributes.
_verified: dict[tuple[Any, ...], str | None] = {}
_last_of_class: dict[type, str | None] = {}  # for compilers, which cannot call it


def activation_name(act: nn.Module) -> str | None:
    """The op's name for what `act` computes: "gelu", "gelu_tanh", "silu" or "identity"; None for anything else.

    torch's own modules are known by type. A class of the same name from elsewhere (timm's GELU, GELUTanh, Swish) is
    called on a few fp64 numbers and compared, so no other package is imported to recognise it.
    """
    kind = type(act)
    if kind is nn.GELU:
        return "gelu" if act.approximate == "none" else "gelu_tanh"
    if kind is nn.SiLU:
        return "silu"
    if kind is nn.Identity:
        return "identity"
    if torch.compiler.is_compiling():
        return _last_of_class.get(kind)
    own = {name: value for name, value in vars(act).items() if name not in _OF_EVERY_MODULE}
    if any(act._modules.values()) or not all(isinstance(v, bool | int | float | str | None) for v in own.values()):
        return None  # these may change what it computes without being seen here
    key = (kind, kind.forward, tuple(own.items()))
    if key not in _verified:
        _verified[key] = _computed(act)
    _last_of_class[kind] = _verified[key]
    return _verified[key]


def _computed(act: nn.Module) -> str | None:
    if type(act).__name__ not in _ACTIVATION_CLASS_NAMES or any(True for _ in act.parameters()):
        return None
    x = torch.linspace(-8, 8, 65, dtype=torch.float64, device="cpu")
    try:
        y = act(x.clone())
        return next((name for name in ACTIVATIONS if torch.allclose(y, activation(x, name), rtol=0, atol=1e-9)), None)
    except Exception:  # a foreign class may do anything; if it cannot be checked, it is not fused
        return None


def gated_dwconv_reason(block: GatedCNNBlock) -> str | None:
    """Why `gated_dwconv` cannot stand in for a block's act and conv."""
    if activation_name(block.act) is None:
        return f"act {type(block.act).__name__} is none of {', '.join(ACTIVATIONS)}"
    if has_hooks(block.act):
        return "act has hooks"
    conv: Any = block.conv
    channels = block.split_indices[2]
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
    return "conv has hooks" if has_hooks(conv) else None


# --- whole parts of a network, for inference (inference/) ---

_CPU = torch.device("cpu")
_DTYPES = (torch.float32, torch.bfloat16)


def _parameters_reason(
    named: dict[str, Any], dtype: torch.dtype, device: torch.device = _CPU, dtypes: Sequence[torch.dtype] = _DTYPES
) -> str | None:
    if dtype not in dtypes:
        names = [str(d).removeprefix("torch.") for d in dtypes]
        return f"the fused ops compute in {', '.join(names[:-1])} and {names[-1]}, not in {dtype}"
    for name, p in named.items():
        if p is not None and (p.dtype != dtype or p.device != device):
            where = "the CPU" if device.type == "cpu" else str(device)
            return f"{name} is {p.dtype} on {p.device}, not {dtype} on {where}"
    return None


def _layer_norm_reason(name: str, norm: nn.Module, features: int) -> str | None:
    if not is_plain_layer_norm(norm):
        return f"{name} has hooks, or is a {type(norm).__name__}, not a LayerNorm"
    if norm.normalized_shape != (features,):
        return f"{name} normalises {norm.normalized_shape}, not ({features},)"
    return None


def _linear_reason(name: str, fc: nn.Module) -> str | None:
    return None if is_plain_linear(fc) else f"{name} has hooks, or is a {type(fc).__name__}, not an nn.Linear"


def layer_scale_of(module: nn.Module) -> Tensor | None:
    """The factors of our LayerScale and timm's; None for anything else."""
    gamma = getattr(module, "gamma", None)
    return gamma if type(module).__name__ == "LayerScale" and isinstance(gamma, Tensor) else None


def _no_op(module: nn.Module) -> bool:
    """Whether it returns its input: nothing there, or stochastic depth outside training."""
    return type(module) is nn.Identity or (type(module).__name__ == "DropPath" and not module.training)


def gated_cnn_block_reason(
    block: GatedCNNBlock, dtype: torch.dtype, device: torch.device = _CPU, dtypes: Sequence[torch.dtype] = _DTYPES
) -> str | None:
    """Why the whole block cannot run as one op in inference, in `dtype` on `device`, of an op that takes `dtypes`."""
    norm, fc1, conv, fc2, ls = block.norm, block.fc1, block.conv, block.fc2, block.ls
    if isinstance(block, nn.Module) and has_hooks(block):
        return "it has hooks"
    reason = gated_dwconv_reason(block) or _linear_reason("fc1", fc1) or _linear_reason("fc2", fc2)
    reason = reason or _layer_norm_reason("norm", norm, block.dim)
    if reason is not None:
        return reason
    if type(conv) is CausalConv2d:
        return "conv is causal"
    scale = layer_scale_of(ls)
    if has_hooks(ls) or (scale is None and type(ls) is not nn.Identity):
        return f"ls has hooks, or is a {type(ls).__name__}, not a LayerScale"
    if has_hooks(block.drop_path) or not _no_op(block.drop_path):
        return f"drop_path has hooks, or is a {type(block.drop_path).__name__}"
    weights = {f"{n}.weight": getattr(m, "weight", None) for n, m in
               (("norm", norm), ("fc1", fc1), ("conv", conv), ("fc2", fc2))}  # fmt: skip
    return _parameters_reason({**weights, "ls.gamma": scale}, dtype, device, dtypes)


def conv3x3s2_reason(conv: nn.Module, norm: nn.Module | None, act: nn.Module | None, dtype: torch.dtype) -> str | None:
    """Why act(norm(conv(x))) cannot run as one op in inference, in `dtype` on the CPU; None skips norm and act."""
    if type(conv) is not nn.Conv2d or has_hooks(conv):
        return f"conv has hooks, or is a {type(conv).__name__}, not a plain nn.Conv2d"
    geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    if geometry != ((3, 3), (2, 2), (1, 1), (1, 1), 1, "zeros"):
        return f"conv is {conv}, not 3 x 3 with stride 2 and zero padding of 1"
    if act is not None and (has_hooks(act) or activation_name(act) is None):
        return f"act has hooks, or is a {type(act).__name__}, none of {', '.join(ACTIVATIONS)}"
    reason = None if norm is None else _layer_norm_reason("norm", norm, conv.out_channels)
    norm_weight: Any = None if norm is None else norm.weight
    return reason or _parameters_reason({"conv.weight": conv.weight, "norm.weight": norm_weight}, dtype)


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
        return f"act has hooks, or is a {type(act).__name__}, not a GELU"
    if has_hooks(dropout) or type(dropout) is not nn.Dropout:
        return f"dropout has hooks, or is a {type(dropout).__name__}, not an nn.Dropout"
    if type(fc2) is not nn.Identity or has_hooks(fc2):
        reason = _linear_reason("fc2", fc2)
        if reason is None and (fc2.in_features != hidden or fc2.out_features == 0):
            reason = f"fc2 is {fc2}, beside {hidden} features"
    inputs: Any = fc1.in_features
    reason = reason or _layer_norm_reason("norm", norm, inputs)
    if mid_norm is not None:
        reason = reason or _layer_norm_reason("the norm after fc1", mid_norm, hidden)
    if reason is not None:
        return reason
    modules = {"norm": norm, "fc1": fc1, "the norm after fc1": mid_norm, "fc2": fc2}
    return _parameters_reason({f"{n}.weight": getattr(m, "weight", None) for n, m in modules.items()}, dtype)
