"""Inference models in files: bit for bit there and back, on other processors, and every kind of wrong file refused."""

import json
import re

import pytest
import torch
from torch import nn

import mambaout_kernels as mk
from mambaout_kernels.backends import cpu
from mambaout_kernels.benchmarking.inputs import enlivened
from mambaout_kernels.inference.parts import PackedPart

safetensors = pytest.importorskip("safetensors.torch")
pytestmark = [
    pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable())),
    pytest.mark.filterwarnings("ignore:FusedGatedCNNBlock runs as separate:RuntimeWarning"),
]

ISAS = [] if cpu.module is None else cpu.module.supported_cpu_capabilities()
SMALL = {"depths": (1, 2), "dims": (16, 24), "num_classes": 9, "ls_init_value": 0.5}
NEW = {"downsample": "conv_nf", "head_fn": "norm_mlp", "stem_mid_norm": False, "act_layer": "silu"}


def make(**options):
    return enlivened(mk.MambaOut(**{**SMALL, **options})).eval()


def timm_model(**options):
    return pytest.importorskip("timm").create_model("test_mambaout", **{"num_classes": 9, **options})


def images(n=2, h=64, w=56):
    return torch.randn(n, 3, h, w, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a model.safetensors"


def saved(model, path, **options):
    fast = mk.optimize_for_inference(model, **options)
    fast.save(path)
    return fast


def read(path):
    with safetensors.safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def assert_equal_files(path, other):
    """But for the order of the metadata, which safetensors shuffles."""
    (state, metadata), (other_state, other_metadata) = read(path), read(other)
    assert metadata == other_metadata
    assert state.keys() == other_state.keys()
    assert all(torch.equal(t, other_state[name]) for name, t in state.items())


def refused(path, said, **options):
    """As a ValueError that names the path."""
    with pytest.raises(ValueError, match=said) as error:
        mk.load_inference_model(path, **options)
    assert str(path) in str(error.value)


# --- there and back ---


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, NEW, {"num_classes": 0}, {"in_chans": 4, "causal": True}], ids=str)
def test_ours_there_and_back(isa, path, options, dtype):
    fast = saved(make(**options), path, dtype=dtype)
    loaded = mk.load_inference_model(path)
    x = torch.randn(2, options.get("in_chans", 3), 47, 64)
    assert torch.equal(loaded(x), fast(x))
    assert loaded.report() == fast.report()
    assert loaded.dtype == fast.dtype
    assert {n: t.dtype for n, t in loaded.state_dict().items()} == {n: t.dtype for n, t in fast.state_dict().items()}
    assert all(torch.equal(t, fast.state_dict()[name]) for name, t in loaded.state_dict().items())
    assert not any(p.requires_grad for p in loaded.parameters())
    loaded.save(path.with_name("again"))
    assert_equal_files(path, path.with_name("again"))


@pytest.mark.parametrize("weights", ["random", "zero", "NaN"])
@pytest.mark.parametrize("options", [{}, {"head_fn": "default", "downsample": "conv", "stem_mid_norm": True}], ids=str)
def test_timms_with_a_model_whose_weights_do_not_matter(path, options, weights):
    fast = saved(enlivened(timm_model(**options)), path)
    skeleton = timm_model(**options, drop_path_rate=0.2, drop_rate=0.1)
    for p in skeleton.parameters():
        p.data.fill_({"zero": 0.0, "NaN": torch.nan}.get(weights, 0.5)) if weights != "random" else None
    before = {name: t.clone() for name, t in skeleton.state_dict().items()}
    loaded = mk.load_inference_model(path, model=skeleton)
    assert torch.equal(loaded(images()), fast(images()))
    assert all(torch.equal(t.nan_to_num(7), before[name].nan_to_num(7)) for name, t in skeleton.state_dict().items())
    refused(path, "model must be given for .* does not say how to build one")


def test_what_runs_through_its_modules_is_in_the_file_too(path):
    def changed():
        model = make()
        model.stages[1][0].act = nn.ReLU()
        model.head.act = nn.SiLU()
        return model

    fast = saved(changed(), path)
    loaded = mk.load_inference_model(path, model=changed())
    assert torch.equal(loaded(images()), fast(images()))
    refused(path, r"does not fit the model in \d+ tensors: head\.")


def test_tied_weights(path):
    block = enlivened(mk.FusedGatedCNNBlock(12)).eval()
    block.act = nn.ReLU()
    fast = saved(nn.Sequential(block, block), path)
    x = torch.randn(1, 5, 6, 12)
    other = mk.FusedGatedCNNBlock(12)
    other.act = nn.ReLU()
    assert torch.equal(mk.load_inference_model(path, model=nn.Sequential(other, other))(x), fast(x))


@pytest.mark.skipif(len(ISAS) < 2, reason="one instruction set here")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["ours", "timm"])
def test_files_of_another_instruction_set(path, kind, dtype):
    before = cpu.instruction_set()
    model = enlivened(timm_model()) if kind == "timm" else make()
    given = {"model": timm_model()} if kind == "timm" else {}
    try:
        for theirs in ISAS:
            cpu.module.set_cpu_capability(theirs)
            of_theirs = saved(model, path, dtype=dtype)(images())
            for ours in ISAS:
                cpu.module.set_cpu_capability(ours)
                loaded = mk.load_inference_model(path, **given)
                assert not [part for part in loaded.report() if not part.fused]
                found = loaded(images())
                if ours == theirs:
                    assert torch.equal(found, of_theirs)
                # other orders of sums; a low dtype rounds each map
                share = 1e-5 if dtype is None else 3e-2
                assert (found - of_theirs).abs().max() <= share * of_theirs.abs().max()
                if dtype is None:
                    assert torch.equal(found, mk.optimize_for_inference(model)(images()))
    finally:
        cpu.module.set_cpu_capability(before)


def test_loaded_weights_have_their_own_aligned_memory(path):
    saved(make(), path)
    loaded = mk.load_inference_model(path)
    path.write_bytes(b"\0" * path.stat().st_size)  # a mapped file would follow
    assert not loaded(images()).isnan().any()
    for part in loaded.modules():
        if isinstance(part, PackedPart):
            assert all(getattr(part, name).data_ptr() % 64 == 0 for name in part.packed_names)


def test_equal_models_are_equal_files(path):
    saved(make(), path)
    saved(make(), path.with_name("again"))
    assert_equal_files(path, path.with_name("again"))


# --- what a file cannot say by its tensors ---


CHANGES = {
    "eps before the head": lambda m: setattr(m.norm, "eps", 0.5),
    "eps in the head": lambda m: setattr(m.head.norm, "eps", 0.5),
    "eps before a downsampling": lambda m: setattr(m.downsample_layers[1].norm, "eps", 0.5),
    "something appended": lambda m: m.stages[0].append(nn.Tanh()),
    "a setting of what is not fused": lambda m: setattr(m.stages[0][0], "act", nn.LeakyReLU(0.5)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_settings_are_not_lost(path, change):
    model = make(downsample="conv_nf")
    CHANGES[change](model)
    fast = saved(model, path)
    refused(path, "does not fit the model")
    skeleton = make(downsample="conv_nf")
    refused(path, "does not fit the model", model=skeleton)
    CHANGES[change](skeleton)
    assert torch.equal(mk.load_inference_model(path, model=skeleton)(images()), fast(images()))


def test_what_is_packed_with_the_weights_is_the_files(path):
    """A block's act and its norm's eps lie in the packed weights."""
    model = make()
    model.stages[0][0].norm.eps, model.stages[0][0].act = 0.5, nn.SiLU()
    fast = saved(model, path)
    assert torch.equal(mk.load_inference_model(path)(images()), fast(images()))


def test_classes_and_hooks_that_create_model_does_not_make_need_a_model(path):
    class Doubled(mk.MambaOut):
        def forward(self, x):
            return 2 * super().forward(x)

    saved(Doubled(**SMALL), path)
    refused(path, "model must be given for")
    hooked = make()
    hooked.stages[0].register_forward_hook(lambda module, args, output: 2 * output)
    fast = saved(hooked, path)
    refused(path, "model must be given for")
    assert torch.equal(mk.load_inference_model(path, model=hooked)(images()), fast(images()))


# --- wrong files ---


def test_no_file(path):
    with pytest.raises(FileNotFoundError, match=re.escape(f"path: {path} does not exist, or is no file")):
        mk.load_inference_model(path)
    with pytest.raises(FileNotFoundError, match="does not exist, or is no file"):
        mk.load_inference_model(path.parent)


def test_other_files(path):
    for content in (b"", b"{}", b"\0" * 200, b"PK\3\4" + b"x" * 5000, (2**62).to_bytes(8, "little") + b"{}" * 99):
        path.write_bytes(content)
        refused(path, "is not a complete safetensors file")
    torch.save(make().state_dict(), path)
    refused(path, "is not a complete safetensors file")


def test_foreign_safetensors(path):
    safetensors.save_file(make().state_dict(), path)
    refused(path, "is not an inference model; from_pretrained and load_checkpoint read the weights of models")
    safetensors.save_file(make().state_dict(), path, {"format": "pt"})
    refused(path, "is not an inference model")


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9, 0.9999])
def test_truncated_files(path, share):
    saved(make(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    refused(path, "is not a complete safetensors file")


def test_another_architecture(path):
    saved(make(), path)
    for other, said in (
        (make(dims=(16, 32)), "does not fit the model: "),
        (make(depths=(1, 1)), r"stages\.1\.0\.packed is \[.*\), \(.*\)\], not \[[^)]*\)\]"),
        (make(num_classes=10), r"fc2_bias is \(9,\), not \(10,\)|fc2_weight is \(9, 96\), not \(10, 96\)"),
        (make(head_fn="norm_mlp"), r"does not fit the model in 2 tensors: head\.mid_bias, head\.mid_weight"),
        (make(kernel_size=5), r"stages\.0\.0\.packed is \[\(1, 16, 42, 16, 7\)\], not \[\(1, 16, 42, 16, 5\)\]"),
        (make(depths=(1, 2, 1), dims=(16, 24, 32)), "does not fit the model in "),
        (timm_model(), "does not fit the model in "),
    ):
        refused(path, said, model=other)
    with pytest.raises(ValueError, match="Linear has no Gated CNN block"):
        mk.load_inference_model(path, model=nn.Linear(3, 3))


def rewritten(path, change):
    state, metadata = read(path)
    change(state, metadata)
    safetensors.save_file(state, path, metadata)


def packed_names(state):
    return [name for name in state if "packed" in name]


@pytest.mark.parametrize("at", range(14))
def test_damaged_headers_of_packed_weights(path, at):
    """Refused, or loaded into a model that computes or refuses: nothing else is read, and nothing crashes."""
    saved(make(), path)
    state, _ = read(path)
    undamaged = path.read_bytes()
    for name in packed_names(state):
        for value in {-1, 0, 3, 2**40} - {state[name].view(torch.int64)[at].item()}:
            path.write_bytes(undamaged)
            rewritten(path, lambda state, _, name=name, value=value: state[name].view(torch.int64)[at].fill_(value))
            try:
                loaded = mk.load_inference_model(path)
            except ValueError as error:
                assert str(path) in str(error)  # noqa: PT017 (some are not refused)
            else:
                assert at in (7, 8, 9, 12)  # of which other values are valid
                assert loaded(images()).shape == (2, 9)


def test_damaged_tensors(path):
    name = "stages.0.0.packed"
    for change, said in (
        (lambda state, _: state.update({name: state[name][:-64]}), "holds damaged weights: .*packed"),
        (lambda state, _: state.update({name: state[name][:0]}), "holds damaged weights"),
        (lambda state, _: state.update({name: torch.zeros(4096, dtype=torch.uint8)}), "holds damaged weights"),
        (lambda state, _: state.update({name: state[name].view(torch.float32)}), "holds damaged weights"),
        (
            lambda state, _: state.update({name: state["stages.1.0.packed"].clone()}),
            "does not fit the model: stages.0.0",
        ),
        (lambda state, _: state.update({name: state["downsample_layers.1.packed"].clone()}), "holds damaged weights"),
        (lambda state, _: state.update({"norm.weight": torch.ones(3)}), r"norm.weight is \(3,\), not \(24,\)"),
        (lambda state, _: state.update({"head.fc1_weight": torch.ones(3)}), r"head.fc1_weight is \(3,\)"),
        (lambda state, _: state.pop(name), rf"does not fit the model in 1 tensors: {name}"),
        (lambda state, _: state.update({"more": torch.ones(3)}), "does not fit the model in 1 tensors: more"),
    ):
        saved(make(), path)
        rewritten(path, change)
        refused(path, said)


def enlarged(metadata, key):
    """An architecture that would take all memory, or all time, to build."""
    architecture = json.loads(metadata["architecture"])
    return json.dumps({**architecture, key: [*architecture[key][:-1], 10**8]})


def test_damaged_metadata(path):
    for change, said in (
        (lambda metadata: metadata.pop("dtype"), "damaged metadata"),
        (lambda metadata: metadata.update(dtype="nn"), "damaged metadata"),
        (lambda metadata: metadata.update(dtype="int8"), "damaged metadata"),
        (lambda metadata: metadata.update(architecture="{"), "damaged metadata"),
        (lambda metadata: metadata.update(architecture="[]"), "damaged metadata"),
        (lambda metadata: metadata.update(architecture='{"widths": 3}'), "damaged metadata.*widths"),
        (lambda metadata: metadata.update(architecture=enlarged(metadata, "dims")), "more weights than the .* bytes"),
        (lambda metadata: metadata.update(architecture=enlarged(metadata, "depths")), "more weights than the .* bytes"),
        (lambda metadata: metadata.pop("modules"), "damaged metadata"),
        (lambda metadata: metadata.update(modules="[]"), "damaged metadata"),
        (lambda metadata: metadata.update(modules=json.dumps({"": "x"})), "damaged metadata"),
        (lambda metadata: metadata.update(modules="{}"), "does not fit the model"),
        (lambda metadata: metadata.pop("architecture"), "model must be given"),
        (lambda metadata: metadata.pop("format"), "is not an inference model"),
    ):
        saved(make(), path)
        rewritten(path, lambda _, metadata, change=change: change(metadata))
        refused(path, said)


def test_without_safetensors(path, monkeypatch):
    fast = saved(make(), path)
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    for call in (lambda: fast.save(path), lambda: mk.load_inference_model(path)):
        with pytest.raises(ImportError, match="inference models in files need the safetensors package: pip install"):
            call()
