"""Parameters in the order in which the CPU kernels read them, kept from call to call.

They are packed at the first call, and again when they have changed: replaced, written in place (PyTorch counts that),
or written where PyTorch does not count (through `.data` or NumPy), as far as samples of them, one for every 32 KiB and
64 of each parameter at least, show it.
"""

import secrets
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import backends, huge_pages
from .backends import cpu

# What packed parameters were made from, themselves, and whose memory they are in, by the number of their Pack.
_packs: dict[int, tuple[Any, Tensor, Any]] = {}


class Pack:
    """Where a module's packed parameters are kept while the module lives. A copy of it has one of its own."""

    def __init__(self) -> None:
        self.number = secrets.randbits(62)  # unique in any process that an exported program comes to
        self.seen: Any = None  # the last call (seen.py)
        weakref.finalize(self, _packs.pop, self.number, None)

    def __deepcopy__(self, memo: Any) -> "Pack":
        return Pack()

    def __reduce__(self) -> tuple[type["Pack"], tuple[()]]:
        return Pack, ()


def kept(pack: Pack) -> Tensor:
    """The packed parameters that the last call used."""
    return _packs[pack.number][1]


def packed_bytes(module: nn.Module) -> int:
    """Bytes of packed parameters that the modules in `module` keep for their next calls."""
    values = [value for each in module.modules() for value in vars(each).values()]
    found = [pack for value in values for pack in (value if isinstance(value, tuple) else (value,))]
    return sum(_packs[pack.number][1].nbytes for pack in found if isinstance(pack, Pack) and pack.number in _packs)


_DTYPES = (torch.float32, torch.bfloat16)


def check_dtype(**tensors: Tensor) -> None:
    """TypeError for one, by name, that no op for inference computes on."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name} must be float32 or bfloat16; got {tensor.dtype}")


def stored_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that a module's parameters must have for an op on packed ones to compute on x what its layers would.

    None where no such op may run: off the compiled CPU kernels, where gradients are wanted, in other dtypes than
    float32, bfloat16 and float32 under bfloat16 autocast.
    """
    if x.device.type != "cpu" or torch.is_grad_enabled() or x.ndim != 4 or backends.preferred("cpu") != "cpu":
        return None
    if x.dtype not in _DTYPES:
        return None
    if not torch.is_autocast_enabled("cpu"):
        return x.dtype
    return torch.float32 if torch.get_autocast_dtype("cpu") == torch.bfloat16 else None


def low_precision(x: Tensor) -> bool:
    """Whether the layers would compute in bfloat16, given that `stored_dtype` has an answer."""
    return x.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")


def memory_of(parameters: Iterable[Tensor | None]) -> list[tuple[int, int, int]]:
    """(address, bytes, PyTorch's count of writes) of each that is there; 0 bytes for one that is not contiguous."""
    return [
        (t.data_ptr(), t.numel() * t.element_size() if t.is_contiguous() else 0, 0 if t.is_inference() else t._version)
        for t in parameters
        if t is not None
    ]


def packed(
    number: int,
    parameters: Sequence[Tensor | None],
    bf16: bool,
    make: Callable[[list[Tensor | None], bool, Callable[[int], Tensor]], Tensor],
) -> Tensor:
    """What `make` makes of the parameters in float32, contiguous; `bf16`: to be multiplied in bfloat16.

    `make` is also given what gives it so many bytes of memory.
    """
    memory = memory_of(parameters)
    key = (bf16, cpu.instruction_set(), [t is None for t in parameters], memory, cpu.fingerprint(memory))
    found = _packs.get(number)
    if found is not None and found[0] == key and all(count for _, count, _ in memory):
        return found[1]
    slabs: list[Any] = []

    def empty(count: int) -> Tensor:
        memory, slab = huge_pages.empty(count)
        slabs.append(slab)
        return memory

    made = make([None if t is None else t.detach().float().contiguous() for t in parameters], bf16, empty)
    _packs[number] = (key, made, slabs)
    return made
