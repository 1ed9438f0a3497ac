"""What a training step or an inference needs in memory, beyond parameters, their gradients and the input."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..inference import InferenceModel
from . import workloads
from .workloads import Cell, Problem

# glibc keeps freed memory for itself; with this in a process's environment, tensors go back to the system at once, so
# that its resident size is what is in use.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def measure(cell: Cell, name: str) -> tuple[int, int | None]:
    """(bytes kept between forward and backward, peak bytes) of one contender's training step; in mode "fwd" (bytes of
    the frozen copy's weights, peak bytes) of its inference.

    Each parameter's gradient is dropped as soon as it is there, so the peak is of activations and their gradients, with
    what the operations themselves allocate on the way.
    """
    posed = workloads.problem(cell, full_channel=name == "naive")
    if name == "fused":
        posed = workloads.optimized(cell, posed)
    leaves = list(posed.leaves.values())
    with workloads.running(cell, name):
        if cell.mode == "fwd":
            for _ in range(2):
                posed.forward()
            peak = peak_bytes(posed.forward, cell.device)
            frozen = posed.module
            return frozen.weight_bytes() if isinstance(frozen, InferenceModel) else 0, peak
        dy = workloads.gradient_of(posed.forward())
        handles = [leaf.register_post_accumulate_grad_hook(_drop_gradient) for leaf in leaves]

        def step() -> None:
            posed.forward().backward(dy)

        for _ in range(2):  # what is allocated once, is allocated now
            step()
        peak = peak_bytes(step, cell.device)
        for handle in handles:
            handle.remove()
        return kept_bytes(posed), peak


def _drop_gradient(leaf: Tensor) -> None:
    leaf.grad = None


def kept_bytes(posed: Problem) -> int:
    """Bytes of the distinct storages that autograd holds between forward and backward, the leaves' own not counted."""
    own = {leaf.untyped_storage().data_ptr() for leaf in posed.leaves.values()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = posed.forward()  # while y lives, so does all that is saved: no address is given out twice
    total = sum(kept.values())
    del y
    return total


def peak_bytes(step: Callable[[], object], device: str = "cpu") -> int | None:
    """How far memory in use rises during a step above where it was before; None where the system does not tell.

    On a CPU: the resident size of the process, which must have been started with ENVIRONMENT.
    """
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # peak := present
        before = _status_bytes("VmRSS")
        step()
        return max(0, _status_bytes("VmHWM") - before)  # the kernel counts in batches of pages
    except (OSError, StopIteration):
        return None


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))
