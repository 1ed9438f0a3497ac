"""What the depthwise kernel (csrc/cuda/depthwise.cuh) executes and moves for a shape, by its machine code and its plan.

Nothing here is a measurement. As cuda_predict.py does it for the kernels of the op.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from . import cuda_predict, flow
from .cuda_predict import CHUNK, Plan
from .devices import WARP, Device
from .roofline import Prediction
from .sass import Instruction

K, R = 7, 3


@dataclass(frozen=True)
class Shape:
    N: int
    H: int
    W: int
    C: int

    @property
    def pixels(self) -> int:
        return self.N * self.H * self.W


@dataclass(frozen=True)
class Work:
    """Opcodes that one thread executes."""

    step: Counter[str]  # in every step: waiting, starting copies, tests
    conv: Counter[str]  # in every step, of threads that convolve: multiply-adds
    output: Counter[str]  # for a row of s: the bias, and its way through shared memory
    image: Counter[str]  # once for each image: sums to zero
    launch: Counter[str]  # once: weights to registers
    parameter: Counter[str]  # once for each weight that is brought to shared memory

    @property
    def row(self) -> int:
        """Instructions of a warp for one row of a strip, in the middle of an image."""
        return sum(sum(part.values()) for part in (self.step, self.conv, self.output))


def work(code: Sequence[Instruction]) -> Work:
    """Take the kernel apart. ValueError where its code is not what csrc/cuda compiles to."""
    main = flow.main_loop(code)
    trip = flow.Trip(code, main, skip=lambda block: False)
    longest, shortest = trip.longest(), trip.shortest()
    conv = [block for block in longest if block.count("FFMA")]
    copies = [block for block in longest if block.count("LDGSTS")]
    output = [block for block in longest if block not in (*conv, *copies, *shortest) and not block.only_moves]
    if not conv or not copies or not any(block.count("STG") for block in output):
        raise ValueError("no multiply-adds, no copies or no stores on the way through the main loop")
    return Work(
        cuda_predict.opcodes((*shortest, *copies)),
        cuda_predict.opcodes(conv),
        cuda_predict.opcodes(output, 1 / (1 + R)),  # the last row of an image yields R rows more
        cuda_predict.opcodes(b for b in flow.blocks(code).values() if b.address in main and b.only_moves),
        cuda_predict.launch(code, main),
        cuda_predict.parameter(code, main),
    )


def _rows_read(plan: Plan, shape: Shape) -> int:
    """Of an image, by one column of blocks: with the halo of its segments."""
    tops = [segment * plan["segment_rows"] for segment in range(plan["segments"])]
    return sum(min(top + plan["segment_rows"] + R, shape.H) - max(top - R, 0) for top in tops)


def total(parts: Work, plan: Plan, shape: Shape, lanes: int) -> Counter[str]:
    """Instructions of warps, of a whole launch."""
    reads = shape.N * _rows_read(plan, shape)
    warps = plan["w_tiles"] * plan["chunk_groups"] * -(-plan["threads"] // WARP)
    convolving = -(-shape.W // plan["strip"]) * -(-shape.C // CHUNK) / lanes
    often = (
        (parts.step, reads * warps),
        (parts.conv, reads * convolving),
        (parts.output, shape.N * shape.H * convolving),
        (parts.image, shape.N * plan["segments"] * warps),
        (parts.launch, plan["blocks"] * plan["threads"] / WARP),
        (parts.parameter, plan["blocks"] * plan["chunks"] * CHUNK * K * K / WARP),
    )
    return cuda_predict.executed_so_often(often)


def l2_elements(plan: Plan, shape: Shape) -> float:
    """Elements per pixel between multiprocessors and L2: x and s, and the halo read again."""
    op = cuda_predict.Shape(shape.N, shape.H, shape.W, shape.C, shape.C)
    columns = sum(cuda_predict.tile_pixels(plan, op, K, tile)[1] for tile in range(plan["w_tiles"]))
    return shape.C * (1 + _rows_read(plan, shape) * columns / (shape.H * shape.W))


def extra_bytes(shape: Shape) -> int:
    """Of DRAM, besides x and s: weights and biases."""
    return 4 * shape.C * (K * K + 1)


def predict(executed: Counter[str], plan: Plan, shape: Shape, device: Device, element_bytes: int) -> Prediction:
    """As cuda_predict.predict."""
    floor = 2 * shape.C * element_bytes * shape.pixels
    l2_bytes = l2_elements(plan, shape) * shape.pixels * element_bytes
    return Prediction(
        {
            "DRAM": (floor + extra_bytes(shape)) / device.dram_tb_s / 1e6,
            **cuda_predict.on_the_chip(executed, plan, device, l2_bytes),
        },
        floor / device.dram_tb_s / 1e6,
    )
