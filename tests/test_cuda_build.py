"""The compiled CUDA module: gates on its machine code, what it is built for, and that it loads without a GPU."""

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mambaout_kernels import backends
from mambaout_kernels.audit import cuda as audit
from mambaout_kernels.audit.devices import devices
from mambaout_kernels.backends import cuda
from mambaout_kernels.benchmarking import shapes

ROOT = Path(__file__).resolve().parent.parent
MODULE = audit.module_path()
GPU_BATCH = 128

needs_module = pytest.mark.skipif(MODULE is None, reason="the CUDA module is not built: no nvcc")
needs_cuobjdump = pytest.mark.skipif(audit.disassembler() is None, reason="no cuobjdump")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")


TARGETS = audit.targets(MODULE) if MODULE and audit.disassembler() else ["every target"]


@pytest.fixture(scope="module", params=TARGETS)
def compiled(request):
    if MODULE is None or audit.disassembler() is None:
        pytest.skip("the CUDA module is not built: no nvcc" if MODULE is None else "no cuobjdump")
    return audit.kernels(MODULE, request.param)


def test_every_kernel_passes_its_gates(compiled):
    own = {(k.name, k.dtype, k.kernel_size, k.aligned) for k in compiled if k.kernel_size}
    assert len(own) == 2 * 3 * 3 * 2
    failures = {kernel.label: kernel.failures() for kernel in compiled}
    assert not {label: found for label, found in failures.items() if found}


def test_enough_bytes_are_on_their_way(compiled):
    """At the stages of mambaout_tiny: 40 KB on each multiprocessor cover the latency of an H100's memory."""
    from mambaout_kernels import _C_cuda

    device = next((d for d in devices() if d.target == compiled[0].target), None)
    if device is None:
        pytest.skip(f"no datasheet for {compiled[0].target}")
    major = int(device.target[3:-1])
    lanes = 1 if major < 10 else 2
    for shape in shapes.stages("mambaout_tiny"):
        sizes = (GPU_BATCH, shape.height, shape.width, shape.hidden, shape.conv_channels, shape.kernel_size)
        for dtype, element_bytes in (("float32", 4), ("bfloat16", 2)):
            plan = _C_cuda.launch_plans(sizes, element_bytes, device.multiprocessors, major)["forward"]
            kernel = next(
                k for k in compiled
                if (k.name, k.dtype, k.kernel_size, k.aligned, k.lanes) == ("forward", dtype, 7, True, lanes)
            )  # fmt: skip
            blocks = device.resident_blocks(kernel.registers, plan["threads"], plan["shared_bytes"])
            assert blocks * plan["bytes_ahead"] >= 40_000, (shape.label, dtype, plan)
            assert plan["blocks"] >= device.multiprocessors


@needs_module
@pytest.mark.parametrize("K", [3, 5, 7])
def test_every_launch_fits_the_smallest_gpu(K):
    """99 KiB of shared memory to a block, as on sm_86 and sm_120; and the threads that the kernels are compiled for."""
    from mambaout_kernels import _C_cuda

    channels = ((341, 128), (256, 96), (64, 64), (8, 0))
    for W, (D, C), batch in itertools.product((1, 3, 4, 7, 8, 15, 28, 57), channels, (1, 9)):
        for major, element_bytes in itertools.product((8, 10), (2, 4)):
            for plan in _C_cuda.launch_plans((batch, 5, W, D, C, K), element_bytes, 4, major).values():
                assert 0 < plan["shared_bytes"] <= 99 * 1024
                assert 32 <= plan["threads"] <= 128
                assert plan["blocks"] > 0


@needs_module
@needs_cuobjdump
def test_there_is_ptx_of_the_newest_target():
    assert audit.ptx_targets(MODULE)[-1] == audit.targets(MODULE)[-1]


def compile_kernels(folder, right="", wrong=""):
    """The forward kernels, with `right` in forward.cuh replaced."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    header = folder / "csrc" / "cuda" / "forward.cuh"
    if right:
        assert right in header.read_text()
        header.write_text(header.read_text().replace(right, wrong))
    cubin = folder / "forward.cubin"
    command = ["nvcc", "-std=c++17", "-arch=sm_90", "-DMAMBAOUT_DTYPE=kBFloat16", "-cubin"]
    subprocess.run([*command, str(header.with_suffix(".cu")), "-o", str(cubin)], check=True)
    return {kernel.label: kernel for kernel in audit.kernels(cubin, "sm_90")}


@needs_nvcc
@needs_cuobjdump
def test_the_gates_see_spills(tmp_path):
    kernel = compile_kernels(tmp_path, "kLanes == 1 ? 3 : 2", "kLanes == 1 ? 5 : 2")["forward K=7 bfloat16 aligned"]
    assert kernel.spills > 0
    assert any("spills" in failure for failure in kernel.failures())


@needs_nvcc
@needs_cuobjdump
def test_the_gates_see_narrow_accesses_and_lost_multiply_adds(tmp_path):
    kernel = compile_kernels(tmp_path)["forward K=7 bfloat16 unaligned"]
    seen = {**vars(kernel), "aligned": True, "multiply_adds": kernel.multiply_adds * 2}
    failures = " ".join(audit.NativeKernel(**seen).failures())
    for expected in ("copies narrower", "no 16-byte loads", "are stored less than", "multiply-adds per output"):
        assert expected in failures


def architectures(folder, wanted):
    """What CMake tells nvcc to build for under this TORCH_CUDA_ARCH_LIST."""
    pybind11 = pytest.importorskip("pybind11")
    environment = {**os.environ, "TORCH_CUDA_ARCH_LIST": wanted}
    path = environment["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), environment["PATH"]])
    command = [
        "cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", "-DMAMBAOUT_CUDA=ON", f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]  # fmt: skip
    if shutil.which("cmake", path=path) is None or shutil.which("ninja", path=path) is None:
        pytest.skip("no cmake or no ninja")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        return " ".join(done.stderr.split())
    found = re.findall(r"code=\[([^\]]+)\]", (folder / "build.ninja").read_text())
    return sorted({code for codes in found for code in codes.split(",")})


@needs_nvcc
def test_the_list_of_architectures_is_honoured(tmp_path):
    assert architectures(tmp_path, "8.6 9.0+PTX") == ["compute_90", "sm_86", "sm_90"]


@needs_nvcc
def test_a_bad_list_of_architectures_is_an_error(tmp_path):
    assert "entries must look like 9.0, 9.0a or 9.0+PTX; got 'Hopper'" in architectures(tmp_path, "Hopper")


LOADS = """
import torch
from mambaout_kernels import _C_cuda
print(_C_cuda.build_info()["architectures"])
try:
    u, weight, bias = torch.ones(1, 1, 1, 8), torch.ones(2, 1, 3, 3), torch.ones(2)
    torch.ops.mambaout_kernels_native.gated_dwconv_cuda(u, weight, bias, 0)
except NotImplementedError as error:
    print("refused:", error)
"""


@needs_module
def test_it_loads_without_a_gpu_and_refuses_cpu_tensors():
    done = subprocess.run([sys.executable, "-c", LOADS], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "refused: Could not run 'mambaout_kernels_native::gated_dwconv_cuda'" in done.stdout
    assert "'CPU' backend" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_backend_says_so():
    assert cuda.unavailable() == "torch sees no CUDA device"
    expected = "backend 'cuda' cannot be used here: torch sees no CUDA device"
    with pytest.raises(RuntimeError, match=expected), backends.force("cuda"):
        pass
