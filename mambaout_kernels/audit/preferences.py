"""Which GPU backend is predicted to be faster, by architecture, type, alignment, direction and size: the table that
backends/preferences.json ships.

    python -m mambaout_kernels.audit.preferences > mambaout_kernels/backends/preferences.json

Needs the compiled CUDA module and cuobjdump. Times are predictions from datasheets, plus LAUNCH_US for each launch;
where there are measured ones (MEASURED), these.
"""

import json
import math
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from ..backends.triton_kernels import tiles
from . import cuda, cuda_entries, report, triton
from .devices import devices
from .report import Entry

LAUNCH_US = 3.0  # an assumption: what one launch adds when kernels follow each other
SMALL = 2**21  # elements of y; at batch 1 no stage of the family has more
MARGIN = 0.95  # below this share of Triton's time, CUDA C++ is taken; else Triton, which needs no compiler at install
VARIANTS = {True: "mambaout_tiny", False: "mambaout_base"}  # by whether shapes are aligned
# Microseconds by stage (minima, cold L2) on an H100, by (target, bits, aligned, backward, batch): benchmarks/measured/.
# Batch 1 as CUDA graphs, as is the backward of CUDA C++ at batch 128, which is the split one.
MEASURED: dict[tuple[str, int, bool, bool, int], dict[str, tuple[float, ...]]] = {
    ("sm_90", 16, True, False, 1): {"triton": (19.6, 19.0, 19.1, 19.1), "cuda": (17.2, 16.8, 17.2, 16.6)},
    ("sm_90", 16, True, True, 1): {"triton": (50.0, 43.7, 41.5, 40.5), "cuda": (31.7, 26.7, 26.5, 24.6)},
    ("sm_90", 16, True, False, 128): {"triton": (655, 361, 227, 142), "cuda": (333, 170, 88.2, 49.1)},
    ("sm_90", 16, True, True, 128): {"triton": (1125, 678, 516, 686), "cuda": (696, 361, 192, 99.7)},
    ("sm_90", 16, False, False, 128): {"triton": (909, 357, 272), "cuda": (1688, 839, 432)},
    ("sm_90", 16, False, True, 128): {"triton": (1860, 963, 595), "cuda": (3322, 1642, 841)},
    ("sm_90", 32, True, False, 128): {"triton": (675, 380, 229, 144), "cuda": (593, 293, 137, 66.1)},
    ("sm_90", 32, True, True, 128): {"triton": (1390, 1070, 668, 566), "cuda": (1122, 563, 288, 132)},
}
_BACKWARD = ("gate_backward", "input_gradient", "weight_gradient")
_SPLIT_LAUNCHES = 5
_LAUNCHES = {("triton", False): 2, ("triton", True): 5, ("cuda", False): 1, ("cuda", True): 2}


def triton_entries(target: str, dtype: str, aligned: bool, batch: int) -> dict[str, Entry]:
    """By kernel, for those stages of the variant that are aligned, or those that are not."""
    found = {}
    for name in tiles.KERNELS:
        tile = tiles.choose(target, name, triton.DTYPES[dtype][1], 56, 7, aligned)
        compiled = triton.compile_ahead(triton.Configuration(name, target, dtype, tile, aligned=aligned))
        found[name] = report.entry(compiled, VARIANTS[aligned], batch, tile.programs)
    return found


def _geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def compare(
    of_triton: dict[str, Entry],
    of_cuda: Entry,
    backward: bool,
    measured: dict[str, tuple[float, ...]] | None = None,
) -> tuple[float, float, dict[str, float]]:
    """(Triton's microseconds, CUDA's, their shares of the DRAM roofline): geometric means over the same stages.

    measured: microseconds by stage, instead of those predicted.
    """
    names = _BACKWARD if backward else ("forward",)
    labels = [stage.label for stage in of_triton["forward"].stages]
    theirs = {stage.label: stage for stage in of_cuda.stages}
    times: dict[str, list[float]] = {"triton": [], "cuda": []}
    shares: dict[str, list[float]] = {"triton": [], "cuda": []}
    for index, label in enumerate(labels):
        ours = sum(of_triton[name].stages[index].prediction.microseconds for name in names)
        for backend, predicted in (("triton", ours), ("cuda", theirs[label].prediction.microseconds)):
            if measured is not None:
                predicted = measured[backend][index]
            launches = 0 if measured is not None else _LAUNCHES[backend, backward]
            times[backend].append(predicted + LAUNCH_US * launches)
            shares[backend].append(theirs[label].prediction.floor / predicted)
    means = {backend: _geometric_mean(values) for backend, values in shares.items()}
    return _geometric_mean(times["triton"]), _geometric_mean(times["cuda"]), means


def rows_of(
    module: Path, target: str, dtype: str, aligned: bool, batch: int, most: int | None
) -> Iterator[dict[str, Any]]:
    """Forward's and backward's row of preferences.json."""
    ours = triton_entries(target, dtype, aligned, batch)
    theirs = cuda_entries.entries(module, [target], [dtype], [7], VARIANTS[aligned], batch)
    for backward in (False, True):
        entry = next(e for e in theirs if e.row.kernel.name == ("backward" if backward else "forward"))
        measured = MEASURED.get((target, triton.DTYPES[dtype][1], aligned, backward, batch))
        how = "" if measured is None else ", measured"
        triton_us, cuda_us, shares = compare(ours, entry, backward, measured)
        split = measured is not None and backward and aligned and batch > 1  # what is predicted is the one kernel
        yield {
            "arch": target,
            "bits": triton.DTYPES[dtype][1],
            "aligned": aligned,
            "backward": backward,
            "max_elements": most,
            "backend": "cuda" if cuda_us < MARGIN * triton_us else "triton",
            "triton_us": round(triton_us, 1),
            "cuda_us": round(cuda_us, 1),
            "reason": f"batch {batch}{how}: Triton at {shares['triton']:.0%} of the DRAM roofline in "
            f"{_LAUNCHES['triton', backward]} launches, CUDA C++ at {shares['cuda']:.0%} in "
            f"{_SPLIT_LAUNCHES if split else _LAUNCHES['cuda', backward]}",
        }


def table(module: Path, targets: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Rows of preferences.json, small sizes first. float16 is as bfloat16."""
    there = cuda.targets(module)
    for target, dtype, aligned in product(targets, ("bfloat16", "float32"), (True, False)):
        if cuda_entries.code_target(there, target) is not None:
            for batch, most in ((1, SMALL), (128, None)):
                yield from rows_of(module, target, dtype, aligned, batch, most)


def main() -> None:
    module = cuda.module_path()
    if module is None:
        raise SystemExit("the compiled CUDA module is not here: it needs nvcc at installation")
    rows = list(table(module, tuple(d.target for d in devices())))
    print("[\n" + ",\n".join("  " + json.dumps(row) for row in rows) + "\n]")


if __name__ == "__main__":
    main()
