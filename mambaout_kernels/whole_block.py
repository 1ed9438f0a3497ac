"""The whole Gated CNN block as one op, for inference on the CPU.

    out = x + ls(fc2(act(g) * concat(i, dwconv(c)))),   [g, i, c] = fc1(layer_norm(x))

Rows of x go through all of it while they are in cache: the 2 * hidden channels of fc1's output are never written to
memory. The kernels read the parameters in an order of their own; they are packed at the first call, and again when they
have changed: replaced, written in place (PyTorch counts that), or written where PyTorch does not count (through `.data`
or NumPy), as far as samples of them, one for every 8 KiB and 64 of each parameter at least, show it.
"""

import secrets
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from . import backends
from .backends import cpu
from .causal import CausalConv2d
from .norm_linear import hooked, is_layer_norm
from .reference import ACTIVATIONS

_library = torch.library.Library("mambaout_kernels", "FRAGMENT")
_library.define(
    "gated_cnn_block(Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor fc1_weight, Tensor? fc1_bias, "
    "Tensor? conv_weight, Tensor? conv_bias, Tensor fc2_weight, Tensor? fc2_bias, Tensor? scale, float eps, str act, "
    "bool low_precision, int pack) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)

# What packed parameters were made from, and themselves, by the number of their Pack.
_packs: dict[int, tuple[Any, Tensor]] = {}


class Pack:
    """Where a block's packed parameters are kept while the block lives. A copy of a block has one of its own."""

    def __init__(self) -> None:
        self.number = secrets.randbits(62)  # unique in any process that an exported program comes to
        weakref.finalize(self, _packs.pop, self.number, None)

    def __deepcopy__(self, memo: Any) -> "Pack":
        return Pack()

    def __reduce__(self) -> tuple[type["Pack"], tuple[()]]:
        return Pack, ()


def _packed(parameters: list[Tensor | None], low_precision: bool, pack: int) -> Tensor:
    given = [t for t in parameters if t is not None]
    memory = [
        (t.data_ptr(), t.numel() * t.element_size() if t.is_contiguous() else 0, 0 if t.is_inference() else t._version)
        for t in given
    ]
    key = (low_precision, cpu.instruction_set(), [t is None for t in parameters], memory, cpu.fingerprint(memory))
    found = _packs.get(pack)
    if found is not None and found[0] == key and all(bytes for _, bytes, _ in memory):
        return found[1]
    packed = cpu.pack_block([None if t is None else t.detach().float().contiguous() for t in parameters], low_precision)
    _packs[pack] = (key, packed)
    return packed


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
    low_precision: bool,
    pack: int,
) -> Tensor:
    _check(x, fc1_weight, fc2_weight, act)
    parameters = [
        norm_weight, norm_bias, fc1_weight, fc1_bias, conv_weight, conv_bias, fc2_weight, fc2_bias, scale,
    ]  # fmt: skip
    return cpu.gated_cnn_block(x, _packed(parameters, low_precision, pack), eps, act)


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
    if x.device.type != "cpu" or torch.is_grad_enabled() or x.ndim != 4 or backends.preferred("cpu") != "cpu":
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
    if x.dtype not in (torch.float32, torch.bfloat16):
        return False
    stored = x.dtype
    if torch.is_autocast_enabled("cpu"):
        if torch.get_autocast_dtype("cpu") != torch.bfloat16:
            return False
        stored = torch.float32
    parameters = (norm.weight, fc1.weight, fc2.weight, scale, getattr(block.conv, "weight", None))
    return all(p is None or (p.dtype == stored and p.device == x.device) for p in parameters)


def run(block: Any, x: Tensor) -> Tensor:
    """The block's output for x, (N, H, W, dim) to the same, in the dtype that the modules would give. See `applies`."""
    norm, fc1, conv, fc2 = block.norm, block.fc1, block.conv, block.fc2
    scale = _scale_of(block.ls)[1]
    low_precision = x.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
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
        low_precision and cpu.multiplies_bf16(),
        block.pack.number,
    )
