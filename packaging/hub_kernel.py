"""Lays out the package as a kernel of the Hugging Face hub, for `kernels.get_local_kernel` or to be uploaded.

    python packaging/hub_kernel.py OUT [WHEEL ...]

OUT/build/torch-cpu, torch-cuda and torch-rocm hold Python alone: Triton kernels, and the PyTorch reference on CPUs.
Wheels with compiled CPU kernels, of one or more Pythons, make OUT/build/torch-stable-abi210-cpu-x86_64-linux, say,
which `kernels` prefers to torch-cpu. build.toml has the name and the version. Needs Python 3.11.
"""

import argparse
import base64
import hashlib
import json
import re
import shutil
import sys
import zipfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import tomllib

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parent / "mambaout_kernels"
BUILD = tomllib.loads((HERE / "build.toml").read_text(encoding="utf-8"))
# What the package's __init__ imports. A kernel has no command line, no benchmarks, no audit.
PARTS = (
    "__init__.py", "interrupt.py", "layers.py", "reference.py", "version.py",
    "backends", "ops", "nn", "models", "weights", "integrations", "inference",
)  # fmt: skip
STABLE_ABI = "torch-stable-abi210"  # TORCH_TARGET_VERSION in CMakeLists.txt
MACHINES = {"x86_64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}  # in a wheel's name, in a variant's


def write_variant(folder: Path, backend: str, modules: Mapping[str, bytes]) -> None:
    """A build variant: the package's parts, compiled modules by file name, and metadata.json."""
    general, suffixes = BUILD["general"], [f".{extension}" for extension in BUILD["torch-noarch"]["pyext"]]
    for source in PACKAGE.rglob("*"):
        place = source.relative_to(PACKAGE)
        if place.parts[0] in PARTS and source.suffix in suffixes:
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / place)
    for name, content in modules.items():
        (folder / name).write_bytes(content)
    digests = {
        path.relative_to(folder).as_posix(): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    # The id is the name of the module, and so the namespace of its ops: another for each content.
    unique = hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:12]
    metadata = {
        "name": general["name"],
        "id": f"_{general['name'].replace('-', '_')}_{backend}_{unique}",
        "version": general["version"],
        "license": general["license"],
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def modules_of(wheel: Path) -> dict[str, bytes]:
    """The compiled CPU kernels in a wheel, by file name. ValueError where there are none."""
    with zipfile.ZipFile(wheel) as archive:
        found = {
            name.rpartition("/")[2]: archive.read(name)
            for name in archive.namelist()
            if re.fullmatch(r"mambaout_kernels/_C\.[\w.-]+\.so", name)
        }
    if not found:
        raise ValueError(f"{wheel.name} has no compiled CPU kernels")
    return found


def platform_of(wheel: Path) -> str:
    """ "x86_64-linux" or the like, from a wheel's name. ValueError for a platform that `kernels` has no name for."""
    tag = wheel.stem.rpartition("-")[2]
    machine = next((MACHINES[name] for name in MACHINES if tag.endswith(name)), None)
    system = "linux" if "linux" in tag else "darwin" if "macosx" in tag else None
    if machine is None or system is None:
        raise ValueError(f"{wheel.name} is for none of {', '.join(MACHINES)} on Linux or macOS")
    return f"{machine}-{system}"


def write_kernel(out: Path, wheels: list[Path]) -> None:
    """OUT/build, with one variant for each backend, and one for each platform that there are wheels of."""
    compiled: defaultdict[str, dict[str, bytes]] = defaultdict(dict)
    for wheel in wheels:
        compiled[platform_of(wheel)] |= modules_of(wheel)
    build = out / "build"
    if build.exists():
        raise FileExistsError(f"{build} exists: give another folder, or remove it")
    for backend in BUILD["general"]["backends"]:
        write_variant(build / f"torch-{backend}", backend, {})
    for platform, modules in compiled.items():
        write_variant(build / f"{STABLE_ABI}-cpu-{platform}", "cpu", modules)
    shutil.copy(HERE / "build.toml", out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("wheels", type=Path, nargs="*", metavar="WHEEL")
    args = parser.parse_args()
    try:
        write_kernel(args.out, args.wheels)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        sys.exit(f"hub_kernel.py: {error}")
    for variant in sorted((args.out / "build").iterdir()):
        print(variant)


if __name__ == "__main__":
    main()
