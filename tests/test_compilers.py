"""torch.compile, torch.export, AOTInductor, ONNX and TorchScript on whole models."""

import copy
import re
import shutil
import sys
from unittest import mock

import pytest
import torch
from torch import nn

import mambaout_kernels as mk
from mambaout_kernels import patch
from mambaout_kernels.backends import cpu
from mambaout_kernels.integrations.export import plain_aten, to_onnx
from mambaout_kernels.models import create_model


def make(name="test_mambaout", **options):
    torch.manual_seed(0)
    model = create_model(name, **{"num_classes": 3, **options})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def images(n=2, h=64, w=64, seed=1):
    return torch.randn(n, 3, h, w, generator=torch.Generator().manual_seed(seed))


def marked(x, *dims):
    for dim in dims:
        torch._dynamo.mark_dynamic(x, dim)
    return x


@pytest.fixture
def counted():
    """A function to compile with, and the number of graphs that it was given."""
    torch._dynamo.reset()
    testing = pytest.importorskip("torch._dynamo.testing")
    yield testing.CompileCounterWithBackend
    torch._dynamo.reset()


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


NEEDS_COMPILER = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="inductor needs a C++ compiler"
)
# The compilers' time goes with the number of layers.
SMALL = {"depths": (1,), "dims": (8,)}
TWO_STAGES = {"depths": (1, 1), "dims": (8, 16)}


def make_whole(kind, **options):
    """Of every kind of layer one; kind "timm": timm's, patched."""
    if kind != "timm":
        return make(**TWO_STAGES, **options)
    return patch(pytest.importorskip("timm").create_model("test_mambaout", num_classes=3, **TWO_STAGES))


@NEEDS_COMPILER
@pytest.mark.usefixtures("_scalar_loops")
def test_inductor_in_evaluation_one_graph_for_all_sizes(counted):
    model, backend = make(**SMALL).eval(), counted("inductor")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        for n, h, w in ((2, 64, 64), (5, 64, 64), (3, 40, 72)):
            assert_close(compiled(marked(images(n, h, w), 0, 2, 3)), model(images(n, h, w)))
    assert backend.frame_count == 1


@NEEDS_COMPILER
@pytest.mark.usefixtures("_scalar_loops")
def test_inductor_in_training_one_graph_for_all_batches(counted):
    """Forward and every gradient. With H and W dynamic too, inductor fails on timm's own MambaOut as on this one."""
    model, backend = make(**SMALL).train(), counted("inductor")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for n in (2, 3, 5):
        results = []
        for f, x in ((compiled, marked(images(n), 0)), (model, images(n))):
            y = f(x)
            results.append([y.detach(), *torch.autograd.grad(y.square().mean(), list(model.parameters()))])
        for actual, expected in zip(*results, strict=True):
            assert_close(actual, expected)
    assert backend.frame_count == 1


# In evaluation they are compiled by inductor above, and exported below.
WHOLE = [("ours", True), ("timm", True), ("checkpointing", True), ("autocast", False)]
WHOLE += [pytest.param(kind, False, marks=pytest.mark.nightly) for kind in ("ours", "timm")]


@pytest.mark.parametrize(("kind", "training"), WHOLE)
def test_whole_models_without_graph_break(kind, training, counted):
    model = make_whole(kind, drop_path_rate=0.1, drop_rate=0.1)
    if kind == "checkpointing":
        model.set_grad_checkpointing()
    model.train(training)
    backend = counted("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for n in (2, 3, 5):
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            y, expected = compiled(marked(images(n), 0)), model(images(n))
        assert y.dtype == expected.dtype
        if training:
            y.float().sum().backward()
        else:  # under autocast a compiler may round at other places
            tolerance = 0.05 if kind == "autocast" else 1e-4
            assert (y - expected).abs().max() <= tolerance * expected.abs().max()
    assert backend.frame_count == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_compiling_a_model_that_is_patched_later(counted):
    """Patched after torch.compile, it is compiled again rather than run as it was."""
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_mambaout", num_classes=3, **TWO_STAGES).eval()
    backend = counted("eager")
    compiled = torch.compile(model, backend=backend)
    before = compiled(images())
    patch(model)
    assert_close(compiled(images()), before)
    assert any("gated_dwconv" in str(graph.graph) for graph in backend.graphs)


def operators(program):
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


DYNAMIC = (dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO),)


@pytest.mark.parametrize("kind", ["ours", "timm"])
def test_export(kind):
    model = make_whole(kind).eval()
    fused = torch.export.export(model, (images(),), dynamic_shapes=DYNAMIC)
    assert "mambaout_kernels.gated_dwconv.default" in operators(fused)
    with plain_aten():
        plain = torch.export.export(model, (images(),), dynamic_shapes=DYNAMIC)
    assert not any("mambaout" in operator for operator in operators(plain))
    assert list(plain.state_dict) == list(fused.state_dict) == list(model.state_dict())
    for size in ((1, 64, 64), (5, 70, 97)):
        for program in (fused, plain):
            assert_close(program.module()(images(*size)), model(images(*size)))


@pytest.mark.usefixtures("_scalar_loops")
@pytest.mark.parametrize("kind", ["ours", pytest.param("timm", marks=pytest.mark.nightly)])
def test_inductor_copies_nothing_around_the_op(kind):
    """It lays out four dimensions as for convolutions, where it keeps them: u would be transposed twice."""
    inductor = pytest.importorskip("torch._inductor.utils")
    torch._dynamo.reset()
    model = make_whole(kind, ls_init_value=0.5) if kind == "ours" else make_whole(kind)
    x = images(2)

    def step():
        torch.compile(model.train(), fullgraph=True, dynamic=False)(x).sum().backward()

    # Of what it writes, the calls count; its loops, which take long to compile, do nothing here.
    compiler = "torch._inductor.async_compile.AsyncCompile.cpp_pybinding"
    with (
        torch._inductor.config.patch(force_layout_optimization=True, force_disable_caches=True),
        mock.patch(compiler, return_value=lambda *_: None) as loops,
    ):
        _, code = inductor.run_and_get_code(step)
    assert loops.called
    assert len(code) == 2
    calls = [line for text in code for line in text.splitlines() if "mambaout_kernels.gated_dwconv" in line]
    assert sum(".default(" in line for line in calls) == 4
    assert not [
        line for text in code for line in text.splitlines() if re.match(r"\s+cpp_fused_\w*gated_dwconv\w*\(", line)
    ]
    torch._dynamo.reset()


@NEEDS_COMPILER
@pytest.mark.nightly
def test_aotinductor(tmp_path):
    """make test has that of an inference model (test_inference_model.py)."""
    model = make(**SMALL).eval()
    program = torch.export.export(model, (images(),), dynamic_shapes=DYNAMIC)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    loaded = torch._inductor.aoti_load_package(path)
    for size in ((2, 64, 64), (1, 70, 97)):
        assert_close(loaded(images(*size)), model(images(*size)))


@pytest.mark.parametrize("kind", ["ours", "timm"])
def test_onnx(kind, tmp_path):
    runtime, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model = make_whole(kind).eval()
    keys = list(model.state_dict())
    to_onnx(model, tmp_path / "model.onnx", images())
    assert list(model.state_dict()) == keys
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert {node.domain for node in graph.node} == {""}
    assert axes(graph.input) == {"images": ["batch", 3, "height", "width"]}
    assert axes(graph.output) == {"logits": ["batch", 3]}
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for size in ((2, 64, 64), (1, 96, 70), (5, 33, 35)):
        [y] = session.run(None, {"images": images(*size).numpy()})
        with torch.no_grad():
            assert_close(torch.from_numpy(y), model(images(*size)))


def axes(values) -> dict[str, list]:
    """Of each value of a graph, the sizes, or their names."""
    return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}


def test_onnx_by_torchs_own_function():
    pytest.importorskip("onnxscript")
    model = make(**TWO_STAGES).eval()
    program = torch.onnx.export(model, (images(),), dynamo=True)
    assert {node.domain for node in program.model.graph} == {""}
    with torch.no_grad():
        [y] = program(images(2, seed=4))
        assert_close(y, model(images(2, seed=4)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_onnx_by_torchs_older_function(tmp_path):
    """Which traces: of one size, and in PyTorch's operators, too."""
    runtime = pytest.importorskip("onnxruntime")
    model = make().eval()
    torch.onnx.export(model, (images(),), tmp_path / "model.onnx", dynamo=False)
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    x = images(seed=4)
    [y] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        assert_close(torch.from_numpy(y), model(x))


@pytest.mark.skipif(cpu.unavailable() is not None, reason="needs the compiled CPU kernels")
def test_onnx_of_an_inference_model_is_refused_with_what_to_do(tmp_path):
    pytest.importorskip("onnxscript")
    with pytest.raises(ValueError, match="export the model that it was made from"):
        to_onnx(mk.optimize_for_inference(make()), tmp_path / "a.onnx")


def test_onnx_refuses(tmp_path, monkeypatch):
    with pytest.raises(TypeError, match=r"model must not be bfloat16.*export it in float32"):
        to_onnx(make().eval().bfloat16(), tmp_path / "a.onnx")
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
        to_onnx(make().train(), tmp_path / "a.onnx")
    with pytest.raises(ValueError, match=r"example must be .* got \(1, 3, 64, 64\)"):
        to_onnx(make().eval(), tmp_path / "a.onnx", images(1))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"pip install mambaout-kernels\[export\]"):
        to_onnx(make().eval(), tmp_path / "a.onnx")


@pytest.mark.filterwarnings("ignore:.*torch.jit:")
@pytest.mark.parametrize("make_model", [make, lambda: nn.Sequential(make())])
def test_script_is_refused_with_what_to_use(make_model):
    model = make_model().eval()
    before = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match=r"Use torch\.compile, torch\.export .* torch\.jit\.trace; or .* unpatch"):
        torch.jit.script(model)
    assert torch.equal(model(images()), before(images()))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:")
def test_trace():
    model = make().eval()
    with torch.no_grad():
        traced = torch.jit.trace(model, images())
        assert_close(traced(images(3, seed=4)), model(images(3, seed=4)))
