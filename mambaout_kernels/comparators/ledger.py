"""What the operations of a call read, write and keep in memory, from the sizes of their tensors."""

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Ledger(TorchDispatchMode):
    """Inside `with Ledger() as ledger`, of every operation that is no view:

    moved: bytes of its inputs, read, and of its outputs, written. What a fused operation reads more than once, or keeps
    in caches, does not count, nor do workspaces inside of one.
    peak: the most bytes of what was made inside that were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moved = self.peak = 0
        self._alive: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if func.is_view or not made:
            return result
        read = {id(t): t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        self.moved += sum(map(_bytes, read.values())) + sum(map(_bytes, made))
        before = {StorageWeakRef(t.untyped_storage()) for t in read.values()}
        for t in made:
            storage = StorageWeakRef(t.untyped_storage())
            if storage not in before:
                self._alive[storage] = t.untyped_storage().nbytes()
        self._alive = {storage: size for storage, size in self._alive.items() if not storage.expired()}
        self.peak = max(self.peak, sum(self._alive.values()))
        return result


def _bytes(t: Tensor) -> int:
    """Of its distinct elements: what is expanded is there once."""
    sizes = [size for size, stride in zip(t.shape, t.stride(), strict=True) if stride != 0]
    return torch.Size(sizes).numel() * t.itemsize if t.numel() else 0
