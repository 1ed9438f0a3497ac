"""classify on pictures of every depth and shape, and weights whose logits are no numbers."""

import io
import json
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import mambaout_kernels as mk
from mambaout_kernels import images
from mambaout_kernels.cli import main
from mambaout_kernels.models.pretrained_cfg import pretrained_cfg
from mambaout_kernels.weights.pretrained import PUBLISHED


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights of test_mambaout, and a grey ramp in 16 bits as several files."""
    folder = tmp_path_factory.mktemp("images")
    model = mk.create_model("test_mambaout")
    torch.save(model.state_dict(), folder / "weights.pth")
    with torch.no_grad():
        model.head.get_submodule("fc2").bias[7] = torch.nan
    torch.save(model.state_dict(), folder / "nan.pth")
    grey = np.linspace(0, 65535, 48 * 64).reshape(48, 64).astype(np.uint16)
    Image.fromarray((grey >> 8).astype(np.uint8)).save(folder / "grey8.png")
    for suffix in ("png", "tif"):
        Image.fromarray(grey).save(folder / f"grey16.{suffix}")
    (folder / "grey16.pgm").write_bytes(b"P5 64 48 65535\n" + grey.astype(">u2").tobytes())
    Image.fromarray(grey.astype(np.int32)).save(folder / "int32.tif")
    Image.fromarray(grey.astype(np.float32)).save(folder / "float.tif")
    Image.new("RGB", (1, 65535), "red").save(folder / "thin.png")
    Image.new("RGB", (65535, 1), "red").save(folder / "flat.png")
    return folder


def classify(capsys, folder, name, *more, weights="weights.pth"):
    """(exit status, stdout, stderr)."""
    argv = ["classify", str(folder / name), "--weights", str(folder / weights), "--model", "test_mambaout", *more]
    status = main([*argv, "--size", "32", "--json"])
    return status, *capsys.readouterr()


@pytest.mark.parametrize("name", ["grey16.png", "grey16.tif", "grey16.pgm"])
def test_grey_of_16_bits_is_the_same_picture_in_8(capsys, folder, name):
    status, out, _ = classify(capsys, folder, name)
    assert status == 0
    [ours], [expected] = json.loads(out), json.loads(classify(capsys, folder, "grey8.png")[1])
    assert ours["classes"] == expected["classes"]


@pytest.mark.parametrize(("name", "said"), [("int32.tif", "integers of 32 bits"), ("float.tif", "floating point")])
def test_values_without_a_range_are_refused(capsys, folder, name, said):
    status, out, err = classify(capsys, folder, name)
    assert (status, out) == (2, "")
    assert f"{name} cannot be read as an image: its values are {said}, of which white is not known; allowed: 8" in err


@pytest.mark.parametrize("name", ["thin.png", "flat.png"])
def test_a_long_picture_is_cropped_before_it_is_resized(capsys, folder, name, monkeypatch):
    resize = Image.Image.resize

    def bounded(self, size, *args, **kwargs):
        assert max(size) <= 4 * 32
        return resize(self, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", bounded)
    assert classify(capsys, folder, name)[0] == 0


@pytest.mark.parametrize("shape", [(37, 53), (53, 37), (20, 80), (80, 20), (1, 4)], ids=str)
def test_other_pictures_are_resized_as_a_whole(shape, tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
    picture.save(tmp_path / "a.png")
    width, height = (32 * side // min(picture.size) for side in picture.size)
    left, top = round((width - 32) / 2), round((height - 32) / 2)
    whole = np.array(picture.resize((width, height), Image.Resampling.BICUBIC))[top : top + 32, left : left + 32]
    expected = (torch.from_numpy(whole / 255).float() - torch.tensor(images.MEAN)) / torch.tensor(images.STD)
    torch.testing.assert_close(images.read(tmp_path / "a.png", 32), expected.permute(2, 0, 1))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_logits_that_are_no_numbers(capsys, folder, dtype):
    status, out, err = classify(capsys, folder, "grey8.png", "--dtype", dtype, weights="nan.pth")
    assert (status, out) == (1, "")
    assert "grey8.png cannot be classified by test_mambaout with the weights of " in err
    assert "its logits are NaN or infinite" in err


def test_a_size_beyond_memory(capsys, folder):
    argv = ["classify", str(folder / "grey8.png"), "--weights", str(folder / "weights.pth"), "--model", "test_mambaout"]
    assert main([*argv, "--size", "1000000"]) == 2
    assert capsys.readouterr().err == "error: --size must be at most 2048, got 1000000\n"


@pytest.mark.parametrize("name", ["[bold]x[", "[", "[/red]", os.fsdecode(b"\xff"), "\x1b[31m", "x\n"])
def test_names_are_printed_as_they_are(capsys, folder, name, tmp_path):
    image = tmp_path / name
    image.parent.mkdir(exist_ok=True)
    image.write_bytes((folder / "grey8.png").read_bytes())
    argv = ["classify", str(image), "--weights", str(folder / "weights.pth"), "--model", "test_mambaout"]
    assert main([*argv, "--size", "32", "--topk", "1"]) == 0
    out = capsys.readouterr().out
    shown = {os.fsdecode(b"\xff"): r"\udcff", "\x1b[31m": r"\x1b[31m", "x\n": "x"}.get(name, name)
    assert f"/{shown}" in "".join(line.rstrip() for line in out.splitlines())


def test_a_name_that_the_output_cannot_encode(folder, tmp_path, monkeypatch):
    image = tmp_path / "\u00e9.png"
    image.write_bytes((folder / "grey8.png").read_bytes())
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    argv = ["classify", str(image), "--weights", str(folder / "weights.pth"), "--model", "test_mambaout"]
    assert main([*argv, "--size", "32"]) == 0
    assert rb"\xe9.png" in shown.getvalue()


def test_a_name_that_is_too_long(capsys, folder):
    status, _, err = classify(capsys, folder, 300 * "x")
    assert status == 2
    assert "does not exist" in err


@pytest.fixture(scope="module")
def photograph(folder):
    from skimage import data

    Image.fromarray(data.chelsea()).save(folder / "cat.png")
    return folder / "cat.png"


@pytest.mark.parametrize("name", sorted(PUBLISHED))
@pytest.mark.parametrize("tested", [False, True], ids=["default size", "test size"])
def test_images_are_prepared_as_by_timm(photograph, name, tested):
    """By the settings of each of the published weights."""
    from timm.data import create_transform, resolve_data_config

    variant, tag = name.split(".")
    cfg = pretrained_cfg(variant, tag)
    transform = create_transform(**resolve_data_config(pretrained_cfg=cfg, use_test_size=tested))
    settings = images.settings(cfg, cfg["test_input_size"][1] if tested else None)
    with Image.open(photograph) as image:
        assert torch.equal(images.read(photograph, *settings), transform(image))
