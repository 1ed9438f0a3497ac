"""classify: weights by name or file, images in files and folders, prepared as for the weights."""

import json
import shutil

import pytest
import torch

import mambaout_kernels as mk
from mambaout_kernels import images
from mambaout_kernels.models import VARIANTS
from tests.cli.test_cli import run


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A weights file of test_mambaout that says class 7 to everything, and a photograph."""
    from skimage import data, io

    folder = tmp_path_factory.mktemp("pretrained")
    model = mk.create_model("test_mambaout")
    with torch.no_grad():
        model.head.get_submodule("fc2").bias[7] = 50.0
    torch.save(model.state_dict(), folder / "weights.pth")
    io.imsave(folder / "cat.png", data.chelsea())
    (folder / "broken.png").write_text("no image")
    return folder


def classify(capsys, folder, image, *more):
    weights = str(folder / "weights.pth")
    return run(capsys, "classify", str(folder / image), "--weights", weights, "--model", "test_mambaout", *more)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_classify_names_the_classes(capsys, pretrained, dtype):
    status, out, _ = classify(capsys, pretrained, "cat.png", "--json", "--dtype", dtype, "--topk", "3")
    [result] = json.loads(out)
    assert status == 0
    assert len(result["classes"]) == 3
    assert result["classes"][0]["index"] == 7
    assert result["classes"][0]["probability"] > 0.99
    assert "cock" in result["classes"][0]["name"]  # ImageNet's class 7


def test_classify_prints_a_table(capsys, pretrained):
    status, out, _ = classify(capsys, pretrained, "cat.png")
    assert status == 0
    assert out.count("%") == 5
    words = " ".join(out.split())  # a long title takes several lines
    assert "test_mambaout with the weights of" in words
    assert "images at 160 x 160" in words


def test_classify_takes_folders(capsys, pretrained, tmp_path):
    for name in ("b/2.png", "a/1.PNG", "3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(pretrained / "cat.png", tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    status, out, err = classify(capsys, tmp_path, "", "--json", "--weights", str(pretrained / "weights.pth"))
    assert (status, err.count("/3]")) == (0, 3)
    assert [result["image"] for result in json.loads(out)] == [
        str(tmp_path / n) for n in ("3.png", "a/1.PNG", "b/2.png")
    ]
    (tmp_path / "empty").mkdir()
    status, _, err = classify(capsys, tmp_path, "empty", "--weights", str(pretrained / "weights.pth"))
    assert (status, "empty holds no image file" in err) == (2, True)


@pytest.mark.parametrize("name", ["mambaout_base_short_rw", "mambaout_base_short_rw.sw_e500_in1k"])
@pytest.mark.parametrize(("size", "crop"), [([], 0.95), (["--size", "288"], 1.0)])
def test_classify_by_name_prepares_images_as_for_these_weights(capsys, pretrained, monkeypatch, name, size, crop):
    monkeypatch.setitem(VARIANTS, "mambaout_base_short_rw", VARIANTS["test_mambaout"])
    fetched, prepared = [], []

    def fetch(repository, *_):
        fetched.append(repository)
        return pretrained / "weights.pth"

    def read(*args, read=images.read):
        prepared.append(args[1:])
        return read(*args)

    monkeypatch.setattr("mambaout_kernels.weights.pretrained._fetch", fetch)
    monkeypatch.setattr(images, "read", read)
    status, out, _ = run(capsys, "classify", str(pretrained / "cat.png"), "--model", name, *size)
    assert (status, fetched) == (0, ["timm/mambaout_base_short_rw.sw_e500_in1k"])
    assert prepared == [(288 if size else 224, crop, False)]
    assert "mambaout_base_short_rw.sw_e500_in1k; images at" in out


def test_classify_without_a_network(capsys, pretrained, monkeypatch):
    def fetch(repository, *_):
        raise RuntimeError(f"name_or_path: {repository} could not be fetched from the hub (none)")

    monkeypatch.setattr("mambaout_kernels.weights.pretrained._fetch", fetch)
    status, _, err = run(capsys, "classify", str(pretrained / "cat.png"))
    assert status == 2
    assert err == "error: --model mambaout_tiny: timm/mambaout_tiny.in1k could not be fetched from the hub (none)\n"


def test_classify_finds_the_variant_of_a_file_and_other_classes_have_no_names(capsys, pretrained, tmp_path):
    torch.save(mk.create_model("test_mambaout", num_classes=3).state_dict(), tmp_path / "three.pth")
    image, weights = str(pretrained / "cat.png"), str(tmp_path / "three.pth")
    status, out, _ = run(capsys, "classify", image, "--weights", weights, "--json")
    [result] = json.loads(out)
    assert status == 0
    assert sorted(c["index"] for c in result["classes"]) == [0, 1, 2]
    assert {c["name"] for c in result["classes"]} == {""}


@pytest.mark.parametrize(
    ("image", "said"),
    [("none.png", "none.png does not exist"), ("broken.png", "broken.png cannot be read as an image")],
)
def test_classify_refuses_an_image(capsys, pretrained, image, said):
    status, _, err = classify(capsys, pretrained, image)
    assert status == 2
    assert said in err


def test_classify_refuses_weights_of_another_variant(capsys, pretrained):
    weights = str(pretrained / "weights.pth")
    command = ["classify", str(pretrained / "cat.png"), "--weights", weights, "--model", "mambaout_femto"]
    status, _, err = run(capsys, *command)
    assert status == 2
    assert "does not fit the model" in err
    assert "test_mambaout" in err


def test_classify_refuses_a_truncated_file(capsys, pretrained, tmp_path):
    path = tmp_path / "cut.pth"
    path.write_bytes((pretrained / "weights.pth").read_bytes()[:1000])
    image = str(pretrained / "cat.png")
    status, _, err = run(capsys, "classify", image, "--weights", str(path), "--model", "test_mambaout")
    assert status == 2
    assert "cut.pth" in err
