"""The block's Triton kernels as compiled for GPUs that are not here: registers, tensor cores, widths; their bound."""

import functools
import json
import os
from collections import Counter
from importlib.util import find_spec

import pytest

from mambaout_kernels.audit import triton_block
from mambaout_kernels.audit.roofline import Shape
from mambaout_kernels.benchmarking import shapes
from mambaout_kernels.cli import main

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1", reason="needs Triton's compiler"
)
TENSOR = {"sm_80": "HMMA", "sm_89": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "sm_120": "HMMA", "gfx942": "MFMA"}
TINY, BASE = "mambaout_tiny", "mambaout_base"


@functools.cache
def compiled(name, target, dtype, variant, stage):
    return triton_block.compile_ahead(triton_block.kernel_of(name, target, dtype, shapes.stages(variant)[stage - 1]))


def cases():
    """Of every kernel a case or two in make test, the rest of what the models launch in make nightly."""
    often = {
        ("gated_mlp", "sm_90", "bfloat16", TINY, 1), ("gated_mlp", "sm_90", "bfloat16", TINY, 2),
        ("gated_mlp", "sm_80", "bfloat16", TINY, 1), ("gated_mlp", "sm_100", "bfloat16", TINY, 1),
        ("gated_linear", "sm_90", "bfloat16", TINY, 3), ("norm_linear", "sm_90", "bfloat16", BASE, 1),
        ("image_conv", "sm_90", "bfloat16", TINY, 1), ("conv3x3s2_norm", "sm_90", "bfloat16", TINY, 1),
        ("depthwise", "sm_90", "bfloat16", TINY, 1), ("layer_norm", "sm_90", "bfloat16", TINY, 4),
    }  # fmt: skip
    found = []
    for target in TENSOR:
        for variant in (TINY, BASE):
            for dtype in ("bfloat16", "float16", "float32"):
                for kernel in triton_block.configurations([target], [dtype], variant):
                    stage = next(s.stage for s in shapes.stages(variant) if s.dim == kernel.dim)
                    case = (kernel.name, target, dtype, variant, stage)
                    marks = () if case in often else pytest.mark.nightly
                    found.append(pytest.param(*case, marks=marks, id="-".join(map(str, case))))
    return found


@pytest.mark.parametrize("case", [pytest.param(p.values, marks=p.marks, id=p.id) for p in cases()])
def test_gates(case):
    found = compiled(*case)
    name, target = case[:2]
    assert found.failures == []
    assert found.spills == 0 or found.kernel.tile.may_spill
    if name not in ("depthwise", "layer_norm"):
        assert found.tensor == TENSOR[target]
    if target != "gfx942":
        assert found.resident_blocks > 0
        # x, s and weights 16 bytes at a time; vectors of parameters are read as they come.
        assert set(found.stores) == {16}
        assert found.loads[16] > 0


STEM = ("image_conv", "conv3x3s2_norm")


@pytest.mark.parametrize(("stage", "kernels"), [(1, (*STEM, "norm_linear", "depthwise", "gated_mlp")),
                                                (4, ("layer_norm", "depthwise", "gated_linear"))])  # fmt: skip
def test_what_a_stage_launches(stage, kernels):
    dim = shapes.stages(TINY)[stage - 1].dim
    configurations = triton_block.configurations(["sm_90"], ["bfloat16"], TINY)
    assert tuple(k.name for k in configurations if k.dim == dim) == kernels


def test_base_is_filled_up_to_whole_accesses():
    shape = triton_block.filled_up(shapes.stages(BASE)[0], 2, "bfloat16")
    assert (shape.D, shape.C) == (344, 128)
    assert triton_block.filled_up(shapes.stages(TINY)[0], 2, "bfloat16").D == 256


def test_elements_and_products_of_a_block():
    """In all 7 * dim elements where C is dim: x twice, c twice, s twice, out once. fc1 and fc2 as in eager."""
    shape, names = Shape(1, 56, 56, 256, 96), ("norm_linear", "depthwise", "gated_mlp")
    assert sum(triton_block.elements_moved(name, 96, shape) for name in names) == 7 * 96
    assert sum(triton_block.products(name, 96, shape) for name in names) == 96 * 2 * 256 + 96 * 256


def test_elements_and_products_of_the_stem():
    """Four pixels of its first map to one of the stage, and four of the image to each of these."""
    shape = Shape(1, 56, 56, 256, 96)
    assert [triton_block.elements_moved(name, 96, shape) for name in STEM] == [16 * 3 + 4 * 48, 4 * 48 + 96]
    assert [triton_block.products(name, 96, shape) for name in STEM] == [4 * 27 * 48, 9 * 48 * 96]
    kernels = [triton_block.kernel_of(name, "sm_90", "bfloat16", shapes.stages(TINY)[0]) for name in STEM]
    assert [kernel.widths for kernel in kernels] == [(3, 48), (48, 96)]
    assert [triton_block.programs(kernel, shape) for kernel in kernels] == [112 * 112 // 128, -(-56 * 56 // 128)]


def test_the_bound_is_of_the_slowest_limit():
    found = compiled("gated_mlp", "sm_90", "bfloat16", TINY, 1)
    shape = triton_block.filled_up(shapes.stages(TINY)[0], 128, "bfloat16")
    least = triton_block.bound(found, shape)
    assert least.microseconds == max(least.limits.values())
    assert least.limits["DRAM"] == pytest.approx(2 * 3 * 96 * shape.pixels / 3.35e12 * 1e6)
    flops = 2 * (96 * (2 * 256 - 96) + 96 * 256) * shape.pixels
    assert least.limits["tensor cores"] == pytest.approx(flops / 989e12 * 1e6, rel=0.02)
    twice = triton_block.bound(found, Shape(256, 56, 56, 256, 96))
    assert twice.microseconds == pytest.approx(2 * least.microseconds, rel=0.01)


def test_loops_count_as_often_as_they_run():
    """Per program 5 trips over identity channels, 3 over conv channels: gates are 32 channels of 64 pixels each."""
    found = compiled("gated_mlp", "sm_90", "bfloat16", TINY, 1)
    gates = 64 * 256 / 128  # of a thread
    exponentials = sum(n for opcode, n in found.executed.items() if opcode.startswith("MUFU.EX2"))
    assert exponentials == pytest.approx(gates)
    assert isinstance(found.executed, Counter)


def test_the_command(capsys):
    status = main(["audit", "--backend", "triton", "--kernel", "norm_linear", "--target", "sm_90", "--dtype",
                   "bfloat16", "--variant", "mambaout_base", "--json"])  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    assert status == 0
    assert [(f["kernel"], f["stage"], f["tensor_cores"]) for f in found] == [
        ("norm_linear", "56x56x128", "HGMMA"), ("norm_linear", "28x28x256", "HGMMA"),
    ]  # fmt: skip
