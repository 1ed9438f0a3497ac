"""The frozen model that `optimize_for_inference` makes."""

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .cuda_graphs import CudaGraphs
from .parts import refuse_gradients

_ONLY_INFERS = "an InferenceModel only infers: train the model that it was made from, and optimize it again"


@dataclass(frozen=True)
class Part:
    """Of a model: its name within it, what it is, whether it runs as one op, and if not why."""

    name: str
    kind: str
    fused: bool
    reason: str | None


class Report(list[Part]):
    """The parts of a model, in its order; `str` of it is a table."""

    def __str__(self) -> str:
        states = ["fused" if part.fused else f"not fused: {part.reason}" for part in self]
        rows = [(part.name or "(all)", part.kind, state) for part, state in zip(self, states, strict=True)]
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(2)]
        return "\n".join(f"{name:{widths[0]}}  {kind:{widths[1]}}  {state}" for name, kind, state in rows)


class InferenceModel(nn.Module):
    """A frozen model, made by `optimize_for_inference`. Calls are safe from several threads at once.

    forward, forward_features, forward_head and forward_intermediates are those of the model it was made from, in
    `dtype`: a floating-point tensor that comes first is cast to it. `model` is the network, whose fused parts are
    modules of this package.

    Raises:
        RuntimeError: on an input that requires a gradient, on train(), and on a move to another dtype or device.
    """

    def __init__(self, model: nn.Module, parts: list[Part], dtype: torch.dtype, cuda_graphs: bool = False):
        super().__init__()
        self.model = model
        self.dtype = dtype
        self._parts = tuple(parts)
        self._graphs = CudaGraphs(model) if cuda_graphs else None
        super().train(False)

    def __getstate__(self) -> dict[str, Any]:  # of deep copies and pickles: a graph belongs to its weights' memory
        return {**self.__dict__, "_graphs": self._graphs is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._graphs = CudaGraphs(self.model) if state["_graphs"] else None

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        if self._graphs is not None and isinstance(x, Tensor) and not args and not kwargs:
            return self._call(self._graphs, x)
        return self._call(self.model, x, *args, **kwargs)

    def forward_features(self, x: Tensor) -> Any:
        """The model's forward_features."""
        return self._call(self._method("forward_features"), x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """The model's forward_head, of what forward_features gives."""
        return self._call(self._method("forward_head"), x, pre_logits=pre_logits)

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The model's forward_intermediates, with its arguments."""
        return self._call(self._method("forward_intermediates"), x, *args, **kwargs)

    def _method(self, name: str) -> Any:
        method = getattr(self.model, name, None)
        if method is None:
            raise AttributeError(f"{type(self.model).__name__} has no {name}")
        return method

    def _call(self, function: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        for t in x if isinstance(x, list | tuple) else (x,):  # a detector's list of images
            if isinstance(t, Tensor):
                refuse_gradients(t)
        if isinstance(x, Tensor) and x.dtype != self.dtype and x.is_floating_point():
            x = x.to(self.dtype)
        if torch.compiler.is_compiling():  # whose graphs would say that gradients are off
            return function(x, *args, **kwargs)
        with torch.no_grad():  # what is not fused runs as in inference, too
            return function(x, *args, **kwargs)

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """The model's: how images are prepared, for `timm.data.resolve_model_data_config`."""
        found: dict[str, Any] = getattr(self.model, "pretrained_cfg", {})
        return found

    def report(self) -> Report:
        """What runs as one op, and why the rest does not."""
        return Report(self._parts)

    def weight_bytes(self) -> int:
        """Bytes of all weights, packed and not."""
        return sum(t.nbytes for t in (*self.parameters(), *self.buffers()))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one safetensors file, which `load_inference_model` reads.

        Raises:
            ImportError: without the safetensors package.
            RuntimeError: a model on a GPU.
        """
        from .files import save

        save(self, path)

    def train(self, mode: bool = True) -> "InferenceModel":
        if mode:
            raise RuntimeError(_ONLY_INFERS)
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> "InferenceModel":
        if requires_grad:
            raise RuntimeError(_ONLY_INFERS)
        return super().requires_grad_(False)

    def _apply(self, fn: Any, recurse: bool = True) -> "InferenceModel":
        like = next((t for t in self.model.state_dict().values()), None)
        if like is not None:
            before = torch.empty(0, dtype=self.dtype, device=like.device)
            after = fn(before)
            if (after.dtype, after.device) != (before.dtype, before.device):
                raise RuntimeError(
                    f"an InferenceModel is made for one dtype and device, here {before.dtype} on {before.device}: "
                    "optimize_for_inference(model, dtype=..., device=...) makes another"
                )
        return super()._apply(fn, recurse)
