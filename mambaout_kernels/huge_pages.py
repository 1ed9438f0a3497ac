"""Memory in huge pages, for what is read from one end to the other at every call.

The packed parameters of a model are more pages of 4 KiB than a processor remembers the place of: it would look each of
them up again at every call, which for one image takes a twentieth of the time of all.
"""

import mmap
import sys
import threading
import weakref

import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20
_BYTES = 16 * _HUGE_PAGE  # of what is asked of the system at once; tensors share the page in which they meet
_LINE = 64  # a tensor begins at a multiple of it
_LEAST = 128 << 10  # bytes that are worth it


class Slab:
    """Memory for several tensors, given back to the system when the last of them and this object are gone."""

    def __init__(self, capacity: int):
        memory = mmap.mmap(-1, capacity + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        first = -whole.data_ptr() % _HUGE_PAGE
        self._bytes = whole[first : first + capacity]
        self._used = 0

    def take(self, count: int) -> Tensor | None:
        """So many bytes; None where no more of them are left."""
        begin = self._used
        if begin + count > self._bytes.numel():
            return None
        self._used += -(-count // _LINE) * _LINE
        return self._bytes[begin : begin + count]


_lock = threading.Lock()
_last: weakref.ref[Slab] | None = None


def empty(count: int) -> tuple[Tensor, Slab | None]:
    """So many bytes on the CPU, in huge pages where the system has them; and the slab that they are of.

    Whoever keeps the tensor keeps the slab too: while it lives, the next tensors are put beside this one.
    """
    global _last
    # What is made in inference mode could not be written outside of it.
    with _lock, torch.inference_mode(False):
        if not sys.platform.startswith("linux") or count < _LEAST:
            return torch.empty(count, dtype=torch.uint8), None
        slab = None if _last is None else _last()
        taken = None if slab is None else slab.take(count)
        if taken is None:
            try:
                slab = Slab(-(-count // _BYTES) * _BYTES)
            except OSError:  # a system without huge pages, or without that much memory
                return torch.empty(count, dtype=torch.uint8), None
            taken = slab.take(count)
            assert taken is not None
            _last = weakref.ref(slab)
        return taken, slab
