"""Which of two GPU backends is faster for a call: preferences.json, measured on an H100 where its rows say so, else
predicted from machine code and datasheets.

`python -m mambaout_kernels.audit.preferences` writes the table.
"""

import functools
import json
from dataclasses import dataclass
from importlib.resources import files

import torch
from torch import Tensor


@dataclass(frozen=True)
class Preference:
    """For 7 x 7 filters on one architecture: which backend, with the microseconds (measured, predicted) and why.

    aligned: hidden and conv channels fill 16 bytes; max_elements: of y, None for any number.
    """

    arch: str
    bits: int
    aligned: bool
    backward: bool
    max_elements: int | None
    backend: str
    triton_us: float
    cuda_us: float
    reason: str


def parse(content: str) -> tuple[Preference, ...]:
    """Rows of a table as in preferences.json."""
    return tuple(Preference(**row) for row in json.loads(content))


@functools.cache
def shipped() -> tuple[Preference, ...]:
    return parse((files(__package__) / "preferences.json").read_text(encoding="utf-8"))


@functools.cache
def _architecture(device_index: int) -> str:
    if torch.version.hip is not None:
        return "hip"
    major, minor = torch.cuda.get_device_capability(device_index)
    return f"sm_{major}{minor}"


@functools.cache
def row(arch: str, bits: int, aligned: bool, backward: bool, elements: int) -> Preference | None:
    """The first row that fits, of this architecture, else of another of its major version; None without any."""
    generation = arch[:-1]
    for same in (lambda other: other == arch, lambda other: other[:-1] == generation):
        for found in shipped():
            if (
                same(found.arch)
                and (found.bits, found.aligned, found.backward) == (bits, aligned, backward)
                and (found.max_elements is None or elements <= found.max_elements)
            ):
                return found
    return None


def preferred(u: Tensor, weight: Tensor, backward: bool) -> str:
    """ "triton" or "cuda" for this u (N, H, W, 2D) and weight (C, 1, K, K); "triton" where the table has no row."""
    N, H, W, width = u.shape
    C, K, size = weight.shape[0], weight.shape[-1], u.element_size()
    if K != 7:
        return "triton"
    aligned = width // 2 * size % 16 == 0 and C * size % 16 == 0
    found = row(_architecture(u.device.index or 0), 8 * size, aligned, backward, N * H * W * (width // 2))
    return found.backend if found is not None else "triton"
