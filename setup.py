"""Drives CMake (CMakeLists.txt describes the build). Without a compiler the package installs as pure Python."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

PURE_PYTHON_WARNING = """
******************************************************************************************
WARNING: mambaout_kernels is being installed without its compiled CPU kernels:
  {reason}
It works, on the PyTorch reference, which is slower. To get the kernels: a C++20 compiler
(GCC >= 11 or Clang >= 14), then
  pip install torch cmake ninja pybind11 && pip install --no-build-isolation .
******************************************************************************************
"""


class CMakeBuild(build_ext):
    """Builds the compiled modules into the package: the source tree with --inplace, else the wheel."""

    def run(self) -> None:
        destination = Path(self.build_lib) / "mambaout_kernels"
        if self.inplace:
            destination = ROOT / "mambaout_kernels"
        try:
            self._cmake(destination.resolve(), Path(self.build_temp).resolve())
        except (OSError, ImportError, subprocess.CalledProcessError) as error:
            print(PURE_PYTHON_WARNING.format(reason=error), file=sys.stderr, flush=True)

    def _cmake(self, destination: Path, build: Path) -> None:
        import pybind11
        import torch  # noqa: F401  (its headers are needed; a clear reason if it is missing)

        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_INSTALL_PREFIX={destination}",
        ]  # fmt: skip
        environment = {**os.environ, "PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])}
        for command in (configure, ["cmake", "--build", str(build)], ["cmake", "--install", str(build)]):
            subprocess.run(command, check=True, env=environment)

    def get_outputs(self) -> list[str]:
        return []  # CMake installs; setuptools has nothing to list, copy or link

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(ext_modules=[Extension("mambaout_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
