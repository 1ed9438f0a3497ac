"""NVIDIA machine code: disassembly, loops, counts of what is executed, loads that are in flight together."""

import functools
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE)
_REGISTER = re.compile(r"\bR(\d+)(\.64)?")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str | None
    opcode: str  # LDG.E.128
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def bytes(self) -> int:
        """Width of a memory access by one thread."""
        widths = {"128": 16, "64": 8, "16": 2, "U16": 2, "S16": 2, "8": 1, "U8": 1, "S8": 1}
        return next((widths[part] for part in self.opcode.split(".") if part in widths), 4)


def cuobjdump() -> str:
    """The disassembler's path: a CUDA toolkit's, or that of Triton's wheel. FileNotFoundError without either."""
    spec = find_spec("triton")
    places = (
        [Path(p) / "backends/nvidia/bin/cuobjdump" for p in (spec.submodule_search_locations or ())] if spec else []
    )
    found = next((str(p) for p in places if p.exists()), None) or shutil.which("cuobjdump")
    if found is None:
        raise FileNotFoundError("cuobjdump is not here: it comes with triton (pip install triton) or a CUDA toolkit")
    return found


@functools.lru_cache(maxsize=16)
def disassemble(cubin: bytes) -> tuple[str, int, int]:
    """(text, registers per thread, stack bytes) of a cubin with one kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = cuobjdump()
        text, usage = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-sass", "-res-usage")
        )
    found = _USAGE.search(usage)
    if found is None:
        raise ValueError(f"cuobjdump -res-usage named no registers: {usage[-200:]!r}")
    return text, int(found[1]), int(found[2])


def parse(text: str) -> list[Instruction]:
    """Instructions in order; padding after the last branch to itself is left out."""
    lines = [Instruction(int(a, 16), p or None, o, rest.strip()) for a, p, o, rest in _LINE.findall(text)]
    return [line for line in lines if line.name != "NOP" and _target(line) != line.address]


def _target(instruction: Instruction) -> int | None:
    if instruction.name != "BRA":
        return None
    found = re.search(r"0x([0-9a-f]+)\s*$", instruction.operands)
    return int(found[1], 16) if found else None


@dataclass(frozen=True)
class Loop:
    first: int  # addresses, both inside
    last: int

    def __contains__(self, address: int) -> bool:
        return self.first <= address <= self.last


def loops(code: Sequence[Instruction]) -> list[Loop]:
    """Backward branches, outermost first."""
    found: dict[int, int] = {}
    for line in code:
        target = _target(line)
        if target is not None and target < line.address:
            found[target] = max(line.address, found.get(target, 0))
    return sorted((Loop(first, last) for first, last in found.items()), key=lambda loop: loop.first - loop.last)


def paths(code: Sequence[Instruction]) -> list[list[Instruction]]:
    """The stretches that end in an EXIT that is always taken: one for each branch a whole block takes."""
    found: list[list[Instruction]] = [[]]
    for line in code:
        found[-1].append(line)
        if line.name == "EXIT" and line.predicate is None:
            found.append([])
    return [path for path in found if path]


def executed(path: Iterable[Instruction], trips: Sequence[tuple[Loop, float]]) -> Counter[str]:
    """How often one thread runs each opcode, when each of these loops runs its body that often."""
    counts: Counter[str] = Counter()
    for line in path:
        times = 1.0
        for loop, trip in trips:
            if line.address in loop:
                times *= trip
        counts[line.opcode] += times  # type: ignore[assignment]
    return counts


def _registers(operands: str) -> list[int]:
    found = []
    for number, wide in _REGISTER.findall(operands):
        found += [int(number), int(number) + 1] if wide else [int(number)]
    return found


def bytes_in_flight(path: Iterable[Instruction]) -> int:
    """The most bytes that one thread has asked of global memory before it needs the first of them.

    A load into registers is needed by the first instruction that names one of them; asynchronous copies to shared
    memory by the DEPBAR that lets no more than so many of their groups be under way.
    """
    pending: dict[int, tuple[int, int]] = {}  # register -> (address of its load, bytes of that load)
    groups = [0]  # bytes of copies, by group, oldest first; the last one is open
    most = 0
    for line in path:
        needed = {pending[r][0] for r in _registers(line.operands) if r in pending}
        pending = {r: load for r, load in pending.items() if load[0] not in needed}
        if line.name == "LDG":
            first = int(_REGISTER.findall(line.operands)[0][0]) if _REGISTER.search(line.operands) else 0
            for r in range(first, first + max(1, line.bytes // 4)):
                pending[r] = (line.address, line.bytes)
        elif line.name == "LDGSTS":
            groups[-1] += line.bytes
        elif line.name == "LDGDEPBAR":
            groups.append(0)
        elif line.name == "DEPBAR":
            left = re.search(r"0x([0-9a-f]+)", line.operands)
            groups = groups[max(0, len(groups) - 1 - (int(left[1], 16) if left else 0)) :]
        most = max(most, sum(dict(pending.values()).values()) + sum(groups))
    return most
