"""Fuse the Gated CNN blocks of a live model, and undo it: timm's MambaOut, the authors', or a model built of either.

A patched block is the same object with the same submodules and parameters; only its class changes, to one that
inherits from FusedGatedCNNBlock and from the class it had. So state_dict, optimizers, averages, hooks, wrappers and
references to the block stay what they were.
"""

import functools
import inspect
from typing import Any, TypeVar

import torch
from torch import nn

from .. import backends
from ..nn import FusedGatedCNNBlock

# The names that the authors' repository and timm give to the block.
BLOCK_CLASS_NAMES = ("GatedCNNBlock", "GatedConvBlock")
_PARTS = ("norm", "fc1", "act", "conv", "fc2", "drop_path", "split_indices")

_Model = TypeVar("_Model", bound=nn.Module)


class _PatchedBlock(FusedGatedCNNBlock):
    """What a patched block's class inherits from, beside the class it had, `_original`."""

    _original: Any  # a subclass of nn.Module

    def __reduce_ex__(self, protocol: Any) -> Any:  # the class is made at run time: pickle could not find it by name
        return _empty, (self._original,), self.__dict__.copy()


@functools.cache
def fused_class(original: Any) -> type[nn.Module]:
    """The class that blocks of class `original` get when patched."""
    return type(f"Fused{original.__name__}", (_PatchedBlock, original), {"_original": original, "__module__": __name__})


def _empty(original: Any) -> nn.Module:
    cls: Any = fused_class(original)
    return cls.__new__(cls)


def _is_sharded(module: nn.Module) -> bool:
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)


def is_candidate(module: nn.Module) -> bool:
    names = {cls.__name__ for cls in type(module).__mro__}
    return not isinstance(module, FusedGatedCNNBlock) and not names.isdisjoint(BLOCK_CLASS_NAMES)


def refusal(block: nn.Module) -> str | None:
    """Why this block cannot be fused, or None."""
    missing = [part for part in _PARTS if not hasattr(block, part)]
    if missing:
        return f"it has no {', '.join(missing)}"
    if _is_sharded(block):
        return "it is sharded already; patch before fully_shard"
    if "forward" in vars(block):
        return "its forward was replaced on the object"
    original: Any = type(block)
    return _mismatch(original)


@functools.cache
def _mismatch(original: Any) -> str | None:
    """Why blocks of this class do not compute what FusedGatedCNNBlock does; None when they do.

    A block with random parameters is run both ways in fp64, so that neither a class of the same name nor another
    version of timm is fused into something else.
    """
    options = {"expansion_ratio": 3.0, "conv_ratio": 1.25, "kernel_size": 5, "ls_init_value": 0.5}
    accepted = inspect.signature(original).parameters
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad(), torch.autocast("cpu", enabled=False):
        torch.manual_seed(0)
        try:
            block = original(16, **{name: value for name, value in options.items() if name in accepted})
            block.double().eval()
            for parameter in block.parameters():
                parameter.normal_()
            x = torch.randn(2, 6, 5, 16, dtype=torch.float64)
            expected = block(x)
            fuse(block)
            with backends.force("reference"):
                actual = block(x)
        except Exception as error:
            return f"{original.__name__}(dim) could not be tried: {error}"
    if actual.shape == expected.shape and (actual - expected).abs().max() <= 1e-10 * expected.abs().max():
        return None
    return f"a {original.__name__} computes something else than MambaOut's Gated CNN block"


def fuse(block: nn.Module) -> None:
    added: dict[str, Any] = {}
    if not hasattr(block, "ls"):
        added["ls"] = nn.Identity()  # not registered: named_modules stays as it is
    if not hasattr(block, "dim"):
        fc2: Any = block.fc2
        added["dim"] = fc2.out_features
    vars(block).update(added, _added_by_patch=tuple(added))
    original: Any = type(block)
    block.__class__ = fused_class(original)


def patch(model: _Model) -> _Model:
    """Fuse every Gated CNN block of `model`, in place; returns `model`.

    Works on any module that contains timm's GatedConvBlock or the authors' GatedCNNBlock, wrapped or not (DDP, EMA,
    features_only, ...), with any of their options; what cannot run fused (an act that the op has not, a hooked conv)
    runs as before, with a warning. Blocks that are fused already stay so. Call it before torch.compile and fully_shard.

    Raises:
        TypeError: not a torch.nn.Module.
        ValueError: no such block in it, or one that does not compute what the fused block computes; then none is fused.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    blocks = {name: module for name, module in model.named_modules() if is_candidate(module)}
    if not blocks and not any(isinstance(module, FusedGatedCNNBlock) for module in model.modules()):
        raise ValueError(
            f"model: {type(model).__name__} has no block of a class named {' or '.join(BLOCK_CLASS_NAMES)} to fuse"
        )
    for name, block in blocks.items():
        reason = refusal(block)
        if reason is not None:
            raise ValueError(f"model: block {name!r} cannot be fused: {reason}; nothing was changed")
    for block in blocks.values():
        fuse(block)
    return model


def unpatch(model: _Model) -> _Model:
    """Give every block that `patch` fused its class back, in place; returns `model`. Other blocks stay as they are.

    Raises ValueError for a model that was sharded (fully_shard) after it was patched.
    """
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, _PatchedBlock)}
    for name, block in blocks.items():
        if _is_sharded(block):
            raise ValueError(f"model: block {name!r} is sharded; unpatch before fully_shard. Nothing was changed")
    for block in blocks.values():
        block.__class__ = block._original
        for attribute in vars(block).pop("_added_by_patch"):
            del vars(block)[attribute]
    return model
