"""Whether calling a module does what its class says and nothing else, so that its parameters may be read instead."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from .layers import DropPath, LayerScale

_any_global_hook: Any = getattr(nn.modules.module, "_has_any_global_hook", None)
_call = nn.Module.__call__

# Classes of timm, by where they are defined, which compute what classes here do. A name alone says nothing.
_TIMM = {
    ("timm.layers.norm", "LayerNorm"): nn.LayerNorm,
    ("timm.layers.activations", "GELU"): "gelu",
    ("timm.layers.activations", "GELUTanh"): "gelu_tanh",
    ("timm.layers.activations", "Swish"): "silu",
    ("timm.layers.drop", "DropPath"): DropPath,
    ("timm.models.layers.drop", "DropPath"): DropPath,  # timm before 0.9
    ("timm.layers.layer_scale", "LayerScale"): LayerScale,
}


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward."""
    own = vars(module)
    if "forward" in own or own["_forward_hooks"] or own["_forward_pre_hooks"]:
        return True
    if own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return True
    if all_have_hooks():
        return True
    return nn.Module.__call__ is not _call and not torch.compiler.is_compiling()  # exporters replace it, too


def all_have_hooks() -> bool:
    """Whether there are hooks of all modules, as of tools that watch a model: FlopCounterMode, profilers."""
    return _any_global_hook is None or bool(_any_global_hook())


def watched() -> bool:
    """Whether a TorchFunctionMode sees, and may change, each function of PyTorch that is called.

    That of `torch.set_default_device` changes those only that make tensors.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_function_stack() == 0:  # exporters have modes of their own
        return False
    return any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())


def _replaced(kind: Any) -> bool:
    """Whether the class's forward is not the one that was written in it."""
    forward = kind.forward
    if forward.__module__ != kind.__module__ or forward.__qualname__ != f"{kind.__qualname__}.forward":
        return True
    return "__wrapped__" in vars(forward)  # a decorator gave it these names


_replaced._dynamo_marked_constant = True  # type: ignore[attr-defined]  # compilers call it as they trace


def class_of(module: nn.Module) -> Any:
    """The module's class; of timm's classes what is the same here. None where its forward was replaced."""
    kind = type(module)
    return None if _replaced(kind) else _TIMM.get((kind.__module__, kind.__qualname__), kind)


def is_plain(module: nn.Module, *classes: type) -> bool:
    """Whether calling the module does what one of these classes says, and nothing else."""
    return class_of(module) in classes and not has_hooks(module)


def is_plain_tensor(t: Tensor | None) -> bool:
    """Not a DTensor, nor quantized, nor any other subclass, whose operations may mean something else; and not sparse.

    FakeTensor is what exporters have in a parameter's place.
    """
    if t is None:
        return True
    kind = type(t)
    known = kind in (Tensor, nn.Parameter) or (kind is FakeTensor and torch.compiler.is_compiling())
    return known and t.layout == torch.strided


class Weights(NamedTuple):
    """What stands for a plain nn.Linear: its parameters, or what was made of them (alignment.py)."""

    weight: Tensor  # (out_features, in_features)
    bias: Tensor | None


def linear_weights(module: Any) -> Weights | None:
    """Of an nn.Linear on plain tensors of shapes that need no broadcasting; None of anything else."""
    if not is_plain(module, nn.Linear) or watched():
        return None
    weight, bias = module.weight, module.bias
    if not (is_plain_tensor(weight) and is_plain_tensor(bias)):
        return None
    fits = weight.ndim == 2 and (bias is None or bias.shape == weight.shape[:1])
    return Weights(weight, bias) if fits else None


def is_plain_linear(module: nn.Module) -> bool:
    return linear_weights(module) is not None


def is_plain_layer_norm(module: Any) -> bool:
    """nn.LayerNorm on plain tensors; timm's unless its fast norm is on."""
    if not is_plain(module, nn.LayerNorm) or getattr(module, "_fast_norm", False):
        return False
    return is_plain_tensor(module.weight) and is_plain_tensor(module.bias)


def activation_name(act: nn.Module) -> str | None:
    """The op's name for what `act` computes: "gelu", "gelu_tanh", "silu" or "identity"; None for anything else."""
    kind = class_of(act)
    if kind is nn.GELU:
        approximate: Any = act.approximate
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(approximate)
    if kind is nn.SiLU:
        return "silu"
    if kind is nn.Identity:
        return "identity"
    return kind if isinstance(kind, str) else None


def layer_scale_of(module: nn.Module) -> Tensor | None:
    """The factors of our LayerScale and timm's; None for anything else."""
    scale: Any = module.gamma if class_of(module) is LayerScale else None
    return scale
