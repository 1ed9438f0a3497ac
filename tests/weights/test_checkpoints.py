import argparse
import copy
import os
import pickle
import sys

import pytest
import torch

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
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        ours, theirs = create_model(name).state_dict(), timm.create_model(name).state_dict()
    translated = to_timm(ours)
    assert {key: value.shape for key, value in translated.items()} == {k: v.shape for k, v in theirs.items()}
    assert list(to_authors(translated)) == list(ours)
    assert all(to_authors(translated)[key] is ours[key] for key in ours)
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


# kind: (file name, what to write there, given a path and a good state_dict; words of the error)
BAD_FILES = {
    "missing": ("a.pth", lambda path, sd: None, "does not exist"),
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
    "another net": ("a.pth", lambda path, sd: save(path, {"fc.weight": torch.ones(3)}), "not a MambaOut .*'fc.weight'"),
    "two layouts": ("a.pth", lambda path, sd: save(path, {**sd, **to_timm(sd)}), "not a MambaOut .*'downsample_lay"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files(kind, small, tmp_path):
    name, write, message = BAD_FILES[kind]
    write(tmp_path / name, small.state_dict())
    before = copy.deepcopy(small.state_dict())
    with pytest.raises(FileNotFoundError if kind == "missing" else ValueError, match=message) as caught:
        load_into(small, tmp_path / name)
    assert str(caught.value).startswith(f"path: {tmp_path / name} ")
    assert "weights_only=False" not in str(caught.value)
    assert equal(small.state_dict(), before)
    assert not (tmp_path / "pwned").exists()


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


@pytest.mark.parametrize("name", VARIANTS)
def test_describe(name):
    with torch.device("meta"):
        text = describe(create_model(name, num_classes=10).state_dict())
    assert text.split(" (")[0] == name
    assert "10 classes" in text
    assert describe({}) == "no known variant (depths (), dims (), no classifier)"
