"""The depthwise kernel in the compiled CUDA module: gates on its machine code, launches, what is predicted of them."""

import itertools
import json
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from mambaout_kernels.audit import cuda as audit
from mambaout_kernels.audit import cuda_depthwise, cuda_entries
from mambaout_kernels.audit.cuda_depthwise import Shape, Work
from mambaout_kernels.audit.devices import devices

ROOT = Path(__file__).resolve().parents[2]
MODULE = audit.module_path()

needs_module = pytest.mark.skipif(MODULE is None, reason="the CUDA module is not built: no nvcc")
needs_cuobjdump = pytest.mark.skipif(audit.disassembler() is None, reason="no cuobjdump")

TARGETS = audit.targets(MODULE) if MODULE and audit.disassembler() else ["every target"]
SIZES = ("float32", "bfloat16", "float16")


@pytest.fixture(scope="module", params=TARGETS)
def compiled(request):
    if MODULE is None or audit.disassembler() is None:
        pytest.skip("the CUDA module is not built: no nvcc" if MODULE is None else "no cuobjdump")
    return audit.depthwise_kernels(MODULE, request.param)


def launched(compiled):
    """What a launch takes on this target."""
    lanes = 2 if compiled[0].target == "sm_100" else 1
    return [kernel for kernel in compiled if kernel.lanes == lanes]


def test_every_kernel_passes_its_gates(compiled):
    """Both kinds are compiled for all targets, for what PTX may be run on; only those of `launched` have to be good."""
    assert {(k.dtype, k.lanes, k.kernel_size) for k in compiled} == set(itertools.product(SIZES, (1, 2), (7,)))
    failures = {kernel.label: kernel.failures() for kernel in launched(compiled)}
    assert not {label: found for label, found in failures.items() if found}


def test_four_blocks_are_resident(compiled):
    for kernel in launched(compiled):
        threads, most = (128, 128) if kernel.lanes == 1 else (64, 255)
        assert kernel.registers <= most
        assert 4 * threads * kernel.registers <= 64 * 1024


def test_what_is_executed_is_what_the_convolution_takes(compiled):
    """Of a row of a strip: the filter's multiply-adds, and not much besides."""
    for kernel in launched(compiled):
        work = cuda_depthwise.work(kernel.code)
        made = sum(n * (2 if o.startswith("FFMA2") else 1) for o, n in work.conv.items() if o.startswith("FFMA"))
        assert made == 49 * kernel.strip * kernel.lanes
        assert sum(n for o, n in work.output.items() if o.startswith("STS")) == kernel.strip
        assert made / kernel.lanes >= 0.6 * work.row
        assert 0 < sum(work.parameter.values()) < 10


def test_gates_of_the_family(compiled):
    """At the stages of mambaout_tiny, batch 128: bytes on their way, and bytes moved."""
    found = [d for d in devices() if cuda_entries.code_target(audit.targets(MODULE), d.target) == compiled[0].target]
    for device, dtype in itertools.product(found, SIZES):
        entry = cuda_entries.depthwise_entry(compiled, device, dtype)
        assert entry.failures == []
        assert len(entry.stages) == 4
        assert entry.row.resident_blocks >= (4 if device.shared_kib > 100 else 2)
        assert entry.row.bytes_in_flight >= 40 * 1024
        for stage in entry.stages:
            assert stage.prediction.bound_by in ("DRAM", "issue", "FMA")
            assert stage.l2_bytes_per_pixel <= 1.15 * stage.bytes_per_pixel


def test_every_instruction_is_counted():
    """Two images, of which a block takes one: how often each part is executed."""
    work = Work(*(Counter({name: 1}) for name in ("step", "conv", "output", "image", "launch", "parameter")))
    assert work.row == 3
    plan = {"w_tiles": 1, "chunk_groups": 3, "threads": 96, "blocks": 6, "chunks": 3, "segments": 1, "segment_rows": 5,
            "strip": 7, "strips": 1}  # fmt: skip
    found = cuda_depthwise.total(work, plan, Shape(2, 5, 7, 256), lanes=1)
    expected = {"step": 2 * 5 * 9, "conv": 2 * 5 * 8, "output": 2 * 5 * 8, "image": 2 * 9, "launch": 6 * 3,
                "parameter": 6 * 3 * 49}  # fmt: skip
    assert found == expected
    segments = {**plan, "segments": 2, "segment_rows": 3}  # rows 0 to 4 of 0 to 2, 0 to 4 of 3 to 4
    assert cuda_depthwise.total(work, segments, Shape(2, 5, 7, 256), lanes=1)["step"] == 2 * (5 + 5) * 9


@needs_module
def test_every_launch_fits_the_smallest_gpu():
    """99 KiB of shared memory to a block, as on sm_86 and sm_120; and the threads that the kernel is compiled for."""
    from mambaout_kernels import _C_cuda

    for W, C, batch in itertools.product((1, 3, 7, 8, 15, 28, 57), (8, 40, 96, 576), (1, 9, 128)):
        for major, element_bytes in itertools.product((8, 10), (2, 4)):
            plan = _C_cuda.depthwise_plan((batch, 5, W, C), element_bytes, 132, major)
            assert 0 < plan["shared_bytes"] <= 99 * 1024
            assert 16 <= plan["threads"] <= (64 if major == 10 else 128)
            assert plan["threads"] % 32 == 0
            assert plan["blocks"] > 0


@needs_module
def test_small_images_share_a_block_and_large_ones_do_not():
    from mambaout_kernels import _C_cuda

    taken = [_C_cuda.depthwise_plan(s, 2, 132, 9)["images_per_block"] for s in ((128, 7, 7, 576), (128, 56, 56, 96))]
    assert taken[0] > 1
    assert taken[1] == 1
    assert _C_cuda.depthwise_plan((1, 56, 56, 96), 2, 132, 9)["segments"] > 1


@needs_module
def test_too_large_sizes_are_refused():
    from mambaout_kernels import _C_cuda

    for sizes in ((2**31, 1, 1, 8), (1, 1, 2**28, 8), (1, 1, 1, 2**20 + 8)):
        with pytest.raises(ValueError, match="beyond what the kernels take"):
            _C_cuda.depthwise_plan(sizes, 2, 132, 9)


@needs_module
@needs_cuobjdump
def test_the_kernel_is_in_the_audits_table(capsys):
    from mambaout_kernels.cli import main

    pytest.importorskip("triton")
    arguments = ["audit", "--backend", "cuda", "--target", TARGETS[0], "--kernel", "depthwise", "--json"]
    assert main(arguments) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["kernel"], row["dtype"], row["spills"]) for row in rows] == [("depthwise", d, 0) for d in SIZES]
    assert all(len(row["stages"]) == 4 for row in rows)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@needs_cuobjdump
@pytest.mark.nightly
def test_the_gates_see_spills(tmp_path):
    """Five blocks would have 96 registers to a thread."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    header = tmp_path / "csrc" / "cuda" / "depthwise.cuh"
    assert "kMinBlocks = 4;" in header.read_text()
    header.write_text(header.read_text().replace("kMinBlocks = 4;", "kMinBlocks = 5;"))
    cubin = tmp_path / "depthwise.cubin"
    command = ["nvcc", "-std=c++17", "-arch=sm_90", "-DMAMBAOUT_DTYPE=kBFloat16", "-cubin"]
    subprocess.run([*command, str(header.with_suffix(".cu")), "-o", str(cubin)], check=True)
    kernel = next(kernel for kernel in audit.depthwise_kernels(cubin, "sm_90") if kernel.lanes == 1)
    assert kernel.spills > 0
    assert any("spills" in failure for failure in kernel.failures())
