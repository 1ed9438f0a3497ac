"""InferenceModel as an object: what it refuses, copies, pickles, processes, threads, and compilers."""

import copy
import io
import multiprocessing
import pickle
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import mambaout_kernels as mk
from mambaout_kernels.backends import cpu
from mambaout_kernels.benchmarking.inputs import enlivened
from mambaout_kernels.inference.parts import PackedBlocks
from mambaout_kernels.ops import gated_cnn_blocks as blocks_op

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))

ISAS = [] if cpu.module is None else cpu.module.supported_cpu_capabilities()
NEEDS_COMPILER = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="inductor needs a C++ compiler"
)


SMALL = {"depths": (1, 2), "dims": (16, 24), "num_classes": 9}


def make(**options):
    return enlivened(mk.MambaOut(**{**SMALL, "ls_init_value": 0.5, **options})).eval()


def partly_fused():
    """One block and the head run through their modules."""
    model = make(depths=(1, 1))
    model.stages[1][0].act = nn.ReLU()
    model.head.act = nn.SiLU()
    return model


@pytest.fixture
def fast():
    return mk.optimize_for_inference(make())


@pytest.fixture(params=["all fused", "partly", "timm", "bfloat16"])
def kind_of_model(request):
    if request.param == "timm":
        timm = pytest.importorskip("timm")
        return mk.optimize_for_inference(enlivened(timm.create_model("test_mambaout", **SMALL)))
    if request.param == "bfloat16":
        return mk.optimize_for_inference(make(), dtype=torch.bfloat16)
    return mk.optimize_for_inference(partly_fused() if request.param == "partly" else make())


pytestmark = [pytestmark, pytest.mark.filterwarnings("ignore:FusedGatedCNNBlock runs as separate:RuntimeWarning")]


def images(n=2, h=64, w=56, seed=1):
    return torch.randn(n, 3, h, w, generator=torch.Generator().manual_seed(seed))


# --- what it refuses ---


def test_gradients_are_refused(fast):
    x = images().requires_grad_()
    features = fast.forward_features(images()).requires_grad_()
    said = "x requires a gradient, which an inference model does not compute: call the model that it was made from"
    for call in (fast, fast.forward_features, fast.forward_intermediates):
        with pytest.raises(RuntimeError, match=said):
            call(x)
    with pytest.raises(RuntimeError, match=said):
        fast.forward_head(features)
    with torch.no_grad():
        assert torch.equal(fast(x), fast(images()))
    assert not fast(images()).requires_grad
    for given in (images().requires_grad_() * 2, [images(), x]):
        with pytest.raises(RuntimeError, match=said):
            fast(given)


@pytest.mark.parametrize("part", ["downsample_layers.0", "downsample_layers.1", "stages.0.0", "head"])
def test_its_parts_refuse_gradients_too(fast, part):
    x = {"downsample_layers.0": images(), "head": torch.randn(1, 4, 4, 24)}.get(part, torch.randn(1, 4, 4, 16))
    with pytest.raises(RuntimeError, match="x requires a gradient"):
        fast.model.get_submodule(part)(x.requires_grad_())


def test_training_is_refused(fast):
    said = "an InferenceModel only infers: train the model that it was made from, and optimize it again"
    for call in (fast.train, lambda: fast.train(True), fast.requires_grad_, nn.Sequential(fast).train):
        with pytest.raises(RuntimeError, match=said):
            call()
    assert fast.eval() is fast
    assert fast.train(False) is fast
    assert fast.requires_grad_(False) is fast
    assert not any(module.training for module in fast.modules())


@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.half(), lambda m: m.double(), lambda m: m.bfloat16(), lambda m: m.to(torch.float64),
        lambda m: m.to("meta"), lambda m: nn.Sequential(m).half(), lambda m: m.type(torch.float64),
    ],
)  # fmt: skip
def test_moves_are_refused_and_change_nothing(fast, move):
    before = fast(images())
    with pytest.raises(RuntimeError, match=r"an InferenceModel is made for one dtype and device, here torch\.float32"):
        move(fast)
    assert torch.equal(fast(images()), before)


def test_moves_to_where_it_is_do_nothing(kind_of_model):
    fast = kind_of_model
    before = fast(images())
    for move in (lambda m: m.to(fast.dtype), lambda m: m.cpu(), lambda m: m.to("cpu"), lambda m: m.share_memory()):
        assert move(fast) is fast
        assert torch.equal(fast(images()), before)
    if fast.dtype == torch.bfloat16:
        assert fast.bfloat16() is fast
        with pytest.raises(RuntimeError, match=r"here torch\.bfloat16"):
            fast.float()
    else:
        assert fast.float() is fast


def test_a_method_that_the_model_has_not_is_named():
    fast = mk.optimize_for_inference(nn.Sequential(make()))
    with pytest.raises(AttributeError, match="Sequential has no forward_head"):
        fast.forward_head(images())


# --- what it says of itself ---


def test_weight_bytes():
    fast = mk.optimize_for_inference(mk.create_model("test_mambaout"))
    assert fast.weight_bytes() == sum(t.nbytes for t in fast.state_dict().values())
    plain = sum(p.nbytes for p in mk.create_model("test_mambaout").parameters())
    assert plain < fast.weight_bytes() < 2 * plain  # padded to whole panels
    assert f"{fast.model.stages[0][0].packed.numel()} bytes" in repr(fast)


def test_the_report_is_a_list_and_a_table():
    report = mk.optimize_for_inference(partly_fused()).report()
    assert [(part.name, part.kind, part.fused) for part in report][-1] == ("head", "head", False)
    lines = str(report).splitlines()
    assert len(lines) == len(report) == 5
    assert sum("not fused: " in line for line in lines) == 2
    report.clear()


def test_a_report_that_was_changed_changes_no_other(fast):
    fast.report().clear()
    assert len(fast.report()) == 5


# --- copies ---


def torch_saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": torch_saved,
    "twice": lambda model: copy.deepcopy(pickle.loads(pickle.dumps(model))),
}


@pytest.mark.parametrize("way", COPIES)
def test_copies_compute_the_same_and_are_independent(kind_of_model, way):
    fast = kind_of_model
    before, features = fast(images()), fast.forward_features(images())
    twin = COPIES[way](fast)
    assert type(twin) is mk.InferenceModel
    assert torch.equal(twin(images()), before)
    assert torch.equal(twin.forward_head(features), before)
    assert twin.report() == fast.report()
    assert twin.dtype == fast.dtype
    for t in (*fast.parameters(), *fast.buffers()):
        t.data.view(torch.uint8).fill_(0)
    assert torch.equal(twin(images()), before)
    with pytest.raises(RuntimeError, match="an InferenceModel only infers"):
        twin.train()


def runs_here(fast):
    return all(blocks_op.runs(m.packed) for m in fast.modules() if isinstance(m, PackedBlocks))


@pytest.mark.skipif(len(ISAS) < 2, reason="one instruction set here")
def test_a_pickle_is_packed_again_for_another_instruction_set(kind_of_model):
    fast, before, refused_by = kind_of_model, cpu.instruction_set(), []
    expected, pickled = fast(images()), pickle.dumps(fast)
    try:
        for isa in ISAS:
            cpu.module.set_cpu_capability(isa)
            twin = pickle.loads(pickled)
            assert runs_here(twin)
            again = twin(images())
            # other orders of sums; a low dtype rounds each map
            share = 3e-2 if fast.dtype == torch.bfloat16 else 1e-5
            assert (again - expected).abs().max() <= share * expected.abs().max()
            if runs_here(fast):
                assert torch.equal(fast(images()), again)
            else:
                refused_by.append(isa)
                with pytest.raises(RuntimeError, match=r"packed (is for another instruction set|must be packed again)"):
                    fast(images())
    finally:
        cpu.module.set_cpu_capability(before)
    assert before not in refused_by  # avx512 and avx512_bf16 have fp32 in the same layout; portable has its own
    assert "portable" in refused_by or before == "portable"
    assert torch.equal(fast(images()), expected)


def test_state_dicts_load_into_one_of_the_same_kind(fast):
    model = make()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    other = mk.optimize_for_inference(model)
    assert not torch.equal(other(images()), fast(images()))
    other.load_state_dict(fast.state_dict())
    assert torch.equal(other(images()), fast(images()))


# --- threads and processes ---


def test_threads_with_different_inputs_at_once(kind_of_model):
    fast, threads = kind_of_model, 8
    given = [images(1 + i % 3, 40 + 8 * i, 48, seed=i) for i in range(threads)]
    expected = [fast(x) for x in given]
    at_once = threading.Barrier(threads)

    def work(i):
        at_once.wait()
        return [fast(given[i]) for _ in range(6)]

    with ThreadPoolExecutor(threads) as pool:
        for outputs, alone in zip(pool.map(work, range(threads)), expected, strict=True):
            assert all(torch.equal(y, alone) for y in outputs)


class Outputs(Dataset):
    """Runs the model in the workers."""

    def __init__(self, model):
        self.model = model

    def __len__(self):
        return 6

    def __getitem__(self, i):
        return self.model(images(1, seed=i))[0]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_data_loader_workers(fast, method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method}")
    outputs = Outputs(fast)
    loader = DataLoader(outputs, batch_size=2, num_workers=2, multiprocessing_context=method, timeout=120)
    found = torch.cat(list(loader))
    assert torch.equal(found, torch.stack([outputs[i] for i in range(len(outputs))]))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_modes_of_gradients(kind_of_model, mode):
    fast = kind_of_model
    expected = fast(images())
    with mode():
        y = fast(images())
    assert torch.equal(y, expected)
    assert y.is_inference() == (mode is torch.inference_mode)
    with torch.inference_mode():
        made = mk.optimize_for_inference(make())
        x = images() + 0
    assert torch.equal(made(x), mk.optimize_for_inference(make())(x))


# --- compilers ---


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


DYNAMIC = (dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO),)
SIZES = ((2, 64, 56), (5, 64, 56), (3, 40, 71), (1, 33, 33))


def operators(graph):
    return {str(node.target) for node in graph.nodes if node.op == "call_function"}


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiles_without_a_graph_break(kind_of_model):
    fast = kind_of_model
    counter = pytest.importorskip("torch._dynamo.testing").CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fast, fullgraph=True, backend=counter, dynamic=True)
    for size in SIZES[:3]:
        assert torch.allclose(compiled(images(*size)), fast(images(*size)), rtol=1e-4, atol=1e-5)
    [graph] = [graph.graph for graph in counter.graphs if operators(graph.graph)]
    one = images(*SIZES[3])  # a batch of one may have a graph of its own
    assert torch.allclose(compiled(one), fast(one), rtol=1e-4, atol=1e-5)
    assert any("gated_cnn_blocks" in operator for operator in operators(graph))


@NEEDS_COMPILER
@pytest.mark.usefixtures("_fresh_compiler", "_scalar_loops")
def test_inductor(fast):
    compiled = torch.compile(fast, fullgraph=True)
    assert torch.equal(compiled(images()), fast(images()))


def test_export_save_and_load(kind_of_model, tmp_path):
    fast = kind_of_model
    program = torch.export.export(fast, (images(),), dynamic_shapes=DYNAMIC)
    assert "mambaout_kernels.gated_cnn_blocks.default" in operators(program.graph)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2")
    for size in SIZES:
        for one in (program, loaded):
            # what is not fused is traced as in training, whose sums may have another order
            torch.testing.assert_close(one.module()(images(*size)), fast(images(*size)))


def test_exports_of_a_whole_fused_model_hold_our_ops_and_views_alone(fast):
    program = torch.export.export(fast, (images(),), dynamic_shapes=DYNAMIC)
    ours = {f"mambaout_kernels.{op}.default" for op in ("conv3x3s2", "gated_cnn_blocks", "head")}
    computing = {op for op in operators(program.graph) if op.startswith(("mambaout", "aten"))} - {
        "aten.permute.default"
    }
    assert computing - {"aten.sym_size.int"} == ours


@NEEDS_COMPILER
@pytest.mark.usefixtures("_scalar_loops")
def test_aotinductor(fast, tmp_path):
    program = torch.export.export(fast, (images(),), dynamic_shapes=DYNAMIC)
    with torch._inductor.config.patch({"aot_inductor.precompile_headers": False}):  # for two files they take longer
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    loaded = torch._inductor.aoti_load_package(path)
    for size in SIZES[:3]:
        assert torch.allclose(loaded(images(*size)), fast(images(*size)), rtol=1e-4, atol=1e-5)
