"""The Triton kernels of the selective scan, compiled ahead of time: registers, spills, and a bound of their time from
datasheets. Nothing here is a measurement."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..audit import sass
from ..audit.devices import WARP, device
from ..audit.roofline import Prediction, microseconds_per_cycle, pipes
from ..audit.triton import DTYPES, machine_code

KERNELS = ("scan_fwd", "scan_states", "chunk_ends", "scan_bwd")  # scan_states: scan_fwd for backward
HEADINGS = ("target", "kernel", "dtype", "D", "S", "regs", "spills", "shared", "programs/SM", "at least us", "bound by",
            "gates")  # fmt: skip
_ELEMENTS = frozenset(("x_ptr", "delta_ptr", "B_ptr", "C_ptr", "v_ptr", "w_ptr", "dy_ptr", "ddelta_ptr"))


@dataclass(frozen=True)
class ScanShape:
    """N images, G scans of L tokens; x is shared by the scans."""

    N: int
    G: int
    L: int


# VMamba-T's maps of 56 x 56, scanned four ways.
VMAMBA_STAGE1 = ScanShape(128, 4, 56 * 56)


@dataclass(frozen=True)
class ScanKernel:
    name: str
    target: str
    dtype: str
    D: int
    S: int

    @property
    def tile(self) -> Any:
        from .triton_kernels import launch

        return launch.tile("backward" if self.name == "scan_bwd" else "forward", self.S)

    def programs(self, shape: ScanShape) -> int:
        """Of one chunk, as large batches have it."""
        return shape.N * shape.G * -(-self.D // self.tile.block_d)

    def bytes_moved(self, shape: ScanShape) -> float:
        """Bytes to and from DRAM per image, scan and token; a shared x is read once."""
        element, x = DTYPES[self.dtype][1] // 8, self.D / shape.G
        read = element * (x + self.D + self.S)
        saved = 4 * self.D * self.S / _segment()
        return {
            "scan_fwd": read + element * self.S + 4 * self.D,
            "scan_states": read + saved,
            "chunk_ends": read,
            # y's gradient, dx and ddelta; partial sums of dB and dC
            "scan_bwd": read + element * (self.S + x + self.D) + 4 * self.D + saved
            + 2 * 4 * self.S * -(-self.D // self.tile.block_d),
        }[self.name]  # fmt: skip


def _segment() -> int:
    from .triton_kernels import launch

    return launch.SEGMENT


def _function(kernel: ScanKernel) -> tuple[Any, dict[str, Any]]:
    """The jitted function and its compile-time constants, as launch.py gives them for aligned B and C."""
    from ..backends.triton_kernels.tiles import VECTOR_BYTES
    from .triton_kernels import backward, forward

    element = DTYPES[kernel.dtype][1] // 8
    vector = VECTOR_BYTES // element if kernel.S * element % VECTOR_BYTES == 0 else 1
    constants = {"S": kernel.S, "VEC": vector, **kernel.tile.constants()}
    if kernel.name == "scan_bwd":
        return backward.scan_bwd, {**constants, "EVERY": _segment()}
    if kernel.name == "chunk_ends":
        return forward.chunk_ends, {**constants, "REVERSE": False}
    return forward.scan_fwd, {**constants, "EVERY": _segment() if kernel.name == "scan_states" else 0}


@dataclass(frozen=True)
class Compiled:
    kernel: ScanKernel
    registers: int
    spills: int
    shared_bytes: int
    executed: Counter[str]  # opcodes that one thread runs for a segment of steps

    @property
    def threads(self) -> int:
        return WARP * self.kernel.tile.num_warps

    @property
    def resident_blocks(self) -> int:
        return device(self.kernel.target).resident_blocks(self.registers, self.threads, self.shared_bytes)

    @property
    def failures(self) -> list[str]:
        return [f"spills: {self.spills}"] if self.spills else []


def compile_ahead(kernel: ScanKernel) -> Compiled:
    """RuntimeError under TRITON_INTERPRET=1, where nothing is compiled."""
    function, constants = _function(kernel)

    def element_of(name: str) -> str:
        return "i32" if name == "order_ptr" else DTYPES[kernel.dtype][0] if name in _ELEMENTS else "fp32"

    compiled, _ = machine_code(function, constants, element_of, kernel.target, kernel.tile.options())
    text, registers, stack = sass.disassemble(compiled.asm["cubin"])
    code = sass.parse(text)
    spills = stack + sum(line.name in ("STL", "LDL") for line in code)
    return Compiled(kernel, registers, spills, compiled.metadata.shared, _executed(kernel, code))


def _executed(kernel: ScanKernel, code: list[sass.Instruction]) -> Counter[str]:
    """The longest loop is over steps, or segments; within it backward first walks on, then goes back. What is around
    it does not count, and the loop over chunks before is not run."""
    loops = sass.loops(code)
    turns = _segment() // kernel.tile.steps
    if kernel.name != "scan_bwd":
        return sass.executed([line for line in code if line.address in loops[0]], [(loops[0], turns)])
    inner = sorted((loop for loop in loops[1:3] if loop.first in loops[0]), key=lambda loop: loop.first)
    body = [line for line in code if line.address in loops[0]]
    return sass.executed(body, list(zip(inner, (turns - 1, turns), strict=True)))


def bound(compiled: Compiled, shape: ScanShape) -> Prediction:
    """Every limit at its datasheet rate, as if the others were hidden behind it: MUFU with 16 exp2 a cycle."""
    kernel, on = compiled.kernel, device(compiled.kernel.target)
    launched = kernel.programs(shape)
    warps = launched * kernel.tile.num_warps * shape.L / _segment()
    total = Counter({opcode: n * warps for opcode, n in compiled.executed.items()})
    scale = microseconds_per_cycle(launched, on)
    floor = kernel.bytes_moved(shape) * shape.N * shape.G * shape.L / on.dram_tb_s / 1e6
    return Prediction({"DRAM": floor, **{name: n * scale for name, n in pipes(total, on).items()}}, floor)


def sum_of_scans(kernel: ScanKernel, shape: ScanShape) -> float:
    """Microseconds that adding the float32 y (or dx) of each scan takes, at DRAM's rate."""
    moved = (4 * shape.G + DTYPES[kernel.dtype][1] / 8) * kernel.D * shape.N * shape.L
    return moved / device(kernel.target).dram_tb_s / 1e6


def lines(found: Sequence[Compiled], shape: ScanShape = VMAMBA_STAGE1) -> list[tuple[str, ...]]:
    """Cells of the table, under HEADINGS."""
    cells: list[tuple[str, ...]] = []
    for compiled in found:
        kernel, least = compiled.kernel, bound(compiled, shape)
        cells.append((
            device(kernel.target).name, kernel.name, kernel.dtype, str(kernel.D), str(kernel.S),
            str(compiled.registers), str(compiled.spills), str(compiled.shared_bytes), str(compiled.resident_blocks),
            f"{least.microseconds:.0f}", least.bound_by, "; ".join(compiled.failures) or "pass",
        ))  # fmt: skip
    return cells
