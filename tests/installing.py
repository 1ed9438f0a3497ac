"""Builds and installations in places of their own: for tests of what a user gets."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WITHOUT_NVCC = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if not Path(p, "nvcc").exists())


def run(*command, cwd, **environment) -> str:
    """What it prints. Without nvcc: the CUDA kernels take minutes more."""
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**os.environ, "PATH": WITHOUT_NVCC, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def copy_sources(folder: Path) -> None:
    """The files that git has, as they are now."""
    for name in run("git", "ls-files", cwd=ROOT).splitlines():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())


def create_environment(folder: Path) -> tuple[Path, Path]:
    """Python and site-packages of an environment that sees this one's packages, torch among them, but not its scripts.

    Nor this one's mambaout_kernels: an editable installation is found through a file that is not read there.
    """
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    (packages / "of_the_tests.pth").write_text(sysconfig.get_path("purelib"))
    return python, packages


def install(wheel: Path, packages: Path) -> None:
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", packages, wheel, cwd=packages)
