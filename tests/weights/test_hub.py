"""Models as repositories of the Hugging Face hub: config.json and model.safetensors."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import mambaout_kernels as mk
from mambaout_kernels.models import MambaOut, create_model, hub

pytest.importorskip("safetensors")


def random_model(name="test_mambaout", **options):
    model = create_model(name, **options)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    return model


def equal(a: nn.Module, b: nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


MODELS = {
    "as it is": {},
    "classes": {"num_classes": 7},
    "no classifier": {"num_classes": 0},
    "channels": {"in_chans": 5},
    "dims": {"dims": (8, 24, 16), "depths": (1, 2, 0)},
    "act": {"act_layer": "gelu_tanh"},
    "block": {"kernel_size": 3, "expansion_ratio": 2.0, "conv_ratio": 0.5, "ls_init_value": None, "causal": True},
    "ends": {"stem_mid_norm": True, "downsample": "conv", "head_fn": "default"},
    "rates": {"drop_path_rate": 0.25, "drop_rate": 0.5, "recompute": True},
}


@pytest.mark.parametrize("options", MODELS)
def test_round_trip(options, tmp_path, monkeypatch):
    model = random_model(**MODELS[options])
    model.save_pretrained(tmp_path / "new" / "folder")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
    for load in (mk.from_pretrained, MambaOut.from_pretrained, model.from_pretrained):
        loaded = load(tmp_path / "new" / "folder")
        assert type(loaded) is MambaOut
        assert loaded.architecture() == model.architecture()
        assert loaded.pretrained_cfg == model.pretrained_cfg
        assert equal(loaded, model)
    x = torch.randn(1, model.in_chans, 64, 64)
    assert torch.equal(loaded.eval()(x), model.eval()(x))


def test_the_file_and_its_config_belong_together(tmp_path):
    """Without the config the weights would pass for another variant's, with another activation."""
    model = random_model(act_layer="gelu")
    model.save_pretrained(tmp_path)
    assert mk.from_pretrained(tmp_path / "model.safetensors").architecture()["act_layer"] == "gelu"
    assert mk.from_pretrained(tmp_path, variant="test_mambaout").architecture()["act_layer"] == "silu"
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    assert mk.from_pretrained(tmp_path / "other.safetensors").architecture()["act_layer"] == "silu"


def test_overrides(tmp_path):
    model = random_model(num_classes=7)
    model.save_pretrained(tmp_path)
    loaded = mk.from_pretrained(tmp_path, num_classes=3, in_chans=1, drop_path_rate=0.5)
    assert (loaded.num_classes, loaded.in_chans) == (3, 1)
    assert loaded.architecture()["drop_path_rate"] == 0.5
    assert torch.equal(loaded.head.fc1.weight, model.head.fc1.weight)
    with pytest.raises(TypeError, match=r"unknown argument 'drop_path_rat' \(did you mean"):
        mk.from_pretrained(tmp_path, drop_path_rat=0.5)


def test_a_replaced_classifier_is_saved(tmp_path):
    model = random_model()
    model.reset_classifier(4)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["num_classes"] == 4
    assert equal(mk.from_pretrained(tmp_path), model)


def test_low_precision_is_kept_exactly(tmp_path):
    model = random_model().bfloat16()
    model.save_pretrained(tmp_path)
    assert equal(mk.from_pretrained(tmp_path), model.float())


def replaced():
    model = random_model()
    model.norm = nn.Identity()
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: random_model(act_layer=nn.SiLU), "norm_layer or act_layer is the caller's"),
        (lambda: random_model(norm_layer=nn.LayerNorm), "norm_layer or act_layer is the caller's"),
        (replaced, "modules were replaced"),
    ],
)
def test_refuses_what_a_config_cannot_describe(make, words, tmp_path):
    with pytest.raises(ValueError, match=rf"^a config cannot describe this model: .*{words}"):
        make().save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    random_model().save_pretrained(folder)
    return folder, json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"colour": 1}, r"has an unknown 'colour'; it has to have in_chans, num_classes"),
        ({"recompute": True}, "has an unknown 'recompute'"),
        ({"dims": None}, "dims must be list, .*; got None"),
        ({"dims": [16, 32, "48", 64]}, "dims must be list"),
        ({"depths": [1, 1, -3, 1]}, "depths must be list"),
        ({"depths": [1, 1, 2000, 1]}, "more blocks than there are tensors"),
        ({"depths": [1, 1, 3, 2]}, "does not fit the model"),
        ({"dims": [16, 32, 48, 10**12]}, "dims must be list, of numbers from 0 to 1000000"),
        ({"dims": [16, 32, 48, 10**6], "expansion_ratio": 10**6}, "does not fit the model"),
        ({"in_chans": "3"}, "in_chans must be int, .*; got '3'"),
        ({"num_classes": True}, "num_classes must be int, .*; got True"),
        ({"causal": 0}, "causal must be bool, .*; got 0"),
        ({"ls_init_value": "x"}, "ls_init_value must be int or float or null"),
        ({"conv_ratio": float("nan")}, "conv_ratio must be int or float, .*; got nan"),
        ({"expansion_ratio": 1e300}, "expansion_ratio must be int or float, of numbers"),
        ({"expansion_ratio": float("inf")}, "expansion_ratio must be"),
        ({"act_layer": "relu"}, "act_layer: unknown 'relu'"),
        ({"kernel_size": 4}, "kernel_size must be odd"),
    ],
)
def test_refuses_a_config_that_was_changed(change, words, saved, tmp_path):
    folder, config = saved
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=words):
        mk.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["{", "[" * 10**5, "\xff"])
def test_refuses_what_is_no_json(text, saved, tmp_path):
    (tmp_path / "model.safetensors").write_bytes((saved[0] / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="is not JSON"):
        mk.from_pretrained(tmp_path)


def test_refuses_a_config_that_lacks_a_key(saved, tmp_path):
    folder, config = saved
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "act_layer"}))
    with pytest.raises(ValueError, match="lacks 'act_layer'"):
        mk.from_pretrained(tmp_path)


@pytest.mark.parametrize("config", ['{"architecture": "test_mambaout", "num_classes": 3}', "[]", "1"])
def test_configs_of_others_are_not_read(config, saved, tmp_path):
    (tmp_path / "model.safetensors").write_bytes((saved[0] / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(config)
    assert mk.from_pretrained(tmp_path).num_classes == 1000


def test_types_are_those_of_an_architecture():
    assert hub._TYPES.keys() == create_model("test_mambaout").architecture().keys() | {"pretrained_cfg"}


@pytest.mark.parametrize("prefix", ["", "hf-hub:"])
def test_from_a_repository(prefix, tmp_path):
    """As huggingface_hub keeps it on disk."""
    pytest.importorskip("huggingface_hub")
    model = random_model(dims=(8, 16), depths=(1, 1), act_layer="gelu")
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    model.save_pretrained(repository / "snapshots" / commit)
    loaded = MambaOut.from_pretrained(f"{prefix}owner/name", cache_dir=tmp_path, local_files_only=True)
    assert loaded.architecture() == model.architecture()
    assert equal(loaded, model)


def test_push(tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    made, model = [], random_model()

    class Api:
        def __init__(self, token):
            made.append(token)

        def create_repo(self, repository, **options):
            made.append((repository, options))
            return SimpleNamespace(repo_id=f"someone/{repository}")

        def upload_folder(self, repo_id, folder_path, revision, commit_message):
            made.append((repo_id, revision, equal(mk.from_pretrained(folder_path), model)))
            return SimpleNamespace(commit_url="https://there")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert model.push_to_hub("name", private=True, token="t", revision="v1") == "https://there"
    assert made == ["t", ("name", {"private": True, "exist_ok": True}), ("someone/name", "v1", True)]


def test_without_huggingface_hub(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    model = random_model()
    model.save_pretrained(tmp_path)
    assert equal(mk.from_pretrained(tmp_path), model)
    with pytest.raises(ImportError, match="push_to_hub needs huggingface_hub: pip install huggingface_hub"):
        model.push_to_hub("owner/name")
    with pytest.raises(ImportError, match="fetching owner/name needs huggingface_hub"):
        MambaOut.from_pretrained("owner/name")


def test_without_safetensors(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match="save_pretrained needs the safetensors package"):
        random_model().save_pretrained(tmp_path)
