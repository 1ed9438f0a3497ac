"""The audit's rows: what a compiled kernel is made of, and the gates it must pass."""

from collections import Counter
from dataclasses import dataclass, field

from . import sass
from .devices import device
from .record import CompiledKernel

MOST_MULTIPLY_ADDS = 1.10  # of K * K per output
LEAST_BYTES_IN_FLIGHT = 40 * 1024  # per multiprocessor; Little's law at 3.35 TB/s, 132 of them, 1.5 us is 38 KiB
MOST_BYTES = 1.15  # of what cannot be avoided
LEAST_SHARE = 0.85  # of the DRAM roofline


@dataclass(frozen=True)
class Row:
    """One kernel as compiled. Of AMD's only registers, spills and widths are known."""

    kernel: CompiledKernel
    registers: int
    spills: int  # registers' bytes in local memory, and instructions that move them
    loads: Counter[int]  # in the code, by bytes: global loads
    stores: Counter[int]
    multiply_adds: float | None = None  # per output of the convolution, in the main loop
    barriers: int | None = None  # in the main loop
    resident_blocks: int | None = None
    bytes_in_flight: int | None = None  # per multiprocessor, the branch with fewer
    executed: tuple[Counter[str], Counter[str]] = field(default_factory=lambda: (Counter(), Counter()))

    @property
    def occupancy(self) -> float | None:
        if self.resident_blocks is None:
            return None
        return self.resident_blocks * self.kernel.threads / 32 / device(self.kernel.target).warps

    def vectors(self) -> float:
        """Share of the global accesses that are 16 bytes wide."""
        all_of = sum(self.loads.values()) + sum(self.stores.values())
        return (self.loads[16] + self.stores[16]) / all_of if all_of else 1.0


def row(kernel: CompiledKernel, height: int = 56, items: float = 1.0) -> Row:
    """Read a kernel's machine code. height of the maps, items of a program: the weight gradient loops over them."""
    if kernel.assembly is not None:
        from .triton import amd_usage

        usage = amd_usage(kernel.assembly)
        wide = Counter({16: usage["loads_128"]}), Counter({16: usage["stores_128"]})
        return Row(kernel, usage["registers"], usage["spills"], *wide)
    if kernel.cubin is None:
        raise ValueError(f"kernel must come with cubin or assembly; {kernel.name} for {kernel.target} has neither")
    text, registers, stack = sass.disassemble(kernel.cubin)
    code = sass.parse(text)
    nest = sass.loops(code)
    main = _main_loop(kernel, code, nest)
    paths = sass.paths(code)
    conv = next(p for p in paths if any(line.address in main for line in p))
    identity = [p for p in paths if p is not conv and any(line.name == "STG" for line in p)]
    main_trips = float(-(-height // kernel.K) if kernel.name == "weight_gradient" else kernel.K)
    trips = [(main, main_trips)]
    if kernel.name == "weight_gradient":  # what is outside of the loop over items is shared by the program's items
        trips += [(sass.Loop(0, 1 << 62), 1 / items), (nest[0], items)]
    outputs = kernel.outputs_per_thread * (height if kernel.name == "weight_gradient" else 1)
    resident = device(kernel.target).resident_blocks(registers, kernel.threads, kernel.shared_bytes)
    flights = [sass.bytes_in_flight(path) for path in (conv, *identity)]
    return Row(
        kernel,
        registers,
        stack + sum(line.name in ("STL", "LDL") for line in code),
        Counter(line.bytes for line in code if line.name in ("LDG", "LDGSTS")),
        Counter(line.bytes for line in code if line.name == "STG"),
        sum(_PRODUCTS.get(line.name, 0) for line in code if line.address in main) * main_trips * kernel.parts / outputs,
        sum(line.name == "BAR" for line in code if line.address in main),
        resident,
        min(flights) * kernel.threads * resident,
        (
            sass.executed(conv, trips),
            sass.executed(identity[0], _row_trips(kernel, identity[0], nest)) if identity else Counter(),
        ),
    )


# The compiler may take a first product, and its addition elsewhere, for a multiply-add; or both of a pair at once.
_PRODUCTS = {"FFMA": 1, "FMUL": 1, "FHFMA": 1, "FFMA2": 2, "FMUL2": 2}


def _main_loop(kernel: CompiledKernel, code: list[sass.Instruction], nest: list[sass.Loop]) -> sass.Loop:
    """The convolution's, or the weight gradient's: of the innermost loops that store nothing, that of most products."""
    products: dict[sass.Loop, int] = {}
    for loop in nest:
        inside = [line for line in code if line.address in loop]
        innermost = not any(other.first in loop and other is not loop for other in nest)
        if innermost and not any(line.name == "STG" for line in inside):
            products[loop] = sum(_PRODUCTS.get(line.name, 0) for line in inside)
    if not products:
        raise ValueError(f"{kernel.name} for {kernel.target} has no loop that convolves: not a kernel of this op")
    return max(products, key=lambda loop: products[loop])


def _row_trips(
    kernel: CompiledKernel, path: list[sass.Instruction], nest: list[sass.Loop]
) -> list[tuple[sass.Loop, float]]:
    """How often the identity branch runs its loop over rows, if it was left a loop: as its stores must add up."""
    outputs = 2 if kernel.name == "gate_backward" else 1
    left = outputs * kernel.outputs_per_thread * kernel.element_bytes
    for loop in nest:
        inside = sum(line.bytes for line in path if line.name == "STG" and line.address in loop)
        if inside:
            outside = sum(line.bytes for line in path if line.name == "STG") - inside
            return [(loop, (left - outside) / inside)]
    return []


def failures(found: Row) -> list[str]:
    """The gates that do not depend on a shape and that a kernel does not pass, each with its figure."""
    broken = []
    kernel = found.kernel
    if found.spills:
        broken.append(f"spills: {found.spills}")
    # A thread of the weight gradient has K * K accumulators per channel: registers allow two channels, not eight.
    if kernel.aligned and kernel.name != "weight_gradient" and kernel.cubin is not None and found.vectors() < 1:
        broken.append(f"16-byte accesses: {found.vectors():.0%}")
    if found.multiply_adds is not None and found.multiply_adds > MOST_MULTIPLY_ADDS * kernel.K**2:
        broken.append(f"multiply-adds per output: {found.multiply_adds:.1f} for {kernel.K**2}")
    if found.bytes_in_flight is not None and kernel.target == "sm_90" and found.bytes_in_flight < LEAST_BYTES_IN_FLIGHT:
        broken.append(f"bytes in flight: {found.bytes_in_flight / 1024:.0f} KiB of 40")
    return broken
