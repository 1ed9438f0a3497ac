"""Control flow of machine code: what one trip through a kernel's main loop executes, at most and at least."""

import functools
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .sass import Instruction, Loop, loops

_INDIRECT = frozenset(("BRX", "BRXU"))
_MOVES = frozenset(("MOV", "UMOV", "CS2R", "IMAD.MOV.U32", "IMAD.MOV"))
_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")


@dataclass(frozen=True)
class Block:
    """Instructions that run one after the other, and the addresses where control may go from there."""

    code: tuple[Instruction, ...]
    successors: tuple[int, ...]

    @property
    def address(self) -> int:
        return self.code[0].address

    def count(self, prefix: str) -> int:
        return sum(line.opcode.startswith(prefix) for line in self.code)

    @property
    def only_moves(self) -> bool:
        """Registers are renamed, and nothing else is done."""
        moves = sum(line.opcode in _MOVES for line in self.code if line.name != "BRA")
        return moves >= 6 and moves >= 0.8 * len(self.code)


def blocks(code: Sequence[Instruction]) -> dict[int, Block]:
    """By address, in order. An indirect jump may go to the blocks behind it, up to the next such jump, that no other
    instruction leads to."""
    leaders = {code[0].address}
    for before, after in itertools.pairwise(code):
        if before.name in _INDIRECT or before.name in ("BRA", "EXIT", "RET"):
            leaders.add(after.address)
    leaders |= {t for line in code if (t := _target(line)) is not None}
    parts: list[list[Instruction]] = []
    for line in code:
        if line.address in leaders or not parts:
            parts.append([])
        parts[-1].append(line)
    named = {t for line in code if (t := _target(line)) is not None}
    reached = {parts[0][0].address} | named
    reached |= {b[0].address for a, b in itertools.pairwise(parts) if _falls_through(a[-1])}
    orphans = [part[0].address for part in parts if part[0].address not in reached]
    switches = [line.address for line in code if line.name in _INDIRECT] + [code[-1].address + 1]
    found = {}
    for index, part in enumerate(parts):
        following = parts[index + 1][0].address if index + 1 < len(parts) else None
        cases: list[int] = []
        if part[-1].name in _INDIRECT:
            here = part[-1].address
            end = min(at for at in switches if at > here)
            cases = [at for at in orphans if here < at < end]
        found[part[0].address] = Block(tuple(part), _successors(part[-1], following, cases))
    return found


def _target(line: Instruction) -> int | None:
    match = _TARGET.search(line.operands) if line.name == "BRA" else None
    return int(match[1], 16) if match else None


def _always(line: Instruction) -> bool:
    """A branch is taken whatever its predicate, which newer chips write among the operands."""
    return line.predicate is None and "P" not in line.operands.replace("UPT", "").replace("PT", "")


def _falls_through(line: Instruction) -> bool:
    return line.name not in _INDIRECT and line.name != "RET" and not (line.name in ("BRA", "EXIT") and _always(line))


def _successors(line: Instruction, following: int | None, cases: Sequence[int]) -> tuple[int, ...]:
    jumps = list(cases)
    if (target := _target(line)) is not None:
        jumps.append(target)
    if following is not None and _falls_through(line):
        jumps.append(following)
    return tuple(jumps)


def main_loop(code: Sequence[Instruction]) -> Loop:
    """The loop with the most instructions. ValueError without any."""
    nest = loops(code)
    if not nest:
        raise ValueError("this code has no loop: not a kernel of this op")
    return max(nest, key=lambda loop: sum(line.address in loop for line in code))


class Trip:
    """One trip through a loop, without the loops inside it and without blocks that `skip` names.

    Blocks that only move registers are on the longest way only where there is no way round them.
    """

    def __init__(self, code: Sequence[Instruction], loop: Loop, skip: Callable[[Block], bool]) -> None:
        nested = [inner for inner in loops(code) if inner != loop and inner.first > loop.first and inner.last in loop]
        self._first = loop.first
        self._latch = loop.last
        self._blocks = {
            block.address: block
            for block in blocks(code).values()
            if block.address in loop and not skip(block) and not any(block.address in inner for inner in nested)
        }

    def longest(self) -> list[Block]:
        return self._path(max, lambda block: 0 if block.only_moves else len(block.code))

    def shortest(self) -> list[Block]:
        return self._path(min, lambda block: len(block.code))

    def _path(self, choose: Callable[..., tuple[int, int]], weight: Callable[[Block], int]) -> list[Block]:
        @functools.cache
        def best(address: int) -> tuple[int, int] | None:
            """(instructions to the end of the trip, where to next); next is 0 at the end."""
            block = self._blocks[address]
            if any(line.address == self._latch for line in block.code):
                return weight(block), 0
            ahead = [a for a in block.successors if a > address and a in self._blocks]
            found = [(rest[0], a) for a in ahead if (rest := best(a)) is not None]
            if not found:
                return None
            length, following = choose(found)
            return length + weight(block), following

        path, at = [], self._first
        while at:
            step = best(at)
            if step is None:
                raise ValueError(f"no way through the loop at {self._first:#x}")
            path.append(self._blocks[at])
            at = step[1]
        return path
