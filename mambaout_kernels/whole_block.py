"""The whole Gated CNN block as one op, for inference on the CPU.

    out = x + ls(fc2(act(g) * concat(i, dwconv(c)))),   [g, i, c] = fc1(layer_norm(x))

Rows of x go through all of it while they are in cache: the 2 * hidden channels of fc1's output are never written to
memory.
"""

from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from .backends import cpu
from .causal import CausalConv2d
from .linear import hooked
from .norm_linear import is_layer_norm
from .packs import low_precision, packed, stored_dtype
from .reference import ACTIVATIONS

_library = torch.library.Library("mambaout_kernels", "FRAGMENT")
_library.define(
    "gated_cnn_block(Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor fc1_weight, Tensor? fc1_bias, "
    "Tensor? conv_weight, Tensor? conv_bias, Tensor fc2_weight, Tensor? fc2_bias, Tensor? scale, float eps, str act, "
    "bool bf16, int pack) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _check(x: Tensor, fc1_weight: Tensor, fc2_weight: Tensor, act: str) -> None:
    dim = fc1_weight.shape[1]
    if x.ndim != 4 or x.shape[3] != dim:
        raise ValueError(f"x must be (N, H, W, {dim}), as fc1's inputs; got {tuple(x.shape)}")
    if x.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"x must be float32 or bfloat16; got {x.dtype}")
    if fc2_weight.shape != (dim, fc1_weight.shape[0] // 2):
        raise ValueError(
            f"fc2_weight must be {(dim, fc1_weight.shape[0] // 2)}, for fc1's; got {tuple(fc2_weight.shape)}"
        )
    if act not in ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}; got {act!r}")


def _impl(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    scale: Tensor | None,
    eps: float,
    act: str,
    bf16: bool,
    pack: int,
) -> Tensor:
    _check(x, fc1_weight, fc2_weight, act)
    parameters = [
        norm_weight, norm_bias, fc1_weight, fc1_bias, conv_weight, conv_bias, fc2_weight, fc2_bias, scale,
    ]  # fmt: skip
    return cpu.gated_cnn_block(x, packed(pack, parameters, bf16, cpu.pack_block), eps, act)


def _fake(x: Tensor, *arguments: Any) -> Tensor:
    fc1_weight, fc2_weight, act = arguments[2], arguments[6], arguments[10]
    _check(x, fc1_weight, fc2_weight, act)
    return x.new_empty(x.shape)


_library.impl("gated_cnn_block", _impl, "CPU")
torch.library.register_fake("mambaout_kernels::gated_cnn_block", _fake, lib=_library)
_op = torch.ops.mambaout_kernels.gated_cnn_block.default


def _does_nothing(module: nn.Module) -> bool:
    """Whether it returns its input: nothing there, or stochastic depth outside training."""
    return type(module) is nn.Identity or (type(module).__name__ == "DropPath" and not module.training)


def _scale_of(module: nn.Module) -> tuple[bool, Tensor | None]:
    """(whether it is known, its factors): of our LayerScale and timm's, or of nothing there."""
    if type(module) is nn.Identity:
        return True, None
    gamma = getattr(module, "gamma", None)
    return type(module).__name__ == "LayerScale" and isinstance(gamma, Tensor), gamma


_conv_settings = itemgetter("out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


def _settings(norm: nn.Module, conv: nn.Module, drop_path: nn.Module) -> tuple[Any, ...]:
    """What else of the modules `_is_plain` looks at."""
    of_norm, of_conv = vars(norm), vars(conv)
    return (
        of_norm["normalized_shape"],
        of_norm.get("_fast_norm"),
        _conv_settings(of_conv) if "kernel_size" in of_conv else None,
        drop_path.training,
    )


class _Seen:
    """A block that `_is_plain`, so that the next call need only look at whether it is still the same.

    Looking at all of it takes as long as a hundredth of a block on one image.
    """

    def __init__(self, block: Any):
        self.modules = tuple(block._modules.values())
        self.types = [type(m) for m in self.modules]
        self.hooks = [
            hooks
            for m in self.modules
            for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
        ]
        self.parts = block.norm, block.conv, block.drop_path
        self.settings = _settings(*self.parts)
        self.act = block.op_act
        self.parameters = len(self.list_parameters())

    def list_parameters(self) -> list[Tensor]:
        return [p for m in self.modules for p in m._parameters.values() if p is not None]

    def again(self, block: Any, stored: torch.dtype) -> bool:
        modules = block._modules.values()
        if len(modules) != len(self.modules) or not all(map(is_, modules, self.modules)) or any(self.hooks):
            return False
        if [type(m) for m in modules] != self.types or block.op_act != self.act:
            return False
        if _settings(*self.parts) != self.settings:
            return False
        parameters = self.list_parameters()
        return len(parameters) == self.parameters and all(p.dtype is stored and p.is_cpu for p in parameters)


def _is_plain(block: Any, stored: torch.dtype) -> bool:
    """Whether all of the block's modules are such as `run` reads parameters of, without hooks, in the stored dtype."""
    norm, fc1, fc2 = block.norm, block.fc1, block.fc2
    if not is_layer_norm(norm) or type(fc1) is not nn.Linear or type(fc2) is not nn.Linear:
        return False
    if type(block.conv) is CausalConv2d or norm.normalized_shape != (block.dim,) or block.unfused_reason() is not None:
        return False
    if not _does_nothing(block.drop_path) or any(map(hooked, (norm, fc1, fc2, block.ls, block.drop_path))):
        return False
    known, scale = _scale_of(block.ls)
    if not known:
        return False
    parameters = (norm.weight, fc1.weight, fc2.weight, scale, getattr(block.conv, "weight", None))
    return all(p is None or (p.dtype == stored and p.is_cpu) for p in parameters)


def applies(block: Any, x: Tensor) -> bool:
    """Whether `run` computes what calling the block's modules one after the other would.

    It does on the compiled CPU kernels, when no gradient is wanted, for plain modules without hooks, in float32 or
    bfloat16, or with float32 parameters under bfloat16 autocast.
    """
    stored = stored_dtype(x)
    if stored is None:
        return False
    if torch.compiler.is_compiling():
        return _is_plain(block, stored)
    seen = block.pack.seen
    if seen is not None and seen.again(block, stored):
        return True
    plain = _is_plain(block, stored)
    block.pack.seen = _Seen(block) if plain else None
    return plain


def run(block: Any, x: Tensor) -> Tensor:
    """The block's output for x, (N, H, W, dim) to the same, in the dtype that the modules would give. See `applies`."""
    norm, fc1, conv, fc2 = block.norm, block.fc1, block.conv, block.fc2
    scale = _scale_of(block.ls)[1]
    in_bf16 = low_precision(x) and cpu.multiplies_bf16()
    if scale is not None and scale.dtype != x.dtype:  # autocast multiplies by a float32 scale in float32
        x = x.float()
    return _op(
        x,
        norm.weight,
        norm.bias,
        fc1.weight,
        fc1.bias,
        getattr(conv, "weight", None),
        getattr(conv, "bias", None),
        fc2.weight,
        fc2.bias,
        scale,
        norm.eps,
        block.op_act,
        in_bf16,
        block.pack.number,
    )
