"""The CUDA C++ kernels as rows of the audit's tables, beside Triton's."""

from collections.abc import Sequence
from pathlib import Path

from ..benchmarking import shapes
from . import cuda, cuda_depthwise, cuda_predict, flow
from .cuda import NativeKernel
from .devices import Device, device, devices
from .record import CompiledKernel
from .report import Entry, Stage
from .roofline import Shape
from .table import LEAST_BYTES_IN_FLIGHT, LEAST_SHARE, MOST_BYTES, Row

DTYPES = ("float32", "bfloat16", "float16")
PACKED_MULTIPLY_ADDS = 10  # major compute capability at which the forward gives a thread two channels (forward.cu)


def code_target(module_targets: Sequence[str], target: str) -> str | None:
    """Whose machine code of a module a GPU runs: the newest of its own generation that is not newer than it."""
    number = int(target[3:])
    fitting = [t for t in module_targets if int(t[3:]) // 10 == number // 10 and int(t[3:]) <= number]
    return fitting[-1] if fitting else None


def entries(
    module: Path,
    targets: Sequence[str] = (),
    dtypes: Sequence[str] = DTYPES,
    kernel_sizes: Sequence[int] = (7,),
    variant: str = "mambaout_tiny",
    batch: int = 128,
) -> list[Entry]:
    """What the module runs on each GPU with a datasheet: forward, backward and the depthwise convolution alone, for the
    variant's maps.

    targets: of `devices()`; default all. FileNotFoundError without a cuobjdump.
    """
    there = cuda.targets(module)
    found, read = [], {}
    for wanted in targets or [d.target for d in devices()]:
        source = code_target(there, wanted)
        if source is None:
            continue
        if source not in read:
            read[source] = cuda.kernels(module, source)
        for size in kernel_sizes:
            for dtype in dtypes:
                for backward in (False, True):
                    found.append(entry(read[source], device(wanted), size, dtype, backward, variant, batch))
                if size == cuda_depthwise.K:
                    alone = cuda.depthwise_kernels(module, source)
                    of_alone = depthwise_entry(alone, device(wanted), dtype, variant, batch) if alone else None
                    found += [of_alone] if of_alone is not None else []
    return found


def launched(
    kernels: Sequence[NativeKernel], on: Device, size: int, dtype: str, backward: bool, aligned: bool
) -> NativeKernel:
    """The kernel that a launch with this filter takes on a device."""
    lanes = lanes_on(on) if aligned and not backward else 1
    wanted = ("backward" if backward else "forward", dtype, size, aligned, lanes)
    return next(k for k in kernels if (k.name, k.dtype, k.kernel_size, k.aligned, k.lanes) == wanted)


def lanes_on(device: Device) -> int:
    """Channels of a thread, forward and aligned."""
    return 2 if int(device.target[3:-1]) == PACKED_MULTIPLY_ADDS else 1


def is_aligned(shape: Shape, element_bytes: int) -> bool:
    """Every branch of every pixel begins and ends at a multiple of 16 bytes, in a contiguous u."""
    return shape.D * element_bytes % 16 == 0 and shape.C * element_bytes % 16 == 0


def plan_of(shape: Shape, size: int, element_bytes: int, on: Device, backward: bool) -> cuda_predict.Plan:
    from .. import _C_cuda

    sizes = (shape.N, shape.H, shape.W, shape.D, shape.C, size)
    plans = _C_cuda.launch_plans(sizes, element_bytes, on.multiprocessors, int(on.target[3:-1]))
    return plans["backward" if backward else "forward"]


def entry(
    kernels: Sequence[NativeKernel],
    on: Device,
    size: int,
    dtype: str,
    backward: bool,
    variant: str = "mambaout_tiny",
    batch: int = 128,
) -> Entry:
    """One direction of one filter and dtype on a device, out of the kernels that it can run."""
    element_bytes = 4 if dtype == "float32" else 2
    stages, broken, flights, launches = [], [], [], []
    works: dict[str, cuda_predict.Work] = {}
    for listed in shapes.stages(variant):
        shape = Shape(batch, listed.height, listed.width, listed.hidden, listed.conv_channels)
        aligned = is_aligned(shape, element_bytes)
        kernel = launched(kernels, on, size, dtype, backward, aligned)
        plan = plan_of(shape, size, element_bytes, on, backward)
        if kernel.label not in works:
            works[kernel.label] = cuda_predict.work(kernel.code, backward)
        executed = cuda_predict.total(
            works[kernel.label], plan, shape, size, 16 // element_bytes if aligned else 1, kernel.lanes
        )
        prediction = cuda_predict.predict(executed, plan, shape, size, on, element_bytes, backward)
        elements = (5 if backward else 3) * shape.D * element_bytes
        moved = elements + cuda_predict.extra_bytes(plan, shape, size, backward) / shape.pixels
        from_l2 = cuda_predict.l2_elements(plan, shape, size, backward) * element_bytes
        stages.append(Stage(listed.label, shape, prediction, moved, from_l2))
        resident = on.resident_blocks(kernel.registers, plan["threads"], plan["shared_bytes"])
        flights.append(resident * plan["bytes_ahead"])
        if not backward and prediction.share < LEAST_SHARE:
            broken.append(f"{listed.label}: {prediction.share:.0%} of the DRAM roofline, by {prediction.bound_by}")
        if moved > MOST_BYTES * elements:
            broken.append(f"{listed.label}: {moved:.0f} bytes moved per pixel for {elements}")
        launches.append((kernel, plan))
    kernel, plan = launches[0]
    if on.target == "sm_90" and min(flights) < LEAST_BYTES_IN_FLIGHT:
        broken.append(f"bytes in flight: {min(flights) / 1024:.0f} KiB of {LEAST_BYTES_IN_FLIGHT // 1024}")
    return Entry(_row(kernel, on, plan, min(flights)), kernel.failures() + broken, stages)


def depthwise_plan_of(shape: cuda_depthwise.Shape, element_bytes: int, on: Device) -> cuda_predict.Plan:
    from .. import _C_cuda

    sizes = (shape.N, shape.H, shape.W, shape.C)
    return _C_cuda.depthwise_plan(sizes, element_bytes, on.multiprocessors, int(on.target[3:-1]))


def depthwise_entry(
    kernels: Sequence[NativeKernel], on: Device, dtype: str, variant: str = "mambaout_tiny", batch: int = 128
) -> Entry | None:
    """The convolution alone, of those of the variant's stages that are aligned; None where none is. Arithmetic may take
    longer than DRAM here, so that no share of its roofline is asked for."""
    element_bytes = 4 if dtype == "float32" else 2
    kernel = next(k for k in kernels if (k.dtype, k.lanes) == (dtype, lanes_on(on)))
    parts = cuda_depthwise.work(kernel.code)
    stages, plans, flights = [], [], []
    for listed in shapes.stages(variant):
        shape = cuda_depthwise.Shape(batch, listed.height, listed.width, listed.conv_channels)
        if shape.C * element_bytes % 16 != 0:
            continue
        plan = depthwise_plan_of(shape, element_bytes, on)
        executed = cuda_depthwise.total(parts, plan, shape, kernel.lanes)
        prediction = cuda_depthwise.predict(executed, plan, shape, on, element_bytes)
        moved = 2 * shape.C * element_bytes + cuda_depthwise.extra_bytes(shape) / shape.pixels
        from_l2 = cuda_depthwise.l2_elements(plan, shape) * element_bytes
        map_of = Shape(batch, shape.H, shape.W, shape.C, shape.C)
        stages.append(Stage(listed.label, map_of, prediction, moved, from_l2))
        resident = on.resident_blocks(kernel.registers, plan["threads"], plan["shared_bytes"])
        plans.append(plan)
        flights.append(resident * plan["bytes_ahead"])
    if not stages:
        return None
    broken = kernel.failures()
    if on.target == "sm_90" and min(flights) < LEAST_BYTES_IN_FLIGHT:
        broken.append(f"bytes in flight: {min(flights) / 1024:.0f} KiB of {LEAST_BYTES_IN_FLIGHT // 1024}")
    return Entry(_row(kernel, on, plans[0], min(flights), act=""), broken, stages)


def _row(kernel: NativeKernel, on: Device, plan: cuda_predict.Plan, bytes_in_flight: int, act: str = "gelu") -> Row:
    loop = flow.main_loop(kernel.code)
    record = CompiledKernel(
        backend="cuda",
        name=kernel.name,
        dtype=kernel.dtype,
        target=on.target,
        threads=plan["threads"],
        shared_bytes=plan["shared_bytes"],
        K=kernel.kernel_size or 0,
        act=act,
        block_h=plan["segment_rows"],
        block_w=plan["strips"] * plan["strip"],
        block_d=plan["chunks"] * cuda_predict.CHUNK,
    )
    return Row(
        record,
        kernel.registers,
        kernel.stack_bytes + kernel.spills,
        kernel.main_loop_widths("LDG") + kernel.main_loop_widths("LDGSTS"),
        kernel.main_loop_widths("STG"),
        kernel.multiply_adds_per_output,
        sum(line.name == "BAR" and line.address in loop for line in kernel.code),
        on.resident_blocks(kernel.registers, plan["threads"], plan["shared_bytes"]),
        bytes_in_flight,
    )
