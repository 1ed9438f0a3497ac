"""What the CUDA C++ kernels execute and move for a shape, by their machine code and the plan of the launch.

Nothing here is a measurement. A kernel walks down the rows of an image (csrc/cuda/forward.cuh): the longest way through
its main loop is taken apart by what its parts are for, and each part counted as often as the launch runs it.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from . import flow
from .devices import ALU_LANES, ISSUE_SLOTS, L1_BYTES, L2_BYTES, SPECIAL_LANES, WARP, Device
from .roofline import Prediction, Shape
from .sass import Instruction, loops

CHUNK = 32  # channels (csrc/cuda/tiling.h)
Plan = dict[str, int]  # one of _C_cuda.launch_plans

_FMA_PIPE = frozenset(("FFMA", "FMUL", "FADD", "IMAD", "HMUL2", "HFMA2"))
_PACKED = frozenset(("FFMA2", "FMUL2", "FADD2"))  # two at once, at half the rate
_MEMORY = frozenset(("LDG", "STG", "LDS", "STS", "LDGSTS"))
_ELSEWHERE = _MEMORY | {"MUFU", "LDC", "S2R", "BRA", "BRX", "EXIT", "BAR", "BSSY", "BSYNC", "LDGDEPBAR", "DEPBAR"}


@dataclass(frozen=True)
class Work:
    """Opcodes that one thread executes, under gelu."""

    step: Counter[str]  # in every step: waiting, starting copies
    row: Counter[str]  # besides, in a step that yields a row
    conv: Counter[str]  # in a step that reads a row: multiply-adds
    gate: Counter[str]  # in a step that yields a row, of convolved channels
    packet: Counter[str]  # for one packet of identity channels
    halo: Counter[str]  # backward: for one element whose dy and g become e and p
    image: Counter[str]  # once for each image
    launch: Counter[str]  # once: weights to registers, partial sums from them
    parameter: Counter[str]  # once for each weight that is brought to shared memory


def opcodes(blocks: Iterable[flow.Block], times: float = 1.0) -> Counter[str]:
    found: Counter[str] = Counter()
    for block in blocks:
        for line in block.code:
            found[line.opcode] += times  # type: ignore[assignment]
    return found


def work(code: Sequence[Instruction], backward: bool) -> Work:
    """Take a kernel apart. ValueError where its code is not what csrc/cuda compiles to."""
    main = flow.main_loop(code)
    trip = flow.Trip(code, main, skip=lambda block: block.count("MUFU.RCP") > 0)
    longest, step = trip.longest(), opcodes(trip.shortest())
    parts: dict[str, list[flow.Block]] = {"row": [], "conv": [], "gate": [], "packet": []}
    for block in longest:
        fma, special, shared = block.count("FFMA"), block.count("MUFU"), block.count("LDS")
        stores = block.count("STG")
        if block.count("LDG.") or (special and stores and not shared):
            parts["packet"].append(block)
        elif fma and not special:
            parts["conv"].append(block)
        else:
            parts["gate" if special else "row"].append(block)
    packets = sum(block.count("LDG.") for block in parts["packet"]) / (3 if backward else 2)
    if not packets or not parts["conv"] or not any(block.count("MUFU") for block in longest):
        raise ValueError("no identity channels, no multiply-adds or no gelu on the way through the main loop")
    rare = [block for block in flow.blocks(code).values() if block.address in main and block.only_moves]
    return Work(
        step,
        opcodes(parts["row"]) - step,
        opcodes(parts["conv"]),
        opcodes(parts["gate"]),
        opcodes(parts["packet"], 1 / packets),
        _halo(code, main) if backward else Counter(),
        opcodes(block for block in rare if block not in longest),
        launch(code, main),
        parameter(code, main),
    )


def launch(code: Sequence[Instruction], main: flow.Loop) -> Counter[str]:
    reading = _reading_weights(code, main)
    outside = [b for b in flow.blocks(code).values() if b.address not in main]
    return opcodes(b for b in outside if not any(b.address in loop for loop in reading))


def parameter(code: Sequence[Instruction], main: flow.Loop) -> Counter[str]:
    """For one weight, in the longer of the loops that read 16 bytes of them at a time: one for each type of theirs."""
    found: list[Counter[str]] = []
    for loop in _reading_weights(code, main):
        body = [b for b in flow.blocks(code).values() if b.address in loop]
        lines = [line for b in body for line in b.code]
        fp32 = sum(line.name == "LDGSTS" for line in lines)  # copied as they are
        low = sum(line.name == "LDG" and line.bytes == 16 for line in lines)
        if fp32 + low:
            found.append(opcodes(body, 1 / (4 * fp32 + 8 * low)))
    if not found:
        raise ValueError("no loop that reads weights before the main loop")
    return max(found, key=lambda counts: sum(counts.values()))


def _reading_weights(code: Sequence[Instruction], main: flow.Loop) -> list[flow.Loop]:
    def names(loop: flow.Loop) -> set[str]:
        return {line.name for line in code if line.address in loop}

    before = [loop for loop in loops(code) if loop.last < main.first]
    return [loop for loop in before if names(loop) & {"LDG", "LDGSTS"} and "LDGDEPBAR" not in names(loop)]


def _halo(code: Sequence[Instruction], main: flow.Loop) -> Counter[str]:
    """Per element, of the loop inside the main one that turns g and dy into p and e: two exponentials each."""
    for inner in loops(code):
        body = [b for b in flow.blocks(code).values() if b.address in inner]
        special = sum(b.count("MUFU.EX2") for b in body)
        others = sum(b.count("MUFU.RCP") + b.count("LDG.") + b.count("STG") for b in body)
        if inner != main and inner.first in main and special and not others:
            return opcodes(body, 2 / special)
    raise ValueError("no loop over a row with its halo inside the main loop")


def executed_so_often(often: Iterable[tuple[Counter[str], float]]) -> Counter[str]:
    """Opcodes of all parts, each as often as it runs."""
    found: Counter[str] = Counter()
    for counts, times in often:
        for opcode, number in counts.items():
            found[opcode] += number * times  # type: ignore[assignment]
    return found


def total(parts: Work, plan: Plan, shape: Shape, K: int, channels_per_packet: int, lanes: int) -> Counter[str]:
    """Instructions of warps, of a whole launch."""
    R, strip_w = K // 2, plan["strip"]
    tops = [segment * plan["segment_rows"] for segment in range(plan["segments"])]
    ends = [min(top + plan["segment_rows"], shape.H) for top in tops]
    steps = sum(end + R - max(top - R, 0) for top, end in zip(tops, ends, strict=True))
    reads = sum(min(end + R, shape.H) - max(top - R, 0) for top, end in zip(tops, ends, strict=True))
    warps = plan["w_tiles"] * plan["chunk_groups"] * plan["threads"] / WARP
    strips, chunks = -(-shape.W // strip_w), -(-shape.C // CHUNK)
    convolving = strips * chunks / lanes
    halo = sum(tile_pixels(plan, shape, K, tile)[1] for tile in range(plan["w_tiles"])) * chunks * CHUNK / WARP
    often = (
        (parts.step, shape.N * steps * warps),
        (parts.row, shape.N * shape.H * warps),
        (parts.conv, shape.N * reads * convolving),
        (parts.gate, shape.N * shape.H * convolving),
        (parts.packet, shape.N * shape.H * _packet_warps(plan, shape, channels_per_packet)),
        (parts.halo, shape.N * reads * halo),
        (parts.image, shape.N * plan["segments"] * warps),
        (parts.launch, plan["blocks"] * plan["threads"] / WARP),
        (parts.parameter, plan["blocks"] * plan["chunks"] * CHUNK * K * K / WARP),
    )
    return executed_so_often(often)


def tile_pixels(plan: Plan, shape: Shape, K: int, tile: int) -> tuple[int, int]:
    """Pixels of a row of a tile that exist, and with those of its halo that exist."""
    width = plan["strips"] * plan["strip"]
    first, last = tile * width, min((tile + 1) * width, shape.W)
    return last - first, min(last + K // 2, shape.W) - max(first - K // 2, 0)


def _packet_warps(plan: Plan, shape: Shape, channels_per_packet: int) -> int:
    """Warps with an identity packet to work on, for one row of pixels (csrc/cuda/identity_row.cuh)."""
    packets, groups = (shape.D - shape.C) // channels_per_packet, plan["chunk_groups"]
    shares = [packets * (group + 1) // groups - packets * group // groups for group in range(groups)]
    pixels = [tile_pixels(plan, shape, 1, tile)[0] for tile in range(plan["w_tiles"])]
    return sum(-(-share * there // WARP) for share in shares for there in pixels)


def l2_elements(plan: Plan, shape: Shape, K: int, backward: bool) -> float:
    """Elements per pixel between multiprocessors and L2: what cannot be avoided, and the halo read again."""
    R, segments = K // 2, range(plan["segments"])
    tops = [segment * plan["segment_rows"] for segment in segments]
    rows = sum(min(top + plan["segment_rows"] + R, shape.H) - max(top - R, 0) for top in tops)
    columns = sum(tile_pixels(plan, shape, K, tile)[1] for tile in range(plan["w_tiles"]))
    again = rows * columns / (shape.H * shape.W) - 1
    return (5 * shape.D + 3 * shape.C * again) if backward else (3 * shape.D + shape.C * again)


def extra_bytes(plan: Plan, shape: Shape, K: int, backward: bool) -> int:
    """Of DRAM, besides activations: weights, and the partial sums of the backward, which are read back from L2."""
    parameters = 4 * shape.C * (K * K + 1)
    if not backward:
        return parameters
    slots = plan["blocks"] // plan["chunk_groups"]
    return 2 * parameters + slots * parameters


def predict(executed: Counter[str], plan: Plan, shape: Shape, K: int, device: Device, element_bytes: int,
            backward: bool) -> Prediction:  # fmt: skip
    """Each limit at its datasheet rate, as if the others were hidden behind it. What a multiprocessor does for itself
    takes as long as on the one with the most blocks.
    """
    elements = l2_elements(plan, shape, K, backward) * shape.pixels
    microseconds = on_the_chip(executed, plan, device, elements * element_bytes)
    floor = (5 if backward else 3) * shape.D * element_bytes * shape.pixels
    extra = extra_bytes(plan, shape, K, backward)
    return Prediction(
        {"DRAM": (floor + extra) / device.dram_tb_s / 1e6, **microseconds}, floor / device.dram_tb_s / 1e6
    )


def on_the_chip(executed: Counter[str], plan: Plan, device: Device, l2_bytes: float) -> dict[str, float]:
    """Microseconds by each limit but DRAM."""
    cycles = {**pipes(executed, device), "L2": l2_bytes / L2_BYTES}
    most = -(-plan["blocks"] // device.multiprocessors) * device.multiprocessors / plan["blocks"]
    return {name: n * most / device.multiprocessors / device.ghz * 1e-3 for name, n in cycles.items()}


def pipes(executed: Counter[str], device: Device) -> dict[str, float]:
    """Cycles of one multiprocessor for these instructions of warps, by what they occupy."""
    found = dict.fromkeys(("issue", "FMA", "ALU", "MUFU", "L1"), 0.0)
    for opcode, times in executed.items():
        name = opcode.partition(".")[0]
        found["issue"] += times / ISSUE_SLOTS
        if name in _FMA_PIPE or name in _PACKED:
            found["FMA"] += times * (2 if name in _PACKED else 1) * WARP / device.fma_lanes
        elif name == "MUFU":
            found["MUFU"] += times * WARP / SPECIAL_LANES
        elif name in _MEMORY:
            found["L1"] += times * max(1.0, Instruction(0, None, opcode, "").bytes * WARP / L1_BYTES)
        elif name not in _ELSEWHERE and not name.startswith("U"):
            found["ALU"] += times * WARP / ALU_LANES
    return found
