import copy
from pathlib import Path

import pytest
import torch

import mambaout_kernels as mk
from mambaout_kernels.models import VARIANTS, create_model
from mambaout_kernels.weights.checkpoints import to_timm
from mambaout_kernels.weights.pretrained import PUBLISHED, adapt_first_conv, from_pretrained


def random_model(name="test_mambaout", **overrides):
    torch.manual_seed(0)
    model = create_model(name, **overrides)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    return model


@pytest.fixture(scope="module")
def model():
    return random_model()


def save(path: Path, state_dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(state_dict, path)
    else:
        torch.save(state_dict, path)
    return path


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", ["mambaout_femto", "mambaout_kobe", "test_mambaout"])
@pytest.mark.parametrize("layout", [dict, to_timm, lambda sd: {"model": sd}], ids=["authors", "timm", "wrapped"])
def test_finds_the_variant_by_itself(name, layout, tmp_path):
    expected = random_model(name, num_classes=3).state_dict()
    path = save(tmp_path / "weights.pth", layout(expected))
    loaded = from_pretrained(path)
    assert equal(loaded.state_dict(), expected)
    assert loaded.depths == VARIANTS[name].depths
    assert loaded.num_classes == 3
    assert loaded.training


def test_there_and_back_again_without_loss(model, tmp_path):
    """Ours to timm's model through its own loader, and timm's file back to ours."""
    timm = pytest.importorskip("timm")
    path = save(tmp_path / "ours.safetensors", to_timm(model.state_dict()))
    theirs = timm.create_model("test_mambaout", checkpoint_path=str(path))
    back = save(tmp_path / "theirs.bin", theirs.state_dict())
    assert equal(from_pretrained(back).state_dict(), model.state_dict())
    authors = save(tmp_path / "authors.pth", {"model": model.state_dict()})
    theirs = timm.create_model(
        "test_mambaout", pretrained=True, pretrained_cfg_overlay={"file": str(authors), "num_classes": 1000}
    )
    assert equal(theirs.state_dict(), to_timm(model.state_dict()))


@pytest.mark.parametrize(
    "files", [["model.safetensors"], ["pytorch_model.bin"], ["pytorch_model.bin", "model.safetensors"]]
)
def test_folder_prefers_safetensors(files, model, tmp_path):
    for file in files:
        content = to_timm(model.state_dict()) if file == files[-1] else {}
        save(tmp_path / file, content)
    assert equal(from_pretrained(tmp_path).state_dict(), model.state_dict())
    with pytest.raises(FileNotFoundError, match=r"holds none of model\.safetensors, pytorch_model\.bin"):
        from_pretrained(tmp_path.parent / tmp_path.name / "..")


def fill_cache(cache, repository, file, state_dict):
    """A repository as huggingface_hub keeps it on disk."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    save(folder / "snapshots" / commit / file, state_dict)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("name", ["mambaout_femto", "mambaout_femto.in1k", "hf-hub:timm/mambaout_femto.in1k"])
def test_hub(name, file, tmp_path):
    pytest.importorskip("huggingface_hub")
    expected = random_model("mambaout_femto", num_classes=2).state_dict()
    fill_cache(tmp_path, "timm/mambaout_femto.in1k", file, to_timm(expected))
    loaded = from_pretrained(name, cache_dir=tmp_path, local_files_only=True)
    assert equal(loaded.state_dict(), expected)


def test_hub_out_of_reach(tmp_path):
    pytest.importorskip("huggingface_hub")
    message = r"timm/mambaout_tiny\.in1k could not be fetched .* download model\.safetensors from https://huggingface"
    with pytest.raises(RuntimeError, match=message):
        from_pretrained("mambaout_tiny", cache_dir=tmp_path, local_files_only=True)


def test_a_hub_file_of_another_variant_is_refused(model, tmp_path):
    pytest.importorskip("huggingface_hub")
    fill_cache(tmp_path, "timm/mambaout_femto.in1k", "model.safetensors", to_timm(model.state_dict()))
    with pytest.raises(ValueError, match=r"It holds test_mambaout .* model is mambaout_femto"):
        from_pretrained("mambaout_femto", cache_dir=tmp_path, local_files_only=True)


def test_hub_names_are_timms():
    cfgs = pytest.importorskip("timm.models.mambaout").default_cfgs
    theirs = [f"{name}.{tag}" for name, c in cfgs.items() if c.is_pretrained for tag in c.tags]
    assert sorted(theirs) == sorted(PUBLISHED)
    assert {name.partition(".")[0] for name in PUBLISHED} == set(VARIANTS) - {"test_mambaout"}


@pytest.mark.parametrize(("tag", "size"), [("sw_e150_in12k_ft_in1k", 224), ("sw_e150_r384_in12k_ft_in1k", 384)])
def test_a_model_knows_how_images_are_prepared_for_its_weights(tag, size, tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setitem(VARIANTS, "mambaout_base_plus_rw", VARIANTS["test_mambaout"])
    model = create_model("test_mambaout")
    name = f"mambaout_base_plus_rw.{tag}"
    fill_cache(tmp_path, f"timm/{name}", "model.safetensors", to_timm(model.state_dict()))
    for asked in (name, f"hf-hub:timm/{name}"):
        found = from_pretrained(asked, cache_dir=tmp_path, local_files_only=True, in_chans=1).pretrained_cfg
        assert (found["architecture"], found["tag"]) == ("mambaout_base_plus_rw", tag)
        assert found["input_size"] == (1, size, size)


@pytest.mark.parametrize("in_chans", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_first_conv_is_adapted_as_timm_does(in_chans, dtype):
    manipulate = pytest.importorskip("timm.models._manipulate")
    weight = torch.randn(8, 3, 3, 3).to(dtype)
    before = weight.clone()
    expected = manipulate.adapt_input_conv(in_chans, weight.clone())
    actual = adapt_first_conv(weight, in_chans)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=torch.finfo(dtype).eps, atol=0)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("in_chans", [1, 5])
@pytest.mark.parametrize("num_classes", [0, 7, None])
def test_other_channels_and_classes(in_chans, num_classes, model, tmp_path):
    """The same model as timm makes of the same file, but for the fresh classifier."""
    timm = pytest.importorskip("timm")
    path = save(tmp_path / "weights.safetensors", to_timm(model.state_dict()))
    loaded = from_pretrained(path, num_classes, in_chans, drop_path_rate=0.1)
    options = {"num_classes": 1000 if num_classes is None else num_classes, "in_chans": in_chans}
    theirs = timm.create_model(
        "test_mambaout", pretrained=True, pretrained_cfg_overlay={"file": str(path), "num_classes": 1000}, **options
    )
    ours, theirs = to_timm(loaded.state_dict()), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    for key in ours:
        if key.startswith("head.fc.") and num_classes is not None:
            assert ours[key].shape == theirs[key].shape
            assert ours[key].abs().max() < 0.2  # freshly initialised, not the file's
        else:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-6, atol=0)
    assert loaded.stages[3][0].drop_path.drop_prob == pytest.approx(0.1)
    assert loaded(torch.randn(1, in_chans, 32, 32)).isfinite().all()


def test_classifier_of_another_size_keeps_the_rest(tmp_path, model):
    own = random_model(num_classes=4, in_chans=2)
    path = save(tmp_path / "weights.pth", own.state_dict())
    loaded = from_pretrained(path, num_classes=9)
    assert loaded.in_chans == 2
    assert equal(
        {k: v for k, v in loaded.state_dict().items() if "head.fc2" not in k},
        {k: v for k, v in own.state_dict().items() if "head.fc2" not in k},
    )
    with pytest.raises(ValueError, match=r"in_chans: weights for 2 channels can only be adapted from 3; got 3"):
        from_pretrained(path, in_chans=3)


def test_without_classifier(tmp_path):
    own = random_model(num_classes=0)
    path = save(tmp_path / "weights.pth", own.state_dict())
    assert from_pretrained(path).num_classes == 0
    assert from_pretrained(path, num_classes=5)(torch.randn(1, 3, 32, 32)).shape == (1, 5)


def test_averaged_weights(tmp_path, model):
    averaged = {key: value + 1 for key, value in model.state_dict().items()}
    path = save(tmp_path / "last.pth", {"state_dict": model.state_dict(), "state_dict_ema": averaged})
    assert equal(from_pretrained(path).state_dict(), averaged)
    assert equal(from_pretrained(path, ema=False).state_dict(), model.state_dict())


def test_an_architecture_of_ones_own(tmp_path):
    own = random_model(depths=(1, 2, 1, 1))
    path = save(tmp_path / "weights.pth", own.state_dict())
    with pytest.raises(ValueError, match=r"holds no known variant \(depths \(1, 2, 1, 1\).*load_into"):
        from_pretrained(path)
    loaded = from_pretrained(path, variant="test_mambaout", depths=(1, 2, 1, 1))
    assert equal(loaded.state_dict(), own.state_dict())


@pytest.mark.parametrize("key", ["head.fc2.weight", "downsample_layers.0.conv1.weight"])
def test_a_small_file_does_not_ask_for_a_large_model(key, tmp_path):
    """Classes and channels come from the file: expanded, they would take petabytes."""
    tensors = random_model(num_classes=2).state_dict()
    count = 10**12
    if key.startswith("head"):
        tensors |= {key: torch.zeros(1, 1).expand(count, 256), "head.fc2.bias": torch.zeros(1).expand(count)}
    else:
        tensors[key] = torch.zeros(1, 1, 1, 1).expand(8, count, 3, 3)
    path = save(tmp_path / "weights.pth", tensors)
    assert path.stat().st_size < 1_000_000
    with pytest.raises(ValueError, match=rf"holds '{key}' expanded: elements share memory"):
        from_pretrained(path)


def test_no_model_is_made_of_tensors_that_do_not_fit(tmp_path, monkeypatch):
    tensors = random_model(num_classes=2).state_dict()
    tensors |= {"head.fc2.weight": torch.zeros(0), "head.fc2.bias": torch.zeros(50_000)}
    path = save(tmp_path / "weights.pth", tensors)

    def create(*args, **kwargs):
        model = create_model(*args, **kwargs)
        assert all(t.is_meta for t in model.state_dict().values())
        return model

    monkeypatch.setattr("mambaout_kernels.weights.pretrained.create_model", create)
    with pytest.raises(ValueError, match=r"head\.fc2\.weight is \(0,\), the model's \(50000, 256\)"):
        from_pretrained(path)


@pytest.mark.parametrize("key", ["head.fc2.bias", "stages.0.0.fc2.bias", "stages.0.0.fc1.bias", "stages.0.0.conv.bias"])
def test_a_scalar_where_a_vector_should_be(key, model, tmp_path):
    path = save(tmp_path / "weights.pth", {**model.state_dict(), key: torch.tensor(1.0)})
    with pytest.raises(ValueError, match=r"^(path|name_or_path): .*weights\.pth"):
        from_pretrained(path)


def test_fresh_classifiers_come_from_the_seed(model, tmp_path):
    path = save(tmp_path / "weights.pth", model.state_dict())
    torch.manual_seed(5)
    loaded = from_pretrained(path, num_classes=3)
    torch.manual_seed(5)
    assert torch.equal(loaded.head.fc2.weight, create_model("test_mambaout", num_classes=3).head.fc2.weight)


def test_a_broken_file_is_refused(tmp_path, model):
    for suffix in (".pth", ".safetensors"):
        path = save(tmp_path / f"cut{suffix}", copy.deepcopy(model.state_dict()))
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(ValueError, match=r"truncated|not a complete"):
            from_pretrained(path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mambaout_tinny", ["did you mean 'mambaout_tiny'", "owner/name of the hub", "mambaout_tiny.in1k"]),
        ("mambaout_tiny.in22k", ["did you mean 'mambaout_tiny", "mambaout_tiny.in1k"]),
        ("test_mambaout", ["no pretrained variant", "mambaout_femto.in1k"]),
    ],
)
def test_unknown_names(name, words):
    with pytest.raises(ValueError, match=r"^name_or_path: ") as caught:
        mk.from_pretrained(name)
    assert all(word in str(caught.value) for word in words)


def test_a_name_too_long_for_a_file():
    with pytest.raises(ValueError, match=r"is no file, and no pretrained variant"):
        from_pretrained(5000 * "x")
    with pytest.raises(OSError, match=r"^path: x+\.pth cannot be read: File name too long"):
        from_pretrained(5000 * "x" + ".pth")


def test_missing_file():
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors does not exist"):
        from_pretrained("none.safetensors")
