"""The Triton kernels' machine code, compiled for GPUs that are not here; the parts that read it; tiles; warm-up."""

import functools
import json
import os
from collections import Counter
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import mambaout_kernels as mk
from mambaout_kernels.audit import devices, report, roofline, sass, shortfalls, table
from mambaout_kernels.audit.record import CompiledKernel
from mambaout_kernels.backends.warmup import load_tiles, warmup
from mambaout_kernels.cli import main

compiles = pytest.mark.skipif(
    find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1", reason="needs Triton's compiler"
)
if find_spec("triton") is not None:
    from mambaout_kernels.audit import triton
    from mambaout_kernels.backends.triton_kernels import tiles

KERNELS = ("forward", "gate_backward", "input_gradient", "weight_gradient")
DTYPES = ("bfloat16", "float16", "float32")


@functools.cache
def entry(target, kernel, dtype, K=7, act="gelu", aligned=True):
    bits = 32 if dtype == "float32" else 16
    tile = tiles.choose(target, kernel, bits, 56, K, aligned)
    compiled = triton.compile_ahead(triton.Configuration(kernel, target, dtype, tile, K, act, aligned))
    return report.entry(compiled, "mambaout_tiny" if aligned else "mambaout_base", programs=tile.programs)


def in_turn(*cases):
    """Those whose target, dtype and alignment each go with another in make test are for make nightly."""
    return [pytest.param(*case, marks=() if usual else pytest.mark.nightly) for case, usual in cases]


# A float16 kernel differs from that of bfloat16 by its conversions.
TARGETS_AND_DTYPES = in_turn(
    (("sm_90", "bfloat16"), True), (("sm_90", "float32"), True), (("sm_90", "float16"), False),
    (("sm_80", "bfloat16"), True), (("sm_80", "float32"), False),
    (("sm_100", "bfloat16"), True), (("sm_100", "float32"), False),
    (("sm_120", "bfloat16"), True), (("sm_120", "float32"), False),
)  # fmt: skip


@compiles
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("target", "dtype"), TARGETS_AND_DTYPES)
def test_gates(target, kernel, dtype):
    found = entry(target, kernel, dtype)
    broken = {text.partition(":")[0] for text in table.failures(found.row)}
    assert not broken, found.failures
    assert found.row.multiply_adds == 49
    assert found.row.barriers == 0


@compiles
@pytest.mark.parametrize(("target", "dtype"), TARGETS_AND_DTYPES)
def test_forward_is_predicted_at_85_percent_of_the_dram_roofline(target, dtype):
    shares = [stage.prediction.share for stage in entry(target, "forward", dtype).stages]
    assert len(shares) == 4
    assert entry(target, "forward", dtype).unknown == []
    if (target, dtype) == ("sm_100", "bfloat16"):
        assert max(shares) < table.LEAST_SHARE  # a change for the better must come to shortfalls.json, too
    else:
        assert min(shares) >= table.LEAST_SHARE


@compiles
@pytest.mark.parametrize(
    ("kernel", "K", "act"),
    [(kernel, *K_act) for kernel in KERNELS[:2] for K_act in ((3, "silu"), (5, "gelu_tanh"), (7, "identity"))]
    + [(kernel, K, "gelu") for kernel in KERNELS[2:] for K in (3, 5)],
)
def test_other_filters_and_activations_do_not_spill(kernel, K, act):
    found = entry("sm_90", kernel, "bfloat16", K, act)
    assert found.row.spills == 0
    assert found.row.multiply_adds <= table.MOST_MULTIPLY_ADDS * K * K


@compiles
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_gates_of_odd_hidden_sizes(kernel, dtype):
    found = entry("sm_90", kernel, dtype, aligned=False)
    assert found.unknown == []
    # A change for the better must come to shortfalls.json, too.
    assert bool(table.failures(found.row)) == ((kernel, dtype) == ("forward", "bfloat16")), found.failures
    assert found.row.multiply_adds == 49
    assert [stage.label for stage in found.stages][:2] == ["56x56x128", "28x28x256"]


@compiles
@pytest.mark.parametrize(
    ("kernel", "dtype", "aligned"),
    in_turn(
        *(
            ((kernel, dtype, aligned), (dtype, aligned) == (("bfloat16", True), ("float32", False))[i % 2])
            for i, kernel in enumerate(KERNELS)
            for dtype in ("bfloat16", "float32")
            for aligned in (True, False)
        )
    ),
)
def test_amd_does_not_spill(kernel, dtype, aligned):
    found = entry("gfx942", kernel, dtype, aligned=aligned).row
    assert 0 < found.registers <= 512
    assert found.spills == 0


@pytest.mark.parametrize(
    ("change", "failure", "known"),
    [
        ({}, "bytes in flight: 36 KiB of 40", True),
        ({}, "bytes in flight: 35 KiB of 40", False),
        ({}, "spills: 8", False),
        ({"aligned": True}, "bytes in flight: 36 KiB of 40", False),
        ({"name": "input_gradient"}, "bytes in flight: 36 KiB of 40", False),
        ({"backend": "cuda"}, "bytes in flight: 36 KiB of 40", False),
        ({"dtype": "float32"}, "bytes in flight: 36 KiB of 40", False),
        ({"target": "sm_80"}, "bytes in flight: 36 KiB of 40", False),
        ({"target": "sm_100", "aligned": True}, "7x7x576: 53% of the DRAM roofline, by issue", True),
        ({"target": "sm_100", "aligned": True}, "7x7x576: 52% of the DRAM roofline, by issue", False),
        ({}, "56x56x128: 65% of the DRAM roofline, by issue", True),
        ({}, "56x56x96: 65% of the DRAM roofline, by issue", False),
    ],
)
def test_only_what_is_known_is_known(change, failure, known):
    kernel = SimpleNamespace(
        **{"backend": "triton", "name": "forward", "target": "sm_90", "dtype": "bfloat16", "aligned": False, **change}
    )
    assert (shortfalls.reason(kernel, failure) is not None) == known
    assert shortfalls.unknown(kernel, [failure]) == ([] if known else [failure])


@compiles
def test_the_audit_sees_spills():
    tile = tiles.Tile(8, 64, 2, block_h=14)
    found = table.row(triton.compile_ahead(triton.Configuration("forward", "sm_90", "bfloat16", tile)))
    assert found.spills > 0
    assert any(text.startswith("spills") for text in table.failures(found))


SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @P0 BRA 0x00a0 ;
        /*0020*/                   LDG.E.128 R4, [R2.64] ;
        /*0030*/                   LDG.E.128 R8, [R2.64+0x10] ;
        /*0040*/                   FFMA R12, R4, R5, R12 ;
        /*0050*/                   FFMA R12, R8, R5, R12 ;
        /*0060*/              @P1 BRA 0x0020 ;
        /*0070*/             @!P2 EXIT ;
        /*0080*/                   STG.E.128 [R2.64], R12 ;
        /*0090*/                   EXIT ;
        /*00a0*/                   LDG.E.U16 R4, [R2.64] ;
        /*00b0*/                   STG.E.U16 [R2.64], R4 ;
        /*00c0*/                   EXIT ;
        /*00d0*/                   BRA 0x00d0;
        /*00e0*/                   NOP;
"""


def test_machine_code_is_read():
    code = sass.parse(SASS)
    assert len(code) == 13
    (loop,) = sass.loops(code)
    assert (loop.first, loop.last) == (0x20, 0x60)
    first, second = sass.paths(code)
    assert [sass.bytes_in_flight(path) for path in (first, second)] == [32, 2]
    counts = sass.executed(first, [(loop, 7)])
    assert (counts["FFMA"], counts["LDG.E.128"], counts["STG.E.128"]) == (14, 14, 1)


ASYNCHRONOUS = """
        /*0000*/                   LDGSTS.E.BYPASS.128 [R4], [R2.64] ;
        /*0010*/                   LDGDEPBAR ;
        /*0020*/                   LDGSTS.E.BYPASS.128 [R4+0x200], [R2.64+0x200] ;
        /*0030*/                   LDGDEPBAR ;
        /*0040*/                   DEPBAR.LE SB0, 0x1 ;
        /*0050*/                   LDS.128 R8, [R4] ;
        /*0060*/                   LDGSTS.E.BYPASS.128 [R4], [R2.64+0x400] ;
        /*0070*/                   LDG.E.128 R12, [R2.64+0x600] ;
        /*0080*/                   LDGDEPBAR ;
        /*0090*/                   DEPBAR.LE SB0, 0x0 ;
        /*00a0*/                   EXIT ;
"""


def test_copies_to_shared_memory_are_in_flight_until_they_are_waited_for():
    code = sass.parse(ASYNCHRONOUS)
    assert sass.bytes_in_flight(code[:5]) == 32
    assert sass.bytes_in_flight(code) == 48  # one copy is waited for before the third and a load are begun


def test_occupancy():
    h100 = devices.device("sm_90")
    assert h100.resident_blocks(registers=32, threads=1024, shared_bytes=0) == 2
    assert h100.resident_blocks(registers=255, threads=64, shared_bytes=0) == 4
    assert h100.resident_blocks(registers=128, threads=32, shared_bytes=0) == 16
    assert h100.resident_blocks(registers=32, threads=128, shared_bytes=100 * 1024) == 2
    with pytest.raises(ValueError, match=r"target must be one of sm_80, .*; got 'sm_70'"):
        devices.device("sm_70")


def kernel_record(**changes):
    return CompiledKernel(
        **{
            "backend": "triton", "name": "forward", "dtype": "bfloat16", "target": "sm_90", "threads": 32,
            "shared_bytes": 0, "K": 7, "act": "gelu", "block_h": 7, "block_w": 8, "block_d": 32,
        } | changes
    )  # fmt: skip


def test_predictions_are_the_slowest_limit():
    stage1 = roofline.Shape(128, 56, 56, 256, 96)
    none = Counter()
    idle = roofline.predict(kernel_record(), (none, none), stage1, devices.device("sm_90"), 1)
    assert idle.bound_by == "DRAM"
    assert idle.share == 1
    assert idle.microseconds == pytest.approx(184, abs=1)  # 3 * 256 elements of 2 bytes per pixel at 3.35 TB/s
    busy = roofline.predict(kernel_record(), (Counter({"FFMA": 100_000}), none), stage1, devices.device("sm_90"), 1)
    assert busy.bound_by == "issue"
    assert busy.share < 0.2


def test_multiprocessors_without_a_block_are_idle():
    none, work = Counter(), Counter({"FFMA": 1000})
    h100 = devices.device("sm_90")
    all_busy = roofline.Shape(h100.multiprocessors, 7, 8, 32, 32)  # one block for each
    one_busy = roofline.Shape(1, 7, 8, 32, 32)
    times = [roofline.predict(kernel_record(), (work, none), s, h100, 1).limits for s in (all_busy, one_busy)]
    assert times[0]["issue"] == pytest.approx(times[1]["issue"])
    assert times[0]["DRAM"] == pytest.approx(h100.multiprocessors * times[1]["DRAM"])


def test_halo_read_again_from_l2():
    shape = roofline.Shape(1, 14, 16, 64, 64)
    # rows 0-9 and 4-13, columns 0-10 and 5-15: 20 x 22 of 14 x 16 pixels
    assert roofline.l2_elements(kernel_record(), shape) == pytest.approx(3 * 64 + 64 * (20 * 22 / (14 * 16) - 1))
    assert roofline.blocks(kernel_record(), shape) == (2 * 2 * 2, 0)


def test_blocks_go_on_in_the_next_image():
    shape = roofline.Shape(2, 7, 7, 64, 64)
    assert roofline.blocks(kernel_record(), shape) == (2 * 2, 0)  # 14 columns in blocks of 8
    # the first reads all of one image and columns 0-3 of the next, the second that one whole
    assert roofline.l2_elements(kernel_record(), shape) == pytest.approx(3 * 64 + 64 * (18 / 14 - 1))


def test_a_kernel_without_code_is_refused():
    with pytest.raises(ValueError, match="kernel must come with cubin or assembly"):
        table.row(kernel_record())


def run(capsys, *argv):
    try:
        status = main(argv)
    except SystemExit as error:
        status = error.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@compiles
def test_command_line(capsys):
    only = ("--backend", "triton", "--target", "sm_90", "--kernel", "input_gradient", "--dtype", "float32")
    status, out, _ = run(capsys, "audit", *only, "--json")
    found, other = json.loads(out)
    assert (found["aligned"], other["aligned"], other["stages"]) == (True, False, [])
    assert status == 0
    assert (found["target"], found["kernel"], found["spills"], found["multiply_adds_per_output"]) == (
        "sm_90", "input_gradient", 0, 49,
    )  # fmt: skip
    assert [s["label"] for s in found["stages"]] == ["56x56x96", "28x28x192", "14x14x384", "7x7x576"]
    status, out, _ = run(capsys, "audit", *only)
    assert len(out.splitlines()) < 10
    assert "triton input_gradient" in out
    status, out, _ = run(capsys, "audit", *only, "--details")
    assert "Predicted, not measured" in out
    assert out.count("56x56x96") == 1
    status, out, _ = run(capsys, "audit", *only, "--markdown")
    assert "| sm_90 | triton input_gradient | float32 | aligned | 7x8x32 |" in out


@compiles
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target", "sm_10"), "--target must be in sm_80"),
        (("--kernel", "sideways"), "--kernel must be in forward"),
        (("--variant", "resnet"), "--variant must be one of"),
    ],
)
def test_command_line_refuses(capsys, arguments, message):
    status, _, err = run(capsys, "audit", *arguments)
    assert status == 2
    assert message in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_tune_needs_a_gpu(capsys):
    status, _, err = run(capsys, "tune")
    assert status == 2
    assert "tune cannot run here" in err


@compiles
def test_tiles_of_a_table_come_first(tmp_path):
    mine = tiles.Row("sm_90", "forward", 16, tiles.Tile(8, 32, 1, block_h=4), aligned=True, max_width=28)
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps(tiles.as_json([mine])))
    assert tiles.parse(path.read_text()) == (mine,)

    def chosen(arch="sm_90", width=28, K=7, aligned=True):
        return tiles.choose(arch, "forward", 16, width, K, aligned)

    shipped = chosen()
    try:
        load_tiles(path)
        assert chosen() == mine.tile
        assert chosen(width=56) == chosen(arch="sm_80") == shipped
        assert chosen(aligned=False) != mine.tile
    finally:
        tiles.use(())
    assert chosen() == shipped
    assert chosen(K=9).block_h == 1


@compiles
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"tile": 3}]', "not a table of tiles"),
        ("{", "not a table of tiles"),
        ('[{"arch": "any", "kernel": "sideways", "bits": 16, "tile": {"block_w": 8, "block_d": 8, "num_warps": 1}}]',
         "kernel must be one of forward"),
        ('[{"arch": "any", "kernel": "forward", "bits": 16, "tile": {"block_w": 6, "block_d": 8, "num_warps": 1}}]',
         "block_w, block_d and num_warps must be powers of two"),
        ('[{"arch": "any", "kernel": "forward", "bits": 16, "tile": {"block_w": 0, "block_d": 8, "num_warps": 1}}]',
         "sizes of a tile must be positive integers"),
    ],
)  # fmt: skip
def test_bad_tables_are_refused(content, message):
    with pytest.raises(ValueError, match=message):
        tiles.parse(content)


@compiles
def test_a_tuned_table_in_the_cache_directory_is_picked_up(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tiles.cache_path()
    assert path.is_relative_to(tmp_path)
    mine = tiles.Row("any", "forward", 16, tiles.Tile(8, 32, 1, block_h=4))
    path.parent.mkdir()

    def chosen():
        tiles.cached.cache_clear()
        tiles.choose.cache_clear()
        return tiles.choose("sm_90", "forward", 16, 56, 7, True)

    try:
        shipped = chosen()
        path.write_text(json.dumps(tiles.as_json([mine])))
        assert chosen() == mine.tile
        path.write_text("[3]")
        with pytest.warns(RuntimeWarning, match="is not used: not a table of tiles"):
            assert chosen() == shipped
    finally:
        monkeypatch.undo()
        tiles.cached.cache_clear()
        tiles.choose.cache_clear()


@compiles
@pytest.mark.parametrize(("bits", "aligned"), [(16, True), (16, False), (32, True), (32, False)])
def test_what_is_tuned_over_has_the_shipped_tile(bits, aligned):
    from mambaout_kernels.backends.triton_kernels.tune import candidates

    for kernel in KERNELS:
        assert tiles.choose("sm_90", kernel, bits, 56, 7, aligned) in list(candidates(kernel, bits, aligned))


@pytest.mark.parametrize("training", [False, True])
def test_warmup_leaves_the_model_as_it_was(training):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model.train(training)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    warmup(model, [(2, 3, 8, 8), (1, 3, 5, 5)])
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name])
    assert all(p.grad is None for p in model.parameters())


def test_warmup_of_a_model_of_the_family():
    warmup(mk.create_model("test_mambaout"), [(1, 3, 32, 32)])
    with pytest.raises(ValueError, match="model must have a floating parameter; Identity has none"):
        warmup(nn.Identity(), [(1,)])
