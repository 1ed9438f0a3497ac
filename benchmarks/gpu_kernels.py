"""Which kernels a contender's time is made of, by PyTorch's profiler: microseconds of one run, by name."""

from typing import Any

import torch

from mambaout_kernels.benchmarking.timing import Contender

RUNS = 3  # that are watched, after as many that are not
NAME = 90  # characters


def profile(contender: Contender) -> dict[str, Any]:
    """Of one run: microseconds of kernels in all, and of each (microseconds, launches, name), the longest first."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with contender.context():
        for _ in range(RUNS):
            contender.run(contender.prepare())
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=activities) as profiler:
            for _ in range(RUNS):
                contender.run(contender.prepare())
            torch.cuda.synchronize()
    return summed(profiler.events())


def summed(events: Any) -> dict[str, Any]:
    """Those events that are of kernels, of one run of RUNS; not the regions that compilers mark around them."""
    found: dict[str, list[float]] = {}
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith(("##", "Torch-Compiled")):
            entry = found.setdefault(event.name[:NAME], [0.0, 0])
            entry[0] += event.time_range.elapsed_us()
            entry[1] += 1
    kernels = sorted(((us / RUNS, count / RUNS, name) for name, (us, count) in found.items()), reverse=True)
    return {"total_us": sum(us for us, _, _ in kernels), "kernels": kernels}
