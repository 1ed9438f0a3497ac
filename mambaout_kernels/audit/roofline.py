"""Bytes moved and time predicted for a compiled kernel on a datasheet. Nothing here is a measurement."""

from collections import Counter
from dataclasses import dataclass

from .devices import ALU_LANES, ISSUE_SLOTS, L1_BYTES, L2_BYTES, SPECIAL_LANES, WARP, Device
from .record import CompiledKernel

_FMA_PIPE = frozenset(("FFMA", "FMUL", "FADD", "IMAD"))
_PACKED = frozenset(("FFMA2", "FMUL2", "FADD2"))  # two at once, at half the rate
_MEMORY = frozenset(("LDG", "STG", "LDS", "STS", "LDGSTS"))
_FREE_PIPE = _MEMORY | {"LDGDEPBAR", "DEPBAR", "BRA", "EXIT", "BAR", "NOP", "MUFU", "SHFL", "LDC", "S2R", "BSSY"}


@dataclass(frozen=True)
class Shape:
    """Maps (N, H, W) of the op, hidden D, conv channels C."""

    N: int
    H: int
    W: int
    D: int
    C: int

    @property
    def pixels(self) -> int:
        return self.N * self.H * self.W


def floor_elements(name: str, shape: Shape) -> int:
    """Elements per pixel that the kernel's outputs and inputs hold: what it cannot avoid to move."""
    return {
        "forward": 3 * shape.D,  # u in, y out
        "gate_backward": 5 * shape.D,  # u, dy in; dg, di, e out
        "input_gradient": 2 * shape.C,  # e in, dc out
        "weight_gradient": 2 * shape.C,  # e, c in
    }[name]


def blocks(kernel: CompiledKernel, shape: Shape) -> tuple[int, int]:
    """Blocks of threads that convolve, and that do the identity branch. weight_gradient: items, each of one height."""
    along_h = 1 if kernel.name == "weight_gradient" else -(-shape.H // kernel.block_h)
    tiles = along_h * -(-shape.N * shape.W // kernel.block_w)
    identity = shape.D - shape.C if kernel.name in ("forward", "gate_backward") else 0
    return tiles * -(-shape.C // kernel.block_d) * kernel.parts, tiles * -(-identity // kernel.block_d)


def _columns_read(kernel: CompiledKernel, shape: Shape, left: int, right: int) -> float:
    """Columns that blocks read with so many of a halo, per column of the maps. A block may end in another image."""
    read = 0
    for first in range(0, shape.N * shape.W, kernel.block_w):
        last = min(first + kernel.block_w, shape.N * shape.W) - 1
        for image in range(first // shape.W, last // shape.W + 1):
            start, end = max(first - image * shape.W, 0), min(last - image * shape.W, shape.W - 1)
            read += min(end + right, shape.W - 1) - max(start - left, 0) + 1
    return read / (shape.N * shape.W)


def l2_elements(kernel: CompiledKernel, shape: Shape) -> float:
    """Elements per pixel between multiprocessors and L2: DRAM's, and the halo that neighbours read again."""
    R = kernel.K // 2
    if kernel.name == "weight_gradient":  # each part of the filter reads e and c
        return shape.C * kernel.parts * (1 + _columns_read(kernel, shape, R, R))
    tops = range(0, shape.H, kernel.block_h)
    rows = sum(min(shape.H, top + kernel.block_h + R) - max(0, top - R) for top in tops) / shape.H
    return floor_elements(kernel.name, shape) + shape.C * (rows * _columns_read(kernel, shape, R, R) - 1)


def channel_programs(kernel: CompiledKernel, shape: Shape) -> int:
    """Of the weight gradient: programs for the same pixels."""
    return -(-shape.C // kernel.block_d) * kernel.parts


def partial_bytes(kernel: CompiledKernel, shape: Shape, programs: int) -> int:
    """The weight gradient's fp32 partials, written and read back."""
    if kernel.name != "weight_gradient":
        return 0
    return 2 * 4 * max(1, programs // channel_programs(kernel, shape)) * (kernel.K**2 + 1) * shape.C


@dataclass(frozen=True)
class Prediction:
    """Microseconds by each limit; the slowest one is the prediction."""

    limits: dict[str, float]
    floor: float  # DRAM's time for the elements that cannot be avoided

    @property
    def microseconds(self) -> float:
        return max(self.limits.values())

    @property
    def bound_by(self) -> str:
        return max(self.limits, key=lambda name: self.limits[name])

    @property
    def share(self) -> float:
        """Of the DRAM roofline."""
        return self.floor / self.microseconds


def pipes(total: Counter[str], device: Device) -> dict[str, float]:
    """Cycles that the device's multiprocessors together need for these instructions of warps, by what they occupy."""

    def of(names: frozenset[str]) -> float:
        return sum(n for opcode, n in total.items() if opcode.partition(".")[0] in names)

    return {
        "issue": sum(total.values()) / ISSUE_SLOTS,
        "FMA": (of(_FMA_PIPE) + 2 * of(_PACKED)) * WARP / device.fma_lanes,
        "ALU": sum(n for o, n in total.items() if _on_alu(o)) * WARP / ALU_LANES,
        "MUFU": sum(n for o, n in total.items() if o.startswith("MUFU")) * WARP / SPECIAL_LANES,
    }


def microseconds_per_cycle(launched: int, device: Device) -> float:
    """Of cycles summed over all multiprocessors: it takes as long as on the one with the most of these blocks."""
    most = -(-launched // device.multiprocessors) * device.multiprocessors / launched
    return most / device.multiprocessors / device.ghz / 1e3


def predict(
    kernel: CompiledKernel,
    executed: tuple[Counter[str], Counter[str]],
    shape: Shape,
    device: Device,
    programs: int,
) -> Prediction:
    """`executed`: opcodes that one thread runs in a block that convolves, and in one of the identity branch.

    Every limit at its datasheet rate, as if the others were hidden behind it. What a multiprocessor does for itself
    takes as long as on the one with the most blocks. `programs` of the weight gradient share the items.
    """
    warps = kernel.threads / WARP
    total: Counter[str] = Counter()
    for counts, number in zip(executed, blocks(kernel, shape), strict=True):
        for opcode, times in counts.items():
            total[opcode] += times * number * warps  # type: ignore[assignment]
    cycles = {
        **pipes(total, device),
        "L1": sum(n * _bytes(o) for o, n in total.items() if o.partition(".")[0] in _MEMORY) * WARP / L1_BYTES,
        "L2": l2_elements(kernel, shape) * kernel.element_bytes * shape.pixels / L2_BYTES,
    }
    launched = sum(blocks(kernel, shape))
    if kernel.name == "weight_gradient":
        launched = min(launched, programs)
    microseconds = {name: n * microseconds_per_cycle(launched, device) for name, n in cycles.items()}
    floor = floor_elements(kernel.name, shape) * kernel.element_bytes * shape.pixels / device.dram_tb_s / 1e6
    dram = floor + partial_bytes(kernel, shape, programs) / device.dram_tb_s / 1e6
    return Prediction({"DRAM": dram, **microseconds}, floor)


def _on_alu(opcode: str) -> bool:
    name = opcode.partition(".")[0]
    return name not in _FMA_PIPE | _FREE_PIPE | _PACKED and not name.startswith("U")


def _bytes(opcode: str) -> int:
    from .sass import Instruction

    return Instruction(0, None, opcode, "").bytes
