"""The CUDA C++ kernels as compiled: registers, spills, widths of accesses and multiply-adds, read from their SASS.

Nothing is run: the module's machine code is disassembled by cuobjdump, of a CUDA toolkit or of Triton's wheel.
"""

import functools
import re
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from . import flow, sass

_ELEMENTS = {"f": "float32", "13__nv_bfloat16": "bfloat16", "6__half": "float16"}
_TYPED = "|".join(_ELEMENTS)
_OWN_FILTER = re.compile(rf"gated_dwconv_(fwd|bwd)_kernel.*?TraitsI({_TYPED})Li(\d+)ELb([01])E(?:Li(\d)E)?Li(\d+)E")
_DEPTHWISE = re.compile(rf"depthwise_kernel.*?TraitsI({_TYPED})Li(\d+)ELi(\d)ELi(\d+)E")
_OTHER = re.compile(
    rf"(generic_kernel_size_(?:fwd|bwd|dweight)|sum_partials|gate_backward|weight_gradient)_kernelI({_TYPED})E"
)
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)([^;]*);")
_BRANCHES = frozenset(("BRA", "BRX", "JMP", "EXIT", "RET", "CALL", "BSYNC"))


@dataclass(frozen=True)
class NativeKernel:
    """One kernel in the machine code of one target."""

    name: str  # "forward", "backward", "depthwise", or of the kernels for any filter
    target: str  # "sm_90"
    dtype: str
    kernel_size: int | None  # None: any
    aligned: bool | None  # every access 16 bytes wide; None: kernels for any filter
    lanes: int  # channels of a thread
    strip: int  # pixels of a thread, in a row
    registers: int
    stack_bytes: int
    code: Sequence[sass.Instruction]
    instructions: Counter[str]
    multiply_adds: int  # outside of the activations; a pair counts twice

    @property
    def label(self) -> str:
        kind = "" if self.aligned is None else " aligned" if self.aligned else " unaligned"
        size = "any K" if self.kernel_size is None else f"K={self.kernel_size}"
        lanes = f" x{self.lanes}" if self.lanes > 1 else ""
        return f"{self.name} {size} {self.dtype}{kind}{lanes}"

    def count(self, prefix: str, *, without: str = "\0") -> int:
        return sum(n for name, n in self.instructions.items() if name.startswith(prefix) and without not in name)

    def main_loop_widths(self, name: str) -> Counter[int]:
        """Of the accesses with this opcode in the main loop, by bytes."""
        loop = flow.main_loop(self.code)
        return Counter(line.bytes for line in self.code if line.name == name and line.address in loop)

    @property
    def spills(self) -> int:
        """Instructions that move registers to and from memory."""
        return self.count("STL") + self.count("LDL")

    @property
    def multiply_adds_per_output(self) -> float | None:
        """Per pixel and conv channel: K * K, three times that backward. None without a filter of its own."""
        return None if self.kernel_size is None else self.multiply_adds / (self.lanes * self.strip)

    def failures(self) -> list[str]:
        """The gates that this kernel does not pass."""
        found = []
        if self.spills or self.stack_bytes:
            found.append(f"spills: {self.spills} instructions, {self.stack_bytes} bytes of stack")
        if self.aligned:
            # Activations move in the main loop; parameters before it and partial sums behind it, at other widths.
            for name, what in (
                ("LDGSTS", "asynchronous copies narrower than 16 bytes"),
                ("LDG", "activations are loaded less than 16 bytes at a time"),
                ("STG", "outputs are stored less than 16 bytes at a time"),
            ):
                widths = self.main_loop_widths(name).keys()
                if widths != ({16} if name != "LDG" or self.name != "depthwise" else set()):
                    found.append(what)
        size, share = self.kernel_size, self.multiply_adds_per_output
        if size is not None and size > 3 and share is not None:
            taps = size * size * (3 if self.name == "backward" else 1)
            if not taps <= share <= 1.1 * taps:
                found.append(f"{share:.1f} multiply-adds per output for {taps}")
        return found


def module_path() -> Path | None:
    """Where the compiled CUDA module lies, or None. It is not loaded."""
    spec = find_spec("mambaout_kernels._C_cuda")
    return Path(spec.origin) if spec is not None and spec.origin is not None else None


def disassembler() -> str | None:
    """cuobjdump: of the CUDA toolkit, or of Triton's wheel; None where neither is installed."""
    try:
        return sass.cuobjdump()
    except FileNotFoundError:
        return None


def targets(module: Path) -> list[str]:
    """The architectures that a module has machine code for, oldest first."""
    found = set(re.findall(r"\.(sm_\d+)[af]?\.cubin", _cuobjdump("-lelf", str(module))))
    return sorted(found, key=lambda target: int(target[3:]))


def ptx_targets(module: Path) -> list[str]:
    """The architectures that a module has PTX for, for GPUs to come."""
    return sorted(set(re.findall(r"\.(sm_\d+)[af]?\.ptx", _cuobjdump("-lptx", str(module)))))


def kernels(module: Path, target: str) -> list[NativeKernel]:
    """The op's kernels of a module for a target. FileNotFoundError without a cuobjdump."""
    return [kernel for kernel in _all_kernels(module, target) if kernel.name != "depthwise"]


def depthwise_kernels(module: Path, target: str) -> list[NativeKernel]:
    """Those of the convolution alone, likewise."""
    return [kernel for kernel in _all_kernels(module, target) if kernel.name == "depthwise"]


@functools.cache
def _all_kernels(module: Path, target: str) -> list[NativeKernel]:
    usage = {}
    for name, registers, stack in re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", _cuobjdump("-res-usage", "-arch", target, str(module))
    ):
        usage[name] = (int(registers), int(stack))
    found = []
    for function in _cuobjdump("-sass", "-arch", target, str(module)).split("Function : ")[1:]:
        name = function.split(maxsplit=1)[0]
        kernel = _kernel(name, target, function, *usage[name])
        if kernel is not None:
            found.append(kernel)
    return found


def _cuobjdump(*arguments: str) -> str:
    return subprocess.run([sass.cuobjdump(), *arguments], capture_output=True, text=True, check=True).stdout


def _kernel(name: str, target: str, text: str, registers: int, stack: int) -> NativeKernel | None:
    blocks = _straight_lines(text)
    instructions = Counter(opcode for block in blocks for opcode in block)
    code = sass.parse(text)
    own, depthwise, other = _OWN_FILTER.search(name), _DEPTHWISE.search(name), _OTHER.search(name)
    if own is not None:
        direction, element, size, aligned, lanes, strip = own.groups()
        multiply_adds = _multiply_adds(blocks, direction == "fwd")
        return NativeKernel(
            "forward" if direction == "fwd" else "backward", target, _ELEMENTS[element], int(size), aligned == "1",
            int(lanes or 1), int(strip), registers, stack, code, instructions,
            multiply_adds,
        )  # fmt: skip
    if depthwise is not None:
        element, size, lanes, strip = depthwise.groups()
        return NativeKernel(
            "depthwise", target, _ELEMENTS[element], int(size), True, int(lanes), int(strip), registers, stack, code,
            instructions, _multiply_adds(blocks, True),
        )  # fmt: skip
    if other is not None:
        title = other[1].replace("_", " ")
        return NativeKernel(
            title, target, _ELEMENTS[other[2]], None, None, 1, 1, registers, stack, code, instructions, 0
        )  # fmt: skip
    return None


def _straight_lines(text: str) -> list[list[str]]:
    """Opcodes, cut where control may enter or leave."""
    jumped_to = {int(address, 16) for address in re.findall(r"\s(?:BRA|BSSY|CALL)\S*\s[^;]*?(0x[0-9a-f]+)", text)}
    blocks: list[list[str]] = [[]]
    for address, opcode, _ in _INSTRUCTION.findall(text):
        if int(address, 16) in jumped_to:
            blocks.append([])
        blocks[-1].append(opcode)
        if opcode.split(".")[0] in _BRANCHES:
            blocks.append([])
    return blocks


def _multiply_adds(blocks: list[list[str]], largest_only: bool) -> int:
    """Of the convolution: activations share no straight line with it where the filter is larger than 3 x 3."""

    def count(block: list[str]) -> int:
        return sum(2 if opcode.startswith("FFMA2") else 1 for opcode in block if opcode.startswith("FFMA"))

    if largest_only:
        return max(map(count, blocks))
    return sum(count(block) for block in blocks if not any(opcode.startswith("MUFU") for opcode in block))
