"""info: what is installed, what can run here, and how to get the rest."""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .. import __version__, backends
from ..benchmarking import machine

_COMPILERS = ("c++", "g++", "clang++")
# optional package -> the extra that brings it, and what for
_OPTIONAL = {
    "rich": ("cli", "tables and progress bars"),
    "timm": ("cli", "class names in classify"),
    "pillow": ("cli", "reading images"),
    "safetensors": ("cli", "reading .safetensors"),
    "huggingface_hub": ("cli", "weights by name"),
    "scikit-image": ("bench", "the photographs that bench runs on"),
    "matplotlib": ("bench", "plots"),
    "onnxscript": ("export", "ONNX files"),
    "onnxruntime": ("peers", "a runtime to compare with"),
    "openvino": ("peers", "a runtime to compare with"),
}


def add_to(commands: Any) -> None:
    command = commands.add_parser("info", help="versions, backends, CPU and CUDA; how to get what is missing")
    command.add_argument("--json", action="store_true", help="as JSON on stdout")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    content = collect()
    if args.json:
        print(json.dumps(content, indent=1))
        return 0
    for title in ("versions", "backends", "cpu", "cuda", "build"):
        print(title)
        entries = content[title] or {"compiled module": "not there"}
        entries = {key: value for key, value in entries.items() if value is not None}
        width = max(map(len, entries))
        for key, value in entries.items():
            print(f"  {key.ljust(width)}  {_shown(value)}")
    if content["forced backend"]:
        print(f"{backends.ENVIRONMENT_VARIABLE} forces every call on {content['forced backend']}")
    for name, how in content["to get"].items():
        print(f"to get {name}: {how}")
    return 0


def _shown(value: Any) -> str:
    if isinstance(value, dict):  # a backend
        return "ready" if value["usable"] else f"not usable: {value['reason']}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def collect() -> dict[str, Any]:
    """What `info --json` prints."""
    status = backends.status()
    compiled = status["cpu"] is None
    to_compile = {} if compiled else {"the compiled kernels": _to_compile()}
    packages = {name: _version(name) for name in ("triton", *_OPTIONAL)}
    return {
        "versions": {
            "mambaout-kernels": __version__,
            "commit": machine.commit() or "not run from a git tree",
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: found or "not installed" for name, found in packages.items()},
        },
        "backends": {name: {"usable": reason is None, "reason": reason} for name, reason in status.items()},
        "cpu": {
            "model": machine.cpu_model(),
            "cores": len(machine.usable_cores()),
            "threads": torch.get_num_threads(),
            "isa in use": machine.isa() or "none: not compiled",
            "why not a better one": machine.isa_reason(),
            "isas supported here": _native().supported_cpu_capabilities() if compiled else "none: not compiled",
        },
        "cuda": {
            "torch built for": torch.version.cuda or "no CUDA",
            "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] or "none",
            "nvcc": _nvcc() or "not found",
            "compiled module": _cuda_module(),
        },
        "build": _native().build_info() if compiled else None,
        "forced backend": backends.forced(),
        "to get": to_compile
        | {
            name: f"pip install mambaout-kernels[{extra}], for {purpose}"
            for name, (extra, purpose) in _OPTIONAL.items()
            if packages[name] is None
        },
    }


def _to_compile() -> str:
    """What to install and run, of which only what is not here is named."""
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])  # as setup.py looks
    missing = [f"pip install {name}" for name in ("cmake", "ninja") if shutil.which(name, path=path) is None]
    if _version("pybind11") is None:
        missing.append("pip install pybind11")
    if not any(shutil.which(name, path=path) for name in _COMPILERS):
        missing.insert(0, "a C++20 compiler (GCC >= 11 or Clang >= 14; none is on the PATH)")
    return "; ".join([*missing, "from the sources, pip install -v --no-build-isolation ."])


def _native() -> Any:
    from .. import _C

    return _C


def _cuda_module() -> str:
    """What the CUDA C++ kernels were compiled for; they load without a GPU."""
    try:
        from .. import _C_cuda
    except ImportError:
        return "not there"
    built = _C_cuda.build_info()
    return f"{built['compiler']}, for compute capabilities {built['architectures']}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _nvcc() -> str | None:
    """Path and release of the CUDA compiler."""
    path = shutil.which("nvcc") or next(map(str, Path("/usr/local").glob("cuda*/bin/nvcc")), None)
    if path is None:
        return None
    try:
        output = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return f"{path} (does not run)"
    release = [line.strip() for line in output.splitlines() if "release" in line]
    return f"{path} ({release[0] if release else 'unknown release'})"
