"""The whole Gated CNN block as one op, for inference on the CPU.

    out = x + ls(fc2(act(g) * concat(i, dwconv(c)))),   [g, i, c] = fc1(layer_norm(x))

Rows of x go through all of it while they are in cache: the 2 * hidden channels of fc1's output are never written to
memory.
"""

from typing import Any

import torch
from torch import Tensor, nn

from . import seen
from .backends import cpu
from .causal import CausalConv2d
from .linear import hooked
from .norm_linear import is_layer_norm
from .packs import check_dtype, low_precision, packed, stored_dtype
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
    check_dtype(x=x)
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


def applies(block: Any, x: Tensor) -> bool:
    """Whether `run` computes what calling the block's modules one after the other would.

    It does on the compiled CPU kernels, when no gradient is wanted, for plain modules without hooks, in float32 or
    bfloat16, or with float32 parameters under bfloat16 autocast.
    """
    stored = stored_dtype(x)
    if stored is None:
        return False
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
    return all(p is None or (p.dtype == stored and p.device == x.device) for p in parameters)


# Attributes of norm, conv, act and drop_path that `applies` looks at.
_SETTINGS = (
    "normalized_shape", "eps", "_fast_norm",
    "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode",
    "approximate", "training",
)  # fmt: skip


def again(block: Any, x: Tensor) -> Tensor | None:
    """The block's output, where it is as it was when `run` was called last; else None."""
    return seen.again(block.pack, cpu.gated_cnn_block, x)


def run(block: Any, x: Tensor) -> Tensor:
    """The block's output for x, (N, H, W, dim) to the same, in the dtype that the modules would give. See `applies`."""
    norm, fc1, conv, fc2 = block.norm, block.fc1, block.conv, block.fc2
    scale = _scale_of(block.ls)[1]
    in_bf16 = low_precision(x) and cpu.multiplies_bf16()
    given = x
    if scale is not None and scale.dtype != x.dtype:  # autocast multiplies by a float32 scale in float32
        x = x.float()
    parameters = (
        norm.weight, norm.bias, fc1.weight, fc1.bias, getattr(conv, "weight", None), getattr(conv, "bias", None),
        fc2.weight, fc2.bias, scale,
    )  # fmt: skip
    y = _op(x, *parameters, norm.eps, block.op_act, in_bf16, block.pack.number)
    if x is given:
        seen.remember(block.pack, (block,), _SETTINGS, parameters, cpu.gated_cnn_block, x, y, norm.eps, block.op_act)
    elif not torch.compiler.is_compiling():
        block.pack.seen = None
    return y
