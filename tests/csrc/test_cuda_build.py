"""The compiled CUDA module: gates on its machine code, what it is built for, and that it loads without a GPU."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from processes import python

from mambaout_kernels import backends
from mambaout_kernels.audit import cuda as audit
from mambaout_kernels.audit import cuda_entries, cuda_predict
from mambaout_kernels.audit.devices import devices
from mambaout_kernels.audit.roofline import Shape
from mambaout_kernels.backends import cuda

ROOT = Path(__file__).resolve().parents[2]
MODULE = audit.module_path()

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


def running(compiled):
    """The GPUs with a datasheet that run this target's machine code."""
    targets = audit.targets(MODULE)
    found = [d for d in devices() if cuda_entries.code_target(targets, d.target) == compiled[0].target]
    return found or pytest.skip(f"no datasheet for {compiled[0].target}")


# Of the DRAM roofline, less is predicted than asked for: 8 TB/s for 128 multiply-adds per cycle (benchmarks/NOTES.md).
BELOW = {("sm_100", "bfloat16"), ("sm_100", "float16")}


def test_gates_of_the_family(compiled):
    """At the stages of mambaout_tiny, batch 128: bytes moved and on their way, and the predicted time."""
    for device in running(compiled):
        for dtype in cuda_entries.DTYPES:
            for backward in (False, True):
                entry = cuda_entries.entry(compiled, device, 7, dtype, backward)
                below = [f for f in entry.failures if "of the DRAM roofline" in f]
                assert [f for f in entry.failures if f not in below] == []
                assert bool(below) == (not backward and (device.target, dtype) in BELOW), (device.name, dtype, below)
                if device.target == "sm_90" or not backward:
                    assert entry.row.bytes_in_flight >= 40_000


def test_what_is_executed_is_what_the_op_takes(compiled):
    """Of the longest way through the main loop: the filter's multiply-adds, and the gates' exponentials."""
    for kernel in compiled:
        if kernel.kernel_size != 7 or not kernel.aligned:
            continue
        backward = kernel.name == "backward"
        work = cuda_predict.work(kernel.code, backward)
        made = sum(n * (2 if o.startswith("FFMA2") else 1) for o, n in work.conv.items() if o.startswith("FFMA"))
        taps = (3 if backward else 1) * 49 * kernel.strip * kernel.lanes
        assert taps <= made <= 1.02 * taps
        exponentials = sum(n for o, n in work.packet.items() if o.startswith("MUFU.EX2"))
        channels = 4 if kernel.dtype == "float32" else 8
        assert exponentials == (2 if backward else 1) * channels
        if backward:
            assert sum(n for o, n in work.halo.items() if o.startswith("MUFU.EX2")) == 2
        assert 0 < sum(work.step.values()) < 150
        assert 0 < sum(work.parameter.values()) < 10


@needs_module
def test_every_instruction_is_counted():
    """One tile of one image to a block: how often each part is executed."""
    work = cuda_predict.Work(*(Counter({name: 1}) for name in ("step", "row", "conv", "gate", "packet", "halo",
                                                               "image", "launch", "parameter")))  # fmt: skip
    shape = Shape(N=400, H=7, W=7, D=64, C=32)
    plan = cuda_entries.plan_of(shape, 7, 2, devices()[2], backward=False)
    assert (plan["blocks"], plan["strips"], plan["chunks"], plan["segments"], plan["threads"]) == (400, 1, 1, 1, 32)
    found = cuda_predict.total(work, plan, shape, 7, channels_per_packet=8, lanes=1)
    # 7 pixels of 4 packets are 28: one warp
    of_one = {"step": 10, "row": 7, "conv": 7, "gate": 7, "packet": 7, "halo": 7 * 7, "image": 1, "launch": 1,
              "parameter": 49}  # fmt: skip
    assert found == {name: 400 * times for name, times in of_one.items()}


@pytest.mark.parametrize(
    ("architectures", "capability", "expected"),
    [
        ("80-real 90-real", (8, 0), True),
        ("80-real 90-real", (8, 9), True),
        ("80-real 90-real", (10, 0), False),
        ("86-real", (8, 0), False),
        ("80-real 90", (12, 0), True),
        ("90a-real", (9, 0), True),
        ("90a", (10, 0), False),
        ("100f-real", (10, 3), True),
        ("100f-real", (12, 0), False),
        ("120", (9, 0), False),
    ],
)
def test_which_gpus_a_build_is_for(architectures, capability, expected):
    assert cuda.has_code_for(architectures, capability) is expected


@needs_module
@needs_cuobjdump
def test_the_kernels_are_in_the_audits_table(capsys):
    from mambaout_kernels.cli import main

    pytest.importorskip("triton")
    arguments = ["audit", "--backend", "cuda", "--target", TARGETS[0], "--dtype", "float32"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "cuda forward" in shown
    assert "cuda backward" in shown
    assert main([*arguments, "--kernel", "forward", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["backend"], row["kernel"], row["spills"]) for row in rows] == [("cuda", "forward", 0)]
    assert len(rows[0]["stages"]) == 4


@needs_module
def test_too_many_pixels_are_refused():
    """By supported(), which the op asks before it does anything; what it takes is right (test_cuda_host.py)."""
    from mambaout_kernels import _C_cuda

    most = 2**31 - 1024
    for sizes in ((most, 1, 1, 8, 8, 7), (1, most, 1, 8, 8, 7), (1, 1, most // 8, 8, 8, 7)):
        assert _C_cuda.launch_plans(sizes, 2, 132, 9)["forward"]["blocks"] > 0
    for sizes in ((most + 1, 1, 1, 8, 8, 7), (1, 1, 2**28, 8, 8, 7), (1, 1, 1, 2**20 + 1, 8, 7)):
        with pytest.raises(ValueError, match="beyond what the kernels take"):
            _C_cuda.launch_plans(sizes, 2, 132, 9)


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
@pytest.mark.nightly
def test_the_gates_see_spills(tmp_path):
    kernel = compile_kernels(tmp_path, "kLanes == 1 ? 3 : 4", "kLanes == 1 ? 5 : 4")["forward K=7 bfloat16 aligned"]
    assert kernel.spills > 0
    assert any("spills" in failure for failure in kernel.failures())


@needs_nvcc
@needs_cuobjdump
@pytest.mark.nightly
def test_the_gates_see_narrow_accesses_and_lost_multiply_adds(tmp_path):
    kernel = compile_kernels(tmp_path)["forward K=7 bfloat16 unaligned"]
    seen = {**vars(kernel), "aligned": True, "multiply_adds": kernel.multiply_adds * 2}
    failures = " ".join(audit.NativeKernel(**seen).failures())
    for expected in ("copies narrower", "are loaded less than", "are stored less than", "multiply-adds per output"):
        assert expected in failures


def run_cmake(*arguments, path=None, **environment):
    path = os.pathsep.join([os.path.dirname(sys.executable), path or os.environ["PATH"]])
    if shutil.which("cmake", path=path) is None or shutil.which("ninja", path=path) is None:
        pytest.skip("no cmake or no ninja")
    environment = {**os.environ, "PATH": path, **environment}
    return subprocess.run(["cmake", *arguments], env=environment, capture_output=True, text=True)


def configure(folder, path=None, cuda="ON", **environment):
    """What CMake says, run with this PATH."""
    pybind11 = pytest.importorskip("pybind11")
    return run_cmake(
        "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DMAMBAOUT_CUDA={cuda}",
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        path=path, **environment,
    )  # fmt: skip


@pytest.mark.nightly
def test_without_nvcc_the_module_is_left_out(tmp_path):
    path = os.pathsep.join(p for p in ("/usr/bin", "/bin") if os.path.isdir(p))
    if shutil.which("nvcc", path=path) or "CUDACXX" in os.environ or shutil.which("c++", path=path) is None:
        pytest.skip("nvcc is among the system's programs, or no compiler is")
    done = configure(tmp_path / "auto", path, cuda="AUTO")
    assert done.returncode == 0, done.stderr
    targets = (tmp_path / "auto" / "build.ninja").read_text()
    assert "build _C." in targets
    assert "_C_cuda" not in targets
    assert "MAMBAOUT_CUDA=ON, but no CUDA compiler was found" in configure(tmp_path / "auto", path).stderr


@needs_nvcc
@pytest.mark.nightly
def test_nvcc_is_told_the_architectures(tmp_path):
    done = configure(tmp_path, TORCH_CUDA_ARCH_LIST="8.6 9.0+PTX")
    assert done.returncode == 0, done.stderr
    found = re.findall(r"code=\[([^\]]+)\]", (tmp_path / "build.ninja").read_text())
    assert {code for codes in found for code in codes.split(",")} == {"compute_90", "sm_86", "sm_90"}


def architectures(folder, wanted):
    """What CMake makes of TORCH_CUDA_ARCH_LIST."""
    script = folder / "script.cmake"
    script.write_text(f'include("{ROOT}/csrc/cuda/architectures.cmake")\nmessage("[${{ARCHITECTURES}}]")\n')
    return " ".join(run_cmake("-P", script, TORCH_CUDA_ARCH_LIST=wanted).stderr.split())


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("8.6 9.0+PTX", "[86-real;90]"),
        ("8.0;9.0a,12.0f+PTX", "[80-real;90a-real;120f]"),
        ("9.0", "[90-real]"),
        ("", "[]"),
    ],
)
def test_the_list_of_architectures_is_honoured(wanted, expected, tmp_path):
    assert architectures(tmp_path, wanted) == expected


def test_what_the_kernels_do_not_run_on_is_left_out(tmp_path):
    said = architectures(tmp_path, "7.5 8.0")
    assert "7.5 is left out: the kernels need compute capability 8.0" in said
    assert said.endswith("[80-real]")


def test_a_bad_list_of_architectures_is_an_error(tmp_path):
    assert "entries must look like 9.0, 9.0a or 9.0+PTX; got 'Hopper'" in architectures(tmp_path, "8.0 Hopper")


LOADS = """
import torch
from mambaout_kernels import _C_cuda
print(_C_cuda.build_info()["architectures"])
try:
    u, weight, bias = torch.ones(1, 1, 1, 8), torch.ones(2, 1, 3, 3), torch.ones(2)
    torch.ops.mambaout_kernels.gated_dwconv_cuda(u, weight, bias, 0)
except NotImplementedError as error:
    print("refused:", error)
"""


@needs_module
def test_it_loads_without_a_gpu_and_refuses_cpu_tensors():
    done = subprocess.run([python(), "-c", LOADS], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "refused: Could not run 'mambaout_kernels::gated_dwconv_cuda'" in done.stdout
    assert "'CPU' backend" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_backend_says_so():
    assert cuda.unavailable() == "torch sees no CUDA device"
    expected = "backend 'cuda' cannot be used here: torch sees no CUDA device"
    with pytest.raises(RuntimeError, match=expected), backends.force("cuda"):
        pass
