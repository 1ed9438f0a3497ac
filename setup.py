"""Drives CMake (CMakeLists.txt describes the build). Without a compiler the package installs as pure Python."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MODULE_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")

WARNING = """
******************************************************************************************
WARNING: mambaout_kernels is being installed without its compiled {kernels} kernels:
  {reason}
{consequence}
******************************************************************************************
"""
NO_CPU = """It works, on the PyTorch reference, which is slower. To get the kernels: a C++20 compiler
(GCC >= 11 or Clang >= 14), then
  pip install torch cmake ninja pybind11 'setuptools>=77' && pip install --no-build-isolation ."""
NO_CUDA = "CPU tensors run on the compiled kernels; CUDA tensors on Triton, or else on the PyTorch reference."


class CMakeBuild(build_ext):
    """Builds the compiled modules into the package: the source tree with --inplace, else the wheel."""

    is_pure = False  # until it turns out that nothing can be compiled

    def run(self) -> None:
        package = ROOT if self.inplace else Path(self.build_lib).resolve()
        self.destination = package / "mambaout_kernels"
        self.build = Path(self.build_temp).resolve()
        if self.editable_mode:  # setuptools would throw the tree away, and compile all of it again next time
            self.build = ROOT / "build" / f"temp.{self.plat_name}-{sys.implementation.cache_tag}"
        self.is_pure = not self._attempt("CPU", NO_CPU, "_C*", self._configure, self._build_cpu)
        if not self.is_pure:
            self._attempt("CUDA", NO_CUDA, "_C_cuda*", self._build_all)

    def _attempt(self, kernels: str, consequence: str, modules: str, *steps) -> bool:
        try:
            for step in steps:
                step()
        except FileNotFoundError as error:
            reason = f"{error.filename} is not installed"
        except ImportError as error:
            reason = f"{error.name or error} is not installed"
        except OSError as error:
            reason = str(error)
        except subprocess.CalledProcessError as error:
            reason = f"`{error.cmd[0]} {error.cmd[1]} ...` failed: its output is above (under pip, with pip install -v)"
        else:
            return True
        # A module of an earlier build must not pass for this one's.
        for module in self.destination.glob(modules + MODULE_SUFFIX):
            module.unlink()
        print(WARNING.format(kernels=kernels, reason=reason, consequence=consequence), file=sys.stderr, flush=True)
        return False

    def _configure(self) -> None:
        import pybind11
        import torch  # noqa: F401  (its headers are needed; a clear reason if it is missing)

        arguments = [
            "-S", str(ROOT), "-B", str(self.build), "-G", "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]  # fmt: skip
        # CMake's cache remembers paths of the environment it ran in, which may be gone: never reuse another's.
        configured_with = self.build / "configured_with.txt"
        if not configured_with.exists() or configured_with.read_text() != "\n".join(arguments):
            shutil.rmtree(self.build, ignore_errors=True)
            self.build.mkdir(parents=True)
        self._cmake(*arguments)
        configured_with.write_text("\n".join(arguments))

    def _build_cpu(self) -> None:
        self._cmake("--build", self.build, "--target", "_C")
        self._cmake("--install", self.build, "--prefix", self.destination, "--component", "cpu")

    def _build_all(self) -> None:
        self._cmake("--build", self.build)
        self._cmake("--install", self.build, "--prefix", self.destination)

    def _cmake(self, *arguments) -> None:
        path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
        subprocess.run(["cmake", *arguments], check=True, env={**os.environ, "PATH": path})

    def get_outputs(self) -> list[str]:
        return []  # CMake installs; setuptools has nothing to list, copy or link

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Wheel(bdist_wheel):
    """Built away from the tree: nothing stays in it, and nothing of an earlier build gets into the wheel."""

    def run(self) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            self.reinitialize_command("build", reinit_subcommands=True).build_base = scratch
            self.reinitialize_command("egg_info").egg_base = scratch
            self.bdist_dir = os.path.join(scratch, "wheel")
            super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """Without compiled modules py3-none-any: it must not pass for a wheel that has them."""
        return ("py3", "none", "any") if self.get_finalized_command("build_ext").is_pure else super().get_tag()


setup(
    ext_modules=[Extension("mambaout_kernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
)
