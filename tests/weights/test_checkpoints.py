import argparse
import copy
import os
import pickle
import sys
import tarfile
import zipfile

import pytest
import torch
from on_meta import timm_model

from mambaout_kernels.models import VARIANTS, create_model
from mambaout_kernels.weights.checkpoints import describe, load_checkpoint, load_into, to_authors, to_timm


@pytest.fixture(scope="module", params=["default", "rw"])
def model(request):
    """A small model in each of the two layouts, with distinct values in every parameter."""
    options = {"stem_mid_norm": True, "head_fn": "default", "downsample": "conv", "ls_init_value": None}
    torch.manual_seed(0)
    model = create_model("test_mambaout", **(options if request.param == "default" else {}))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    return model


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return create_model("test_mambaout")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def save(path, content, legacy=False):
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(content, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)


@pytest.mark.parametrize("name", VARIANTS)
def test_key_maps_are_inverse_and_give_timms_names(name):
    pytest.importorskip("timm")
    with torch.device("meta"):
        ours, theirs = create_model(name).state_dict(), timm_model(name).state_dict()
    translated = to_timm(ours)
    assert {key: value.shape for key, value in translated.items()} == {k: v.shape for k, v in theirs.items()}
    again = to_authors(translated)
    assert list(again) == list(ours)
    assert all(again[key] is ours[key] for key in ours)
    assert list(to_timm(to_authors(theirs))) == list(theirs)


@pytest.mark.parametrize("key", ["layers.0.weight", "stages.0.0", "head.fc3.weight", "xnorm.weight", "head.fc.weight"])
def test_unknown_key(key, small):
    with pytest.raises(ValueError, match=f"key '{key}' does not belong to a MambaOut in the authors' layout"):
        to_timm({**small.state_dict(), key: torch.zeros(1)})


@pytest.mark.parametrize("layout", ["authors", "timm"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin"])
def test_load(suffix, layout, model, tmp_path):
    path = tmp_path / f"weights{suffix}"
    expected = model.state_dict()
    content = expected if layout == "authors" else to_timm(expected)
    save(path, content)
    assert equal(load_checkpoint(path), expected)
    assert equal(load_checkpoint(str(path)), expected)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("wrapper", ["model", "state_dict", "state_dict_ema", "model_ema"])
def test_training_checkpoints(wrapper, prefix, small, tmp_path):
    weights = {prefix + key: value for key, value in small.state_dict().items()}
    arguments = argparse.Namespace(lr=1e-3, model="mambaout_tiny")
    torch.save({"epoch": 3, wrapper: weights, "args": arguments, "optimizer": {"state": {}}}, tmp_path / "last.pth.tar")
    assert equal(load_checkpoint(tmp_path / "last.pth.tar"), small.state_dict())


def test_averaged_weights_are_preferred(small, tmp_path):
    own = small.state_dict()
    averaged = {key: value + 1 for key, value in own.items()}
    torch.save({"state_dict": own, "state_dict_ema": averaged}, tmp_path / "a.pth")
    assert equal(load_checkpoint(tmp_path / "a.pth"), averaged)
    assert equal(load_checkpoint(tmp_path / "a.pth", ema=False), own)


def test_load_into(model, tmp_path):
    torch.save({"model": model.state_dict()}, tmp_path / "a.pth")
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    pointers = [p.data_ptr() for p in other.parameters()]
    other.to(torch.float32)
    load_into(other, tmp_path / "a.pth")
    assert equal(other.state_dict(), model.state_dict())
    assert [p.data_ptr() for p in other.parameters()] == pointers
    half = copy.deepcopy(other).bfloat16()
    load_into(half, tmp_path / "a.pth")
    assert all(p.dtype == torch.bfloat16 for p in half.parameters())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_else_a_file_holds_takes_no_memory(small, tmp_path, monkeypatch):
    path = tmp_path / "last.pth"
    torch.save({"model": small.state_dict(), "optimizer": torch.zeros(25_000_000)}, path)
    load, taken = torch.load, []

    def anonymous_bytes():
        with open("/proc/self/status") as file:
            return 1024 * next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))

    def measured(*args, **kwargs):
        before = anonymous_bytes()
        content = load(*args, **kwargs)
        taken.append(anonymous_bytes() - before)
        return content

    monkeypatch.setattr(torch, "load", measured)
    load_into(copy.deepcopy(small), path)
    assert taken[0] < 20_000_000


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_was_loaded_outlives_the_file(suffix, small, tmp_path):
    path = tmp_path / f"a{suffix}"
    expected = {key: value + 1 for key, value in small.state_dict().items()}
    save(path, expected)
    model = copy.deepcopy(small)
    load_into(model, path)
    path.write_bytes(b"")
    assert equal(model.state_dict(), expected)


class TouchesAFile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_safetensors_package_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    (tmp_path / "a.safetensors").touch()
    with pytest.raises(ImportError, match=r"a\.safetensors needs the safetensors package: pip install safetensors"):
        load_checkpoint(tmp_path / "a.safetensors")


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def with_code(path, state_dict):
    return {"model": state_dict, "extra": TouchesAFile(str(path.parent / "pwned"))}


def compress(path, state_dict):
    """A file of some kilobytes that unpacks to 20 megabytes."""
    save(path, {**state_dict, "head.fc2.weight": torch.zeros(20_000, 256)})
    with zipfile.ZipFile(path) as file:
        records = {record.filename: file.read(record) for record in file.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in records.items():
            file.writestr(name, content)


def make_hole(path, state_dict):
    with path.open("wb") as file:
        file.truncate(1 << 40)  # takes no room on the disk


class BytesBeyondMemory:
    def __reduce__(self):
        return bytearray, (1 << 60,)


# kind: (file name, what to write there, given a path and a good state_dict; words of the error)
BAD_FILES = {
    "missing": ("a.pth", lambda path, sd: None, "does not exist"),
    "folder": ("a.pth", lambda path, sd: path.mkdir(), "is a folder, not a file"),
    "pipe": ("a.pth", lambda path, sd: os.mkfifo(path), "is not a regular file"),
    "name too long": (300 * "x" + ".pth", lambda path, sd: None, "cannot be read: File name too long"),
    "another type": ("a.onnx", save, "ends in '.onnx'; allowed: .safetensors, .pth"),
    "truncated": ("a.pth", lambda path, sd: (save(path, sd), halve(path)), "truncated"),
    "truncated legacy": ("a.pth", lambda path, sd: (save(path, sd, legacy=True), halve(path)), "truncated"),
    "truncated safetensors": ("a.safetensors", lambda path, sd: (save(path, sd), halve(path)), "not a complete"),
    "empty file": ("a.pth", lambda path, sd: path.touch(), "truncated"),
    "empty safetensors": ("a.safetensors", lambda path, sd: (save(path, sd), path.write_bytes(b"")), "not a complete"),
    "text": ("a.pth", lambda path, sd: path.write_text("<html>"), "not written by torch.save"),
    "text safetensors": (
        "a.safetensors",
        lambda path, sd: (save(path, sd), path.write_text("<p>" * 9)),
        "not a complete",
    ),
    "code": ("a.pth", lambda path, sd: save(path, with_code(path, sd)), r"refused: .* a pickled (posix|nt)\.mkdir"),
    "code legacy": ("a.pth", lambda path, sd: save(path, with_code(path, sd), legacy=True), r"refused: .*\.mkdir"),
    "code bare": ("a.pth", lambda path, sd: path.write_bytes(pickle.dumps(with_code(path, sd), 2)), "refused"),
    "list": ("a.pth", lambda path, sd: save(path, [1, 2]), "holds no state_dict, but a list"),
    "empty dict": ("a.pth", lambda path, sd: save(path, {}), "holds no state_dict, but an empty dict"),
    "not tensors": ("a.pth", lambda path, sd: save(path, {"model": {"norm.bias": 1.0}}), "'norm.bias' is a float"),
    "tensor": ("a.pth", lambda path, sd: save(path, torch.ones(3)), "holds no state_dict, but a Tensor"),
    "pickled list": ("a.pth", lambda path, sd: path.write_bytes(pickle.dumps([1, 2], 2)), "not written by torch.save"),
    "tar": ("a.tar", lambda path, sd: tarfile.open(path, "w").close(), "old .tar files are not read"),
    "compressed": ("a.pth", compress, "its records are compressed"),
    "hole": ("a.pth", make_hole, "truncated, damaged, or was not written by torch.save"),
    "hole safetensors": ("a.safetensors", make_hole, "not a complete safetensors file"),
    "memory": ("a.pth", lambda path, sd: save(path, {"model": BytesBeyondMemory()}), "not written by torch.save: Mem"),
    "another net": ("a.pth", lambda path, sd: save(path, {"fc.weight": torch.ones(3)}), "not a MambaOut .*'fc.weight'"),
    "two layouts": ("a.pth", lambda path, sd: save(path, {**sd, **to_timm(sd)}), "not a MambaOut .*'downsample_lay"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files(kind, small, tmp_path):
    name, write, message = BAD_FILES[kind]
    write(tmp_path / name, small.state_dict())
    before = copy.deepcopy(small.state_dict())
    of_system = {"missing": FileNotFoundError, "folder": IsADirectoryError, "pipe": OSError, "name too long": OSError}
    with pytest.raises(of_system.get(kind, ValueError), match=message) as caught:
        load_into(small, tmp_path / name)
    assert str(caught.value).startswith(f"path: {tmp_path / name} ")
    assert "weights_only=False" not in str(caught.value)
    assert equal(small.state_dict(), before)
    assert not (tmp_path / "pwned").exists()


@pytest.fixture
def without_privileges():
    """Root may read everything: act as nobody, who may not enter this test's folder."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_that_may_not_be_read(suffix, small, tmp_path, request):
    path = tmp_path / f"a{suffix}"
    save(path, small.state_dict())
    path.chmod(0)
    request.getfixturevalue("without_privileges")
    with pytest.raises(PermissionError) as caught:
        load_into(small, path)
    assert str(caught.value) == f"path: {path} cannot be read: Permission denied"


# kind: (the tensor of a file in place of head.fc1.weight, words of the error)
NOT_PLAIN = {
    "sparse": (lambda t: t.to_sparse(), "in layout torch.sparse_coo"),
    "CSR": (lambda t: t.to_sparse_csr(), "in layout torch.sparse_csr"),
    "meta": (lambda t: t.to("meta"), "on the meta device, without values"),
    "quantized": (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "as a quantized tensor"),
    "nested": (lambda t: torch.nested.nested_tensor(list(t)), "as a nested tensor"),
    "jagged": (lambda t: torch.nested.nested_tensor(list(t), layout=torch.jagged), "as a NestedTensor"),
    "expanded": (lambda t: t[:1].expand(t.shape), "expanded: elements share memory"),
    "overlapping": (lambda t: torch.ones(319).as_strided(t.shape, (1, 1)), "with 16384 elements in memory for 319"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, that sparse and nested tensors are in beta
@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_a_tensor_that_is_not_plain_leaves_the_model_untouched(kind, small, tmp_path):
    make, said = NOT_PLAIN[kind]
    changed = {key: value + 1 for key, value in small.state_dict().items()}
    torch.save({**changed, "head.fc1.weight": make(changed["head.fc1.weight"].clone())}, tmp_path / "a.pth")
    before = copy.deepcopy(small.state_dict())
    with pytest.raises(ValueError, match=rf"a\.pth holds 'head\.fc1\.weight' {said}; allowed: dense tensors"):
        load_into(small, tmp_path / "a.pth")
    assert equal(small.state_dict(), before)


def unwritable_meta(norm):
    norm.bias = torch.nn.Parameter(norm.bias.to("meta"))


def unwritable_expanded(norm):
    norm.bias = torch.nn.Parameter(norm.bias.detach()[:1].expand(64))


def unwritable_inference(norm):
    with torch.inference_mode():
        norm._parameters["bias"] = torch.zeros(64)


def unwritable_released(norm):
    norm.bias.untyped_storage().resize_(0)


UNWRITABLE = {
    unwritable_meta: "on the meta device, without values",
    unwritable_expanded: "expanded: elements share memory",
    unwritable_inference: r"as an inference tensor, which only torch\.inference_mode\(\) can write",
    unwritable_released: "with 64 elements in memory for 0",
}


@pytest.mark.parametrize("change", UNWRITABLE, ids=lambda change: change.__name__)
def test_a_model_that_cannot_be_written_is_left_untouched(change, small, tmp_path):
    torch.save({key: value + 1 for key, value in small.state_dict().items()}, tmp_path / "a.pth")
    model, others = copy.deepcopy(small), drop(small.state_dict(), "norm.bias")
    change(model.norm)
    with pytest.raises(ValueError, match=f"^model has 'norm.bias' {UNWRITABLE[change]}: .*cannot be loaded into it"):
        load_into(model, tmp_path / "a.pth")
    assert equal(drop(model.state_dict(), "norm.bias"), others)


def test_inference_tensors_are_written_in_inference_mode(small, tmp_path):
    expected = {key: value + 1 for key, value in small.state_dict().items()}
    torch.save(expected, tmp_path / "a.pth")
    model = copy.deepcopy(small)
    unwritable_inference(model.norm)
    with torch.inference_mode():
        load_into(model, tmp_path / "a.pth")
    assert equal(model.state_dict(), expected)


def drop(state_dict, key):
    return {k: v for k, v in state_dict.items() if k != key}


MISFITS = {
    "missing key": (lambda sd: drop(sd, "norm.bias"), "in 1 of 78 tensors: norm.bias is missing"),
    "extra key": (lambda sd: {**sd, "head.norm.bias": torch.ones(4)}, "head.norm.bias is not in the model"),
    "wrong shape": (
        lambda sd: {**sd, "norm.bias": torch.ones(5)},
        r"norm.bias is \(5,\), the model's \(64,\)",
    ),
    "wrong dtype": (
        lambda sd: {**sd, "norm.bias": torch.ones(64, dtype=torch.int64)},
        "norm.bias is of torch.int64, the model's of torch.float32",
    ),
    "complex": (
        lambda sd: {**sd, "norm.bias": torch.ones(64, dtype=torch.complex64)},
        "norm.bias is of torch.complex64, the model's of torch.float32",
    ),
    "other classes": (
        lambda sd: {**sd, "head.fc2.weight": torch.ones(7, 256), "head.fc2.bias": torch.ones(7)},
        r"It holds test_mambaout .*7 classes\); the model is test_mambaout .*1000 classes\)",
    ),
    "other variant": (
        lambda sd: create_model("test_mambaout", depths=(1, 1, 1, 1)).state_dict(),
        r"It holds no known variant \(depths \(1, 1, 1, 1\), dims \(16, 32, 48, 64\), 1000 classes\)",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_misfits_leave_the_model_untouched(misfit, small, tmp_path):
    change, message = MISFITS[misfit]
    torch.save(change({key: value + 1 for key, value in small.state_dict().items()}), tmp_path / "a.pth")
    before = copy.deepcopy(small.state_dict())
    with pytest.raises(ValueError, match=r"^path: .*a\.pth does not fit the model") as caught:
        load_into(small, tmp_path / "a.pth")
    caught.match(message)
    assert equal(small.state_dict(), before)


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="this torch has no such dtype")
def test_a_dtype_that_cannot_be_cast_leaves_the_model_untouched(small, tmp_path):
    packed = torch.ones(64, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    torch.save({**{key: t + 1 for key, t in small.state_dict().items()}, "norm.bias": packed}, tmp_path / "a.pth")
    before = copy.deepcopy(small.state_dict())
    with pytest.raises(ValueError, match=r"holds 'norm.bias' of torch.float4_e2m1fn_x2, which torch cannot cast"):
        load_into(small, tmp_path / "a.pth")
    assert equal(small.state_dict(), before)


@pytest.mark.parametrize("name", VARIANTS)
def test_describe(name):
    with torch.device("meta"):
        text = describe(create_model(name, num_classes=10).state_dict())
    assert text.split(" (")[0] == name
    assert "10 classes" in text
    assert describe({}) == "no known variant (depths (), dims (), no classifier)"
