"""Datasheets of GPUs (devices.json), and how many blocks of a kernel a multiprocessor holds."""

import functools
import json
from dataclasses import dataclass
from importlib.resources import files

WARP = 32
ISSUE_SLOTS = 4  # warp instructions per cycle of a multiprocessor, one per quarter
ALU_LANES = 64  # integer, logic, comparison and conversion
SPECIAL_LANES = 16  # MUFU
L1_BYTES = 128  # per cycle
L2_BYTES = 32  # per cycle and multiprocessor; an assumption: no datasheet states it
REGISTERS = 64 * 1024
_REGISTER_UNIT = 256  # a warp's registers are given out in these
_RESERVED_SHARED = 1024  # of each block


@dataclass(frozen=True)
class Device:
    """One GPU. Per multiprocessor: fp32 multiply-adds per cycle, resident warps and blocks, shared memory.

    clock: what the datasheet says about ghz.
    """

    name: str
    target: str
    multiprocessors: int
    ghz: float
    dram_tb_s: float
    fma_lanes: int
    warps: int
    blocks: int
    shared_kib: int
    tensor_tflops: float  # dense, of 16-bit products added in fp32; of TF32 half of it
    clock: str = ""

    def resident_blocks(self, registers: int, threads: int, shared_bytes: int) -> int:
        """Blocks per multiprocessor, by CUDA's occupancy formula."""
        warps = -(-threads // WARP)
        per_warp = -(-registers * WARP // _REGISTER_UNIT) * _REGISTER_UNIT
        by_registers = REGISTERS // ISSUE_SLOTS // per_warp * ISSUE_SLOTS // warps if registers else self.blocks
        by_shared = self.shared_kib * 1024 // (shared_bytes + _RESERVED_SHARED)
        return min(self.blocks, self.warps // warps, by_registers, by_shared)


@functools.cache
def devices() -> tuple[Device, ...]:
    return tuple(Device(**row) for row in json.loads((files(__package__) / "devices.json").read_text(encoding="utf-8")))


def device(target: str) -> Device:
    """The datasheet for a target, "sm_90". ValueError for one without."""
    for found in devices():
        if found.target == target:
            return found
    raise ValueError(f"target must be one of {', '.join(d.target for d in devices())}; got {target!r}")
