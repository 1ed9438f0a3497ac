"""The package as a kernel of the Hugging Face hub (packaging/), loaded beside the installed package."""

import importlib.util
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from numerics import assert_model_accurate, check_outputs, make_inputs
from torch import nn

import mambaout_kernels as mk
from mambaout_kernels.backends import cpu
from mambaout_kernels.version import __version__

pytest.importorskip("tomllib")
kernels = pytest.importorskip("kernels", minversion="0.17")
timm = pytest.importorskip("timm")
rust = pytest.importorskip("kernels._rust")  # its own parsers

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("hub_kernel", ROOT / "packaging" / "hub_kernel.py")
hub_kernel = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hub_kernel)

Block = timm.models.mambaout.GatedConvBlock


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With the compiled kernels where there are any: they are the installed package's, copied."""
    out = tmp_path_factory.mktemp("kernel")
    wheels = []
    if cpu.module is not None:
        wheels = [out / f"mambaout_kernels-{__version__}-cp311-cp311-manylinux_2_28_x86_64.whl"]
        with zipfile.ZipFile(wheels[0], "w") as archive:
            archive.write(cpu.module.__file__, f"mambaout_kernels/{Path(cpu.module.__file__).name}")
    hub_kernel.write_kernel(out, wheels)
    return out


@pytest.fixture(scope="module")
def compiled(folder):
    """The variant's folder: a torch for CUDA would otherwise take the one for CUDA."""
    variants = [path for path in (folder / "build").iterdir() if "stable-abi" in path.name]
    if not variants:
        pytest.skip("no compiled kernels")
    return variants[0]


@pytest.fixture(scope="module")
def kernel(compiled):
    return kernels.get_local_kernel(compiled)


def test_variants_are_as_kernels_reads_them(folder):
    ids = set()
    for variant in (folder / "build").iterdir():
        metadata = rust.Metadata.read_from_file(variant / "metadata.json")
        metadata.digest.validate(rust.Digest.hash_variant(rust.DigestAlgorithm.SHA256, variant))
        assert metadata.id.isidentifier()
        assert (str(metadata.name), metadata.python_depends) == ("mambaout-kernels", [])
        ids.add(metadata.id)
    assert len(ids) == 3 + (cpu.module is not None)
    assert {str(backend).lower() for backend in rust.Build.open(folder).general.backends} == {"cpu", "cuda", "rocm"}


def test_kernels_chooses_the_compiled_variant(compiled):
    from kernels.variants import get_variants_local, resolve_variant

    if not (sys.platform == "linux" and cpu.module.__file__.endswith("x86_64-linux-gnu.so")):
        pytest.skip("the fixture's wheel is said to be for Linux on x86_64")
    chosen, _ = resolve_variant(get_variants_local(compiled.parent), "cpu")
    assert chosen.variant_str == compiled.name
    names = {chosen.variant_str for chosen in get_variants_local(compiled.parent)}
    assert names == {path.name for path in compiled.parent.iterdir()}


def test_a_copy_has_ops_of_its_own(kernel):
    from mambaout_kernels.ops.gated_dwconv import _op

    name = kernel.__name__
    assert name.startswith("_mambaout_kernels_cpu_")
    own = sys.modules[f"{name}.ops.gated_dwconv"]._op
    assert (own.namespace, _op.namespace) == (name, "mambaout_kernels")
    theirs = sys.modules[f"{name}.backends.cpu"]
    assert theirs.unavailable() is None
    assert theirs._forward.namespace == name
    assert cpu._forward.namespace == "mambaout_kernels"
    assert kernel.MambaOut is not mk.MambaOut


def check_op(package):
    inputs = make_inputs(2, 9, 8, 24, 16, 7)
    leaves = [t.clone().requires_grad_() for t in inputs]
    y = package.gated_dwconv(*leaves, "gelu")
    check_outputs(package.__name__, (y.detach(), *torch.autograd.grad(y, leaves, inputs.dy)), inputs, "gelu")


def test_both_compute(kernel):
    check_op(kernel)
    check_op(mk)


def test_inference_models_of_both(kernel):
    torch.manual_seed(0)
    model, x = mk.create_model("test_mambaout").eval(), torch.randn(1, 3, 64, 64)
    copy = kernel.create_model("test_mambaout").eval()
    copy.load_state_dict(model.state_dict())
    assert torch.equal(kernel.optimize_for_inference(copy)(x), mk.optimize_for_inference(model)(x))


def test_python_alone_computes(folder):
    python = kernels.get_local_kernel(folder / "build" / "torch-cpu")
    assert "No module named" in python.backends.status()["cpu"]
    with python.backends.force("reference"):
        check_op(python)


def results(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits, and in training the gradient of every parameter of a fixed loss."""
    if not model.training:
        with torch.no_grad():
            return {"y": model(x)}
    y = model(x)
    gradients = torch.autograd.grad(y.square().mean(), list(model.parameters()))
    return {"y": y.detach(), **dict(zip(dict(model.named_parameters()), gradients, strict=True))}


def randomised(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(("gamma" in name) + 0.2 * torch.randn(p.shape, generator=generator))
    return model


@pytest.fixture
def mapping(compiled, monkeypatch):
    """timm's blocks can be kernelized, inside."""
    for name in ("kernel_layer_name", "kernel_condition"):
        monkeypatch.setattr(Block, name, None, raising=False)  # taken away afterwards
    kernels.replace_kernel_forward_from_hub(Block, "GatedConvBlock")
    layer = kernels.LocalLayerRepository(compiled, layer_name="GatedConvBlock")
    with kernels.use_kernel_mapping({"GatedConvBlock": {"cpu": layer}}, inherit_mapping=False):
        yield


@pytest.mark.parametrize("mode", ["INFERENCE", "TRAINING"])
def test_kernelized_timm_model(mode, kernel, mapping):
    theirs = randomised(timm.create_model("test_mambaout", num_classes=7)).train(mode == "TRAINING")
    exact = randomised(timm.create_model("test_mambaout", num_classes=7)).double().train(mode == "TRAINING")
    exact.load_state_dict(theirs.state_dict())
    ours = randomised(timm.create_model("test_mambaout", num_classes=7)).train(mode == "TRAINING")
    kernels.kernelize(ours, mode=kernels.Mode[mode], device="cpu", use_fallback=False)
    blocks = [module for module in ours.modules() if isinstance(module, Block)]
    assert len(blocks) == 6
    assert all(block.forward.__func__ is kernel.layers.GatedConvBlock.forward for block in blocks)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    assert_model_accurate(results(ours, x), results(theirs, x), results(exact, x.double()))


@pytest.mark.parametrize("options", [{"ls_init_value": 0.5}, {"expansion_ratio": 2.5, "conv_ratio": 1.25}])
def test_kernelized_block_calls_the_op_and_drops_as_timm(options, kernel, mapping):
    torch.manual_seed(0)
    theirs = randomised(Block(16, drop_path=0.5, **options))
    ours = randomised(Block(16, drop_path=0.5, **options))
    kernels.kernelize(ours, mode=kernels.Mode.TRAINING, device="cpu", use_fallback=False)
    x = torch.randn(8, 6, 5, 16)
    found = []
    for block in (ours, theirs):
        torch.manual_seed(2)
        found.append(block(x))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ours(x)
    assert f"{kernel.__name__}::gated_dwconv_cpu" in {event.key for event in profile.key_averages()}


def test_kernelized_block_compiles(mapping):
    block = randomised(Block(16))
    mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
    kernels.kernelize(block, mode=mode, device="cpu", use_fallback=False)
    x = torch.randn(1, 5, 6, 16)
    expected = results(block, x)
    block.compile(backend="aot_eager", fullgraph=True)
    for name, found in results(block, x).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-5, atol=1e-6)


def test_a_parameter_that_changes_is_read_again(mapping):
    """The layer keeps nothing."""
    block = randomised(Block(16)).eval()
    kernels.kernelize(block, mode=kernels.Mode.INFERENCE, device="cpu", use_fallback=False)
    x = torch.randn(1, 5, 6, 16)
    before = block(x)
    with torch.no_grad():
        block.fc2.weight.zero_()
        block.fc2.bias.zero_()
    assert not torch.equal(block(x), before)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mambaout_kernels-1-py3-none-any.whl", "is for none of x86_64"),
        ("mambaout_kernels-1-cp311-cp311-win_amd64.whl", "is for none of x86_64"),
        ("mambaout_kernels-1-cp311-cp311-macosx_11_0_arm64.whl", "has no compiled CPU kernels"),
    ],
)
def test_refuses_wheels_of_another_kind(name, words, tmp_path):
    zipfile.ZipFile(tmp_path / name, "w").close()
    with pytest.raises(ValueError, match=words):
        hub_kernel.write_kernel(tmp_path / "out", [tmp_path / name])
    assert not (tmp_path / "out").exists()


def test_writes_over_nothing(folder):
    with pytest.raises(FileExistsError, match="build exists"):
        hub_kernel.write_kernel(folder, [])
