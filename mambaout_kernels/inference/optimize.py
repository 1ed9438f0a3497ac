"""optimize_for_inference: which parts of a model can be fused is asked once; these are replaced in a frozen copy."""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends
from ..backends import triton
from ..integrations import patching
from ..models import MambaOut
from ..nn import FusedGatedCNNBlock
from ..nn.downsample import Downsample, Stem
from ..nn.eligibility import conv3x3s2_reason, gated_cnn_block_reason, head_reason
from ..nn.head import Head
from ..nn.plain import has_hooks, is_plain_tensor
from ..ops.conv_norm import WIDEST
from . import split_blocks
from .model import InferenceModel, Part
from .normed_convs import NormedDownsample, NormedStem
from .parts import FusedHead, PackedBlocks, PackedDownsample, PackedStem
from .split_blocks import SplitBlocks, split_reason


def optimize_for_inference(
    model: nn.Module,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    cuda_graphs: bool = False,
) -> InferenceModel:
    """A frozen copy of `model` that only infers, as fast as this machine can; later changes of `model` do not reach it.

    On the CPU the stem, what stands between the stages, each run of Gated CNN blocks, and the head become one op each,
    on weights packed for the instruction set in use. What cannot be fused runs through its own modules; `report()`
    tells what and why. On GPUs each block is three kernels, or three and two matrix products of PyTorch's where it is
    wide (ops/split_block.py), and a convolution is followed by one kernel, for bias, norm and activation; on other
    devices, and in what these do not take, blocks are fused as by `patch`.

    Args:
        model: a MambaOut of this package, of timm or of the authors, patched or not; one block; or any module that
            contains such parts (nn.Sequential, features_only, a detector, an EMA or DDP wrapper). It stays as it is.
        dtype: what to compute in: float32 or bfloat16 are fused, on GPUs float16, too. None for the model's own. As
            after `model.to(dtype)`, weights are rounded to it, and so is the input. In float32
            `torch.set_float32_matmul_precision` counts, as it is set now: on the CPU "medium" allows products of
            bfloat16 numbers on processors that multiply these fast; on GPUs blocks are fused where it allows TF32.
        device: where to; None for the model's own.
        cuda_graphs: on an NVIDIA GPU, capture forward(x) of one tensor once for each shape of x, and replay it, where
            launching takes longer than computing: small batches, slow hosts. Each of up to 16 shapes keeps the memory
            of its activations; a model whose forward looks at values, as detectors do, cannot be captured.

    Raises:
        TypeError: not a torch.nn.Module, an InferenceModel, or a dtype that is not floating point.
        ValueError: nothing in it that could be fused, on any device; cuda_graphs elsewhere than on a GPU.

    An optimized model is safe to call from several threads at once, and can be pickled, deep-copied, forked, compiled
    and exported. The copy's weights are in memory beside the original's until that is dropped.
    """
    from ..ops import flops  # noqa: F401 - here: it imports triton

    if isinstance(model, InferenceModel):
        raise TypeError("model must not be an InferenceModel: it is optimized already")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point dtype, got {dtype}")
    model = _unwrapped(model)
    frozen = _sharing_copy(model).to(device=device, dtype=dtype).eval().requires_grad_(False)
    like = next((p for p in frozen.parameters() if p.is_floating_point()), None)
    if like is None:
        raise ValueError(f"model: {type(model).__name__} has no floating-point parameter, so no block to fuse")
    if cuda_graphs and like.device.type != "cuda":
        raise ValueError(f"cuda_graphs must be False on {like.device.type}: a CUDA graph needs a GPU")
    parts: list[Part] = []
    _fuse_foreign_blocks(frozen, parts)
    swap = _Swap(like.dtype, like.device, parts)
    frozen = swap.module(frozen, "")
    if not parts:
        raise ValueError(
            f"model: {type(model).__name__} has no Gated CNN block, stem, downsampling or head of a MambaOut to fuse"
        )
    _own_memory(frozen, model)
    return InferenceModel(frozen, parts, like.dtype, cuda_graphs)


def _unwrapped(model: nn.Module) -> nn.Module:
    """What torch.compile and data parallel wrappers are around."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _sharing_copy(model: nn.Module) -> nn.Module:
    """A deep copy whose parameters and buffers are new tensors on the same memory: nothing is held twice."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None and id(p) not in memo:
                memo[id(p)] = nn.Parameter(p.detach(), requires_grad=False)
        for b in module._buffers.values():
            if b is not None and id(b) not in memo:
                memo[id(b)] = b.detach()
    return copy.deepcopy(model, memo)


def _own_memory(frozen: nn.Module, model: nn.Module) -> None:
    """What still lies in the original's memory gets its own; of tensors that do not tell where they lie, all."""
    theirs = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers()) if is_plain_tensor(t)}
    own: dict[Tensor, Tensor] = {}  # a tensor may be of several modules
    for module in frozen.modules():
        for tensors in (module._parameters, module._buffers):
            for name, t in tensors.items():
                if t is None or (is_plain_tensor(t) and t.untyped_storage().data_ptr() not in theirs):
                    continue
                if t not in own:
                    copied = t.detach().clone()
                    own[t] = nn.Parameter(copied, requires_grad=False) if isinstance(t, nn.Parameter) else copied
                tensors[name] = own[t]  # type: ignore[assignment]


def _unpackable(device: torch.device) -> str | None:
    """Why nothing can be packed on this device; None where it can."""
    if device.type != "cpu":
        return f"packed weights are for the CPU, not for {device.type}"
    reason: str | None = backends.status()["cpu"]
    if reason is None and backends.preferred("cpu") != "cpu":
        reason = f"the backend {backends.preferred('cpu')!r} is asked for"
    return reason


def _fuse_foreign_blocks(model: nn.Module, parts: list[Part]) -> None:
    """Give timm's and the authors' blocks the class of fused ones."""
    for name, block in list(model.named_modules()):
        if patching.is_candidate(block):
            reason = patching.refusal(block)
            if reason is None:
                patching.fuse(block)
            else:
                parts.append(Part(name, "block", False, reason))


def _agree(ours: Callable[[Any, Tensor], Tensor], module: nn.Module, *size: int) -> bool:
    """Whether a module computes on an x of this size what our formula does on its submodules, in fp64.

    With random parameters: the module's own may be zero, or not loaded yet.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), backends.force("reference"):
            torch.manual_seed(0)
            double = copy.deepcopy(module).double()
            for p in double.parameters():
                p.normal_()
            x = torch.randn(size, dtype=torch.float64)
            expected, actual = double(x), ours(double, x)
    except Exception:  # a foreign class may do anything; if it cannot be tried, it is not fused
        return False
    return expected.shape == actual.shape and bool((actual - expected).abs().max() <= 1e-10 * expected.abs().max())


def _children(module: nn.Module) -> set[str]:
    return {name for name, child in module.named_children()}


_DIFFERS = "it computes something else than its parts would in a MambaOut"


class _Swap:
    """Replaces what can be fused in `dtype` on `device`; `unpackable`: why nothing can be packed there."""

    def __init__(self, dtype: torch.dtype, device: torch.device, parts: list[Part]):
        self.dtype, self.device, self.parts = dtype, device, parts
        self.unpackable = _unpackable(device)
        self.unsplittable = "packed weights are faster" if self.unpackable is None else split_blocks.unavailable(device)
        self._replaced: dict[nn.Module, nn.Module] = {}

    def _once(self, module: nn.Module, name: str) -> nn.Module:
        """`module`; what is there under several names is replaced by one and the same module."""
        if module not in self._replaced:
            self._replaced[module] = self.module(module, name)
        return self._replaced[module]

    def module(self, module: nn.Module, name: str) -> nn.Module:
        """What runs in its place: itself, with what is in it replaced, or another module."""
        for kind, make in (("block", self._block), ("stem", self._stem), ("downsample", self._downsample),
                           ("head", self._timm_head)):  # fmt: skip
            found = make(module)
            if found is not None:
                reason = found if isinstance(found, str) else None
                self.parts.append(Part(name, kind, reason is None, reason))
                return module if isinstance(found, str) else found
        if type(module) is nn.Sequential:
            self._sequential(module, name)
        else:
            for child_name, child in list(module._modules.items()):
                if child is not None:
                    setattr(module, child_name, self._once(child, f"{name}.{child_name}".lstrip(".")))
        if isinstance(module, MambaOut):
            self._own_head(module, name)
        return module

    def _block(self, module: nn.Module) -> nn.Module | str | None:
        if not isinstance(module, FusedGatedCNNBlock):
            return None
        return self._block_reason(module) or self._fused([module])

    def _block_reason(self, block: FusedGatedCNNBlock) -> str | None:
        if type(block).forward is not FusedGatedCNNBlock.forward:
            return f"{type(block).__name__} has a forward of its own"
        if self.unsplittable is None:
            reason = split_reason(block, self.dtype, self.device)
            return reason and f"{reason}; the block runs the fused op gated_dwconv"
        if self.unpackable is None:
            return gated_cnn_block_reason(block, self.dtype)
        return self._unfusible()

    def _unfusible(self) -> str | None:
        """Why neither weights can be packed nor Triton's kernels run on this device."""
        if self.unpackable is None or self.unsplittable is None:
            return None
        return self.unpackable if self.device.type == "cpu" else self.unsplittable

    def _fused(self, run: list[FusedGatedCNNBlock]) -> nn.Module:
        return (PackedBlocks if self.unpackable is None else SplitBlocks)(run, self.dtype)

    def _sequential(self, sequence: nn.Sequential, name: str) -> None:
        """Blocks that follow each other become one part."""
        run: list[FusedGatedCNNBlock] = []
        names: list[str] = []
        children: dict[str, nn.Module] = {}

        def finish() -> None:
            if run:
                children[names[0]] = self._fused(run)
                last = f" to {names[-1]}" if len(names) > 1 else ""
                self.parts.append(Part(f"{name}.{names[0]}".lstrip(".") + last, "blocks", True, None))
                run.clear()
                names.clear()

        for child_name, child in sequence._modules.items():  # named_children leaves out what comes a second time
            assert child is not None
            if isinstance(child, FusedGatedCNNBlock) and self._block_reason(child) is None:
                if run and run[0].dim != child.dim:
                    finish()
                run.append(child)
                names.append(child_name)
            else:
                finish()
                children[child_name] = self._once(child, f"{name}.{child_name}".lstrip("."))
        finish()
        sequence._modules.clear()
        sequence._modules.update(children)

    def _stem(self, module: nn.Module) -> nn.Module | str | None:
        m: Any = module
        if _children(module) | {"norm1"} != {"conv1", "norm1", "act", "conv2", "norm2"} or not hasattr(m, "norm1"):
            return None
        if not isinstance(m.conv1, nn.Conv2d) or not isinstance(m.conv2, nn.Conv2d):
            return None
        if has_hooks(module):
            return "it has hooks"
        if (reason := self._unfusible()) is not None:
            return reason
        if type(module) is not Stem and not _agree(Stem.forward, module, 1, m.conv1.in_channels, 9, 10):
            return _DIFFERS
        reason = self._conv_reason(m.conv1, m.norm1, m.act) or self._conv_reason(m.conv2, m.norm2, None)
        return reason or (NormedStem(m) if self.unpackable else PackedStem(m, self.dtype))

    def _downsample(self, module: nn.Module) -> nn.Module | str | None:
        m: Any = module
        if _children(module) != {"conv", "norm"} or not isinstance(m.conv, nn.Conv2d):
            return None
        if has_hooks(module):
            return "it has hooks"
        if (reason := self._unfusible()) is not None:
            return reason
        norm_first = getattr(m, "norm_first", False)
        if type(module) is not Downsample:
            size = (1, 5, 6, m.conv.in_channels)
            for norm_first in (False, True):
                if _agree(lambda d, x, first=norm_first: _downsampled(d, x, first), module, *size):  # type: ignore[misc]
                    break
            else:
                return _DIFFERS
        reason = self._conv_reason(m.conv, None if norm_first else m.norm, None)
        if self.unpackable:
            return reason or NormedDownsample(m.conv, m.norm, norm_first)
        return reason or PackedDownsample(m.conv, m.norm, norm_first, self.dtype)

    def _conv_reason(self, conv: nn.Module, norm: nn.Module | None, act: nn.Module | None) -> str | None:
        if self.unpackable is None:
            return conv3x3s2_reason(conv, norm, act, self.dtype)
        reason = conv3x3s2_reason(conv, norm, act, self.dtype, self.device, triton.DTYPES)
        if reason is None and norm is not None and conv.out_channels > WIDEST:  # type: ignore[operator]
            reason = f"conv has {conv.out_channels} channels, above {WIDEST}"
        return reason

    def _timm_head(self, module: nn.Module) -> nn.Module | str | None:
        """timm's heads, which pool and normalise themselves."""
        m: Any = module
        dropout = "head_dropout" if hasattr(m, "head_dropout") else "drop"
        if _children(module) != {"norm", "pre_logits", "fc", dropout} or not hasattr(m, "pool_type"):
            return None
        if has_hooks(module):
            return "it has hooks"
        if self.unpackable:
            return self.unpackable
        if m.pool_type != "avg" or type(m.pre_logits) is not nn.Sequential or has_hooks(m.pre_logits):
            return "it does not average, or has no hidden layer"
        names = [n for n, _ in m.pre_logits.named_children()]
        if names not in (["fc", "act", "norm"], ["fc", "act"]):
            return f"its hidden layer is made of {', '.join(names)}"
        hidden: Any = m.pre_logits
        fc1, act, mid = hidden.fc, hidden.act, getattr(hidden, "norm", None)
        reason = head_reason(m.norm, fc1, act, mid, getattr(m, dropout), m.fc, self.dtype)
        if reason is None and not _agree(_timm_logits, module, 1, 2, 3, fc1.in_features):
            reason = _DIFFERS
        return reason or FusedHead(m.norm, fc1, mid, m.fc, self.dtype)

    def _own_head(self, model: MambaOut, name: str) -> None:
        """Of our models, whose norm stands beside the head: the fused one pools and normalises itself.

        `norm` and `pool` stay, for whoever calls them without the head.
        """
        head: Any = model.head
        reason = self.unpackable
        if type(model).pool is not MambaOut.pool or "pool" in vars(model) or type(head) is not Head:
            reason = "its pooling or its head is not the one of MambaOut"
        elif has_hooks(head) or any(
            getattr(type(model), method) is not getattr(MambaOut, method) or method in vars(model)
            for method in ("forward", "forward_head")
        ):
            reason = "its head has hooks, or the model a forward or a forward_head of its own"
        if reason is None:
            reason = head_reason(model.norm, head.fc1, head.act, head.norm, head.head_dropout, head.fc2, self.dtype)
        if reason is None:
            model.head = FusedHead(model.norm, head.fc1, head.norm, head.fc2, self.dtype)  # type: ignore[assignment]
            vars(model)["forward_head"] = model.head  # of the map, with pre_logits
        self.parts.append(Part(f"{name}.head".lstrip("."), "head", reason is None, reason))


def _downsampled(module: Any, x: Tensor, norm_first: bool) -> Tensor:
    ours: Any = SimpleNamespace(conv=module.conv, norm=module.norm, norm_first=norm_first)
    return Downsample.forward(ours, x)


def _timm_logits(module: Any, x: Tensor) -> Tensor:
    return module.fc(module.pre_logits(module.norm(x.mean((1, 2)))))
