"""What users of such packages complain about, one test each, named after the complaint. Each is direct and small;
`COVERED` names the tests that go further.
"""

import ast
import copy
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from numerics import make_inputs
from torch import nn
from torch.utils.checkpoint import checkpoint

import mambaout_kernels as mk
from mambaout_kernels import backends
from mambaout_kernels.backends import cpu, warmup

ROOT = Path(__file__).resolve().parent.parent
needs_module = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))

# The complaints with the tests elsewhere that cover them in depth: file::function.
COVERED = {
    "1 install dies without nvcc or a GPU": [
        "test_build::test_without_a_compiler_it_installs_and_runs_on_the_reference"
    ],
    "2 undefined symbol with another torch": ["test_build::test_only_torchs_stable_abi_is_used"],
    "3 no CPU path": ["test_cpu_kernels::test_against_fp64", "test_reference::test_closed_form_backward_is_autograds"],
    "4 no kernel image on a new GPU": [
        "test_cuda_build::test_there_is_ptx_of_the_newest_target",
        "test_ops::test_without_the_compiled_module_the_reference_runs_with_one_warning",
    ],
    "5 torch.compile breaks the graph": [
        "test_ops::test_compiles_without_a_graph_break",
        "test_block::test_compiles_without_graph_break",
        "test_ops::test_opcheck",
    ],
    "6 dtype mismatch under autocast": [
        "test_block::test_autocast",
        "test_ops::test_mixed_dtypes_each_gradient_in_its_tensors_dtype",
    ],
    "7 strides or alignment refused": [
        "test_cpu_kernels::test_any_strides_give_the_same_bits",
        "test_cuda_host::test_layouts",
        "triton_interpreter/test_triton_behaviour::test_any_strides_give_the_same_bits",
    ],
    "8 wrong gradient for a non-contiguous dy": ["test_ops::test_autograd_against_fp64", "test_generated::test_cpu"],
    "9 int32 overflow": [
        "test_beyond_int32::test_forward_and_backward",
        "triton_interpreter/test_triton_behaviour::test_rows_too_wide_for_32_bit_offsets_run_on_the_reference",
    ],
    "10 backward differs from run to run": [
        "test_determinism::test_op_at_every_number_of_threads_and_in_every_run",
        "test_cuda_host::test_every_schedule_gives_the_same_bits",
    ],
    "11 saved tensors are overwritten": [
        "test_ops::test_retained_graph_gives_the_same_again_and_inputs_stay",
        "test_cpu_kernels::test_inputs_are_not_written",
    ],
    "12 wrong GPU of several": ["test_cuda_binding::test_every_call_is_for_the_device_and_stream_of_u"],
    "13 no double backward": ["test_ops::test_gradcheck_twice"],
    "14 export impossible": ["test_ops::test_forced_reference_is_plain_pytorch"],
    "15 cold start": ["test_audit::test_warmup_leaves_the_model_as_it_was", "test_layering::test_import_is_light"],
    "also zero sizes": ["test_cpu_kernels::test_zero_sizes", "test_cuda_host::test_zero_sizes_touch_nothing"],
}


def inputs(dtype=torch.float32, **kwargs):
    return make_inputs(2, 6, 7, 20, 12, 7, dtype, **kwargs)


def gradients(u, weight, bias, dy, act="gelu"):
    leaves = [t.detach().requires_grad_() for t in (u, weight, bias)]
    return torch.autograd.grad(mk.gated_dwconv(*leaves, act), leaves, dy)


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=240
    )


@pytest.mark.parametrize("complaint", [name for name, tests in COVERED.items() if tests])
def test_what_covers_a_complaint_is_there(complaint):
    for test in COVERED[complaint]:
        file, function = test.split("::")
        [path] = (ROOT / "tests").rglob(f"{file.rpartition('/')[2]}.py")
        tree = ast.parse(path.read_text())
        assert function in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, test


def test_01_no_nvcc_and_no_gpu_is_told_and_not_an_error(tmp_path):
    done = run_python(
        "from mambaout_kernels.cli import main; raise SystemExit(main(['info']))",
        CUDA_VISIBLE_DEVICES="", PATH=str(tmp_path), CUDA_HOME=str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in backends.NAMES:
        assert name in done.stdout


@needs_module
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the names in an ELF file")
def test_02_no_symbol_of_torchs_cpp_is_needed():
    """Names of at:: and c10:: change with every torch; torch_ and aoti_torch_ are C, and kept."""
    names = set(re.findall(rb"_Z[A-Za-z0-9_]{4,}", Path(cpu.module.__file__).read_bytes()))
    assert names
    assert not {name for name in names if re.match(rb"_ZNK?(2at|3c10)[0-9]", name)}
    assert b"aoti_torch_" in Path(cpu.module.__file__).read_bytes()


@needs_module
def test_03_the_cpu_has_kernels_of_its_own():
    assert backends.preferred("cpu") == "cpu"
    given = inputs()
    with torch.profiler.profile() as profile:
        mk.gated_dwconv(*given)
    assert any("gated_dwconv_cpu" in event.key for event in profile.key_averages())


def test_04_a_gpu_without_kernels_runs_on_the_reference_with_one_warning(monkeypatch):
    monkeypatch.setitem(backends._no_kernels, "cuda", "cuda: no kernel image for this GPU")
    backends._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="no kernel image") as caught:
        assert backends.uses_reference("cuda")
        assert backends.uses_reference("cuda")
    assert len(caught) == 1
    backends._warn_once.cache_clear()


def test_05_compile_in_one_graph_with_gradients():
    block = mk.FusedGatedCNNBlock(16)
    twin = copy.deepcopy(block)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (5, 8):
        x = torch.randn(2, size, 6, 16)
        compiled(x).square().sum().backward()
        twin(x).square().sum().backward()
    for ours, theirs in zip(block.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_06_autocast_forward_and_backward(autocast, stored):
    block = mk.FusedGatedCNNBlock(16, ls_init_value=0.5).to(stored)
    x = torch.randn(2, 5, 6, 16, dtype=stored, requires_grad=True)
    with torch.autocast("cpu", dtype=autocast):
        y = block(x)
    y.float().square().sum().backward()
    for name, t in (("x", x), *block.named_parameters()):
        assert t.grad.dtype == stored, name
        assert t.grad.isfinite().all(), name


@pytest.mark.parametrize("hidden", [1, 2, 3, 5, 17, 341])
def test_07_any_channel_count_stride_and_alignment(hidden):
    given = make_inputs(2, 5, 6, hidden, max(1, hidden // 3), 7)
    dense = mk.gated_dwconv(*given)
    odd = torch.cat((given.u.new_zeros(1), given.u.flatten()))[1:].view(given.u.shape)
    wider = torch.cat((given.u, given.u[..., :1]), dim=-1)[..., :-1]
    nchw = given.u.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    for u in (odd, wider, nchw):
        assert torch.equal(mk.gated_dwconv(u, given.weight, given.bias), dense)


DY = {
    "expanded": lambda dy: dy[:1, :1, :1, :1].expand(dy.shape),
    "sliced": lambda dy: torch.cat((dy, dy), dim=-1)[..., ::2],
    "permuted": lambda dy: dy.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0),
}


@pytest.mark.parametrize("layout", DY.values(), ids=DY)
@pytest.mark.parametrize("name", [name for name, reason in backends.status().items() if reason is None])
def test_08_a_gradient_of_any_layout(layout, name):
    given = inputs()
    dy = layout(given.dy)
    assert not dy.is_contiguous()
    with backends.force(name):
        for ours, dense in zip(gradients(*given, dy), gradients(*given, dy.contiguous()), strict=True):
            torch.testing.assert_close(ours, dense, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="relies on memory that is only had when touched")
def test_09_offsets_beyond_32_bits():
    """u and dy whose images are more than 2^31 elements apart; only what is read takes memory."""
    given = inputs(torch.bfloat16)
    apart = 2**31 + 2**20
    far = [torch.empty(apart + t[0].numel(), dtype=t.dtype).as_strided(t.shape, (apart, *t.stride()[1:])).copy_(t)
           for t in (given.u, given.dy)]  # fmt: skip
    for name in [name for name, reason in backends.status().items() if reason is None and name != "triton"]:
        with backends.force(name):
            ours = gradients(far[0], given.weight, given.bias, far[1])
            for a, b in zip(ours, gradients(*given, given.dy), strict=True):
                torch.testing.assert_close(a, b)


def test_10_backward_is_bitwise_the_same():
    given = make_inputs(3, 29, 31, 40, 24, 7)
    first = gradients(*given, given.dy)
    for threads in (1, 2, 5, 2):
        torch.set_num_threads(threads)
        for now, then in zip(gradients(*given, given.dy), first, strict=True):
            assert torch.equal(now.view(torch.int32), then.view(torch.int32))


def test_11_a_retained_graph_gives_the_same_again():
    given = inputs()
    leaves = [t.clone().requires_grad_() for t in given]
    y = mk.gated_dwconv(*leaves)
    first = torch.autograd.grad(y, leaves, given.dy, retain_graph=True)
    second = torch.autograd.grad(y, leaves, given.dy)
    for now, then in zip((*second, *leaves), (*first, *given), strict=True):
        assert torch.equal(now, then)


def test_12_every_launch_is_on_the_device_of_its_tensors():
    """Two GPUs: the one that is not current. Here: each native CUDA op and each Triton launch holds a guard."""
    native = (ROOT / "csrc" / "torch" / "gated_dwconv_cuda.cpp").read_text()
    launches = len(re.findall(r"\bcuda::(?:forward|backward|depthwise)\(", native))
    assert launches == len(re.findall(r"DeviceGuard guard\(", native)) == 3
    guarded = 0
    for file in ("launch.py", "block_launch.py"):
        tree = ast.parse((ROOT / "mambaout_kernels" / "backends" / "triton_kernels" / file).read_text())
        for function in [n for n in tree.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")]:
            if "torch.empty" in ast.unparse(function) or "new_empty" in ast.unparse(function):  # for a kernel to fill
                assert any(isinstance(n, ast.With) and "_guard" in ast.unparse(n.items[0]) for n in ast.walk(function))
                guarded += 1
    # forward, backward; layer_norm and its backward, conv3x3s2_norm, norm_linear, depthwise, gated_mlp, gated_linear
    assert guarded == 9
    if torch.cuda.device_count() > 1:
        given = inputs()
        on_second = [t.to("cuda:1") for t in (*given, given.dy)]
        with torch.cuda.device(0):
            for ours, theirs in zip(gradients(*on_second), gradients(*given, given.dy), strict=True):
                assert ours.device.index == 1
                torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-4)


def test_13_double_backward():
    given = make_inputs(1, 4, 3, 4, 2, 3, torch.float64)
    leaves = [t.requires_grad_() for t in given]
    assert torch.autograd.gradgradcheck(lambda u, w, b: mk.gated_dwconv(u, w, b, "silu"), leaves)


def test_14_export_to_plain_operators_from_the_same_state_dict():
    torch.manual_seed(0)
    model = mk.create_model("test_mambaout", num_classes=3).eval()
    keys = list(model.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with backends.force("reference"):
        program = torch.export.export(model, (x,))
    assert list(model.state_dict()) == keys
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    called.discard("<built-in function getitem>")  # of a split's parts
    assert called
    assert all(name.startswith("aten.") for name in called), called
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


def test_15_nothing_is_compiled_or_tuned_at_import():
    done = run_python(
        "import sys, subprocess\n"
        "import torch\n"
        "def refuse(*a, **k): raise AssertionError(f'started {a}')\n"
        "subprocess.Popen = refuse\n"
        "before = set(sys.modules)\n"
        "import mambaout_kernels\n"
        "assert 'triton' not in set(sys.modules) - before\n"
        "mambaout_kernels.gated_dwconv(torch.randn(1, 3, 3, 8), torch.randn(2, 1, 3, 3), torch.randn(2))\n"
    )
    assert done.returncode == 0, done.stderr
    assert (Path(mk.__file__).parent / "backends" / "triton_kernels" / "tiles.json").stat().st_size > 1000
    model = nn.Sequential(mk.FusedGatedCNNBlock(8))
    warmup.warmup(model, [(1, 4, 4, 8)])


def test_also_windows_and_macos_need_nothing_of_linux():
    """What a kernel or the binding takes from Linux is behind a condition, and so is what it takes from x86."""
    for path in [*(ROOT / "csrc").glob("*"), *(ROOT / "csrc" / "cpu").glob("*")]:
        if path.suffix not in (".h", ".cpp"):
            continue
        depth = 0
        for line in path.read_text().splitlines():
            depth += line.startswith("#if") - line.startswith("#endif")
            if re.match(r"#include <(sys/|unistd|pthread|sched)", line):
                assert depth > 0, f"{path.name}: {line}"
    cmake = (ROOT / "CMakeLists.txt").read_text()
    assert 'CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64"' in cmake
    assert "MAMBAOUT_X86" in cmake


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_also_fsdp2_with_activation_checkpointing(tmp_path):
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    plain = nn.Sequential(*(mk.FusedGatedCNNBlock(16) for _ in range(2)))
    sharded = copy.deepcopy(plain)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for block in sharded:
            fully_shard(block, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        x = torch.randn(2, 5, 6, 16)
        y = x
        for block in sharded:
            y = checkpoint(block, y, use_reentrant=False)
        y.square().sum().backward()
        plain(x).square().sum().backward()
        for ours, theirs in zip(sharded.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_also_cuda_graphs():
    block = mk.FusedGatedCNNBlock(32).cuda().eval()
    x = torch.randn(2, 9, 9, 32, device="cuda")
    with torch.no_grad():
        expected = block(x)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            block(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = block(x)
        graph.replay()
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 4), (2, 4, 0)], ids=str)
@pytest.mark.parametrize("name", [name for name, reason in backends.status().items() if reason is None])
def test_also_zero_size_batches(shape, name):
    block = mk.FusedGatedCNNBlock(16)
    x = torch.zeros(*shape, 16, requires_grad=True)
    with backends.force(name):
        block(x).sum().backward()
        with torch.no_grad():
            assert block(x).shape == x.shape
    assert x.grad.shape == x.shape
    assert all(not p.grad.any() for p in block.parameters())


def test_also_a_norm_over_more_than_channels_is_not_taken_for_one_over_channels():
    """The whole block's op norms channels: what else a caller puts there must be called."""
    block = mk.FusedGatedCNNBlock(8).eval()
    block.norm = nn.LayerNorm((4, 8))
    x = torch.randn(1, 3, 4, 8)
    with torch.no_grad():
        ours = block(x)
    torch.testing.assert_close(ours, block(x.requires_grad_()).detach(), rtol=1e-4, atol=1e-5)


def test_also_the_triton_backend_is_optional():
    """Windows and macOS have no triton: the reason is told, and nothing else fails."""
    if importlib.util.find_spec("triton") is None:
        assert "triton" in backends.status()["triton"]
    code = (
        "import sys; sys.modules['triton'] = None; import mambaout_kernels as m; print(m.backends.status()['triton'])"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert "triton" in done.stdout
