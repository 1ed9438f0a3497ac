"""Gates that shipped kernels are known not to pass, and why: shortfalls.json. What is worse than there is a failure."""

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .record import CompiledKernel


@functools.cache
def listed() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    return found


def reason(kernel: CompiledKernel, failure: str) -> str | None:
    """Why this kernel is known not to pass this gate, by so much; None of anything else."""
    for row in listed():
        match = re.search(row["failure"], failure)
        if (
            match is not None
            and (kernel.backend, kernel.name, kernel.aligned) == (row["backend"], row["kernel"], row["aligned"])
            and kernel.target in row["targets"]
            and kernel.dtype in row["dtypes"]
            and int(match[1]) >= row["least"]
        ):
            return str(row["reason"])
    return None


def unknown(kernel: CompiledKernel, failures: Sequence[str]) -> list[str]:
    return [failure for failure in failures if reason(kernel, failure) is None]
