"""The examples, run as a user runs them, for a moment each; what they reach when run for real is in their README."""

import csv
import json
import os
import signal
import subprocess
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from processes import python

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}
QUICK = ["--set", "epochs=3", "--set", "warmup_epochs=1", "--set", "batch=240", "--set", "image_size=16"]

pytestmark = pytest.mark.skipif(
    not all(map(find_spec, ("timm", "sklearn", "torchvision"))), reason="needs timm, scikit-learn and torchvision"
)


@pytest.fixture(scope="module", autouse=True)
def modules():
    """The examples' modules can be imported; one thread, so that sums are the same in every process."""
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(EXAMPLES))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    patch.undo()


def run(script, out, *more):
    """Exit status."""
    try:
        return import_module(script).main(["--out", str(out), *more])
    except SystemExit as error:  # argparse's own
        return error.code


def log(out):
    with (out / "log.csv").open() as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert run("train", out, *QUICK, "--set", "ema_decay=0.9") == 0
    return out


def test_training_writes_what_it_should(trained):
    rows = log(trained)
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert float(rows[2]["train_loss"]) < float(rows[0]["train_loss"])
    assert all(0 <= float(row[key]) <= 1 for row in rows for key in ("val_accuracy", "ema_accuracy"))
    assert (trained / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert torch.load(trained / "last.pth", weights_only=True)["name"] == "test_mambaout"


def test_killed_training_goes_on_without_loss(trained, tmp_path):
    """Killed in the midst of an epoch; then the same command gives the same curve and the same weights, bit for bit."""
    arguments = [*QUICK, "--set", "ema_decay=0.9"]
    command = [python(), str(EXAMPLES / "train.py"), "--out", str(tmp_path), *arguments]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    for _ in range(3000):
        if (tmp_path / "log.csv").exists() or process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 1 <= len(log(tmp_path)) < 3
    assert run("train", tmp_path, *arguments) == 0
    assert log(tmp_path) == log(trained)
    ours, theirs = (torch.load(out / "last.pth", weights_only=True) for out in (tmp_path, trained))
    for part in ("model", "model_ema"):
        assert all(torch.equal(ours[part][key], theirs[part][key]) for key in theirs[part])


def test_another_recipe_does_not_go_on_in_the_same_folder(trained, capsys):
    assert run("train", trained, *QUICK, "--set", "weight_decay=0.1") == 2
    assert "is of another model or recipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "learning_rate=1"], "'learning_rate' is no hyperparameter; allowed: opt, lr_per_1024"),
        (["--data", "nowhere"], "nowhere is neither 'digits' nor a folder"),
    ],
)
def test_training_refuses(arguments, said, tmp_path, capsys):
    assert run("train", tmp_path, *arguments) == 2
    assert said in capsys.readouterr().err


def test_recipe_is_the_authors():
    recipes = json.loads((EXAMPLES / "recipes.json").read_text())
    deit = recipes["deit"]
    assert deit["lr_per_1024"] * deit["batch"] / 1024 == pytest.approx(4e-3)
    assert (deit["epochs"], deit["cooldown_epochs"], deit["warmup_epochs"], deit["min_lr"]) == (300, 10, 20, 1e-5)
    drop_path = {name: variant["drop_path_rate"] for name, variant in recipes["variants"].items()}
    assert [drop_path[f"mambaout_{name}"] for name in ("femto", "kobe", "tiny", "small", "base")] == [
        0.025, 0.025, 0.2, 0.4, 0.6,
    ]  # fmt: skip


@pytest.mark.parametrize("script", ["detect", "segment"])
def test_dense_examples(script, tmp_path, capsys):
    assert run(script, tmp_path, "--steps", "4", "--batch", "1", "--held-out", "5") == 0
    assert "held-out scenes" in capsys.readouterr().out
    with (tmp_path / "loss.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert len(losses) == 4
    assert all(torch.tensor(losses).isfinite())
    for picture in ("loss.png", "prediction.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_backbone_takes_any_size():
    from backbone import Backbone
    from segment import Segmenter

    model = Segmenter(Backbone("test_mambaout", checkpointing=True), classes=4, channels=16)
    for h, w in ((64, 64), (33, 97), (70, 41)):
        maps = model.backbone(torch.randn(1, 3, h, w))
        assert [tuple(y.shape[2:]) for y in maps.values()] == [(-(-h // r), -(-w // r)) for r in (4, 8, 16, 32)]
        logits = model(torch.randn(2, 3, h, w))
        assert logits.shape == (2, 4, h, w)
        logits.mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_scenes_are_what_they_say():
    from shapes import Shapes

    data = Shapes()
    sizes = set()
    for number in range(8):
        scene, again = data[number], data[number]
        assert torch.equal(scene.image, again.image)
        assert len(scene.boxes) == len(scene.labels) == len(scene.masks) > 0
        assert scene.masks.sum(0).max() == 1  # no pixel is of two objects
        for (x0, y0, x1, y1), mask in zip(scene.boxes.int().tolist(), scene.masks, strict=True):
            assert mask[y0:y1, x0:x1].sum() == mask.sum()
        sizes.add(tuple(scene.image.shape[1:]))
    assert any(side % 32 for size in sizes for side in size)


MOMENT = ["--epochs", "2", "--train-images", "100", "--seeds", "2", "--threads", "1"]


def ablation(out):
    """What ablation.py wrote, without times."""
    results = json.loads((out / "results.json").read_text())
    for row in results["runs"] + results.get("models", []):
        assert row.pop("seconds_per_epoch") > 0
    return results


@pytest.fixture(scope="module")
def ablated(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "ablation"
    assert run("ablation", out, *MOMENT) == 0
    return out


def test_ablation_writes_what_it_should(ablated):
    from ablation import MODELS

    results = ablation(ablated)
    assert [(row["model"], row["seed"]) for row in results["runs"]] == [(m, seed) for seed in (0, 1) for m in MODELS]
    assert all(0 <= row[key] <= 1 for row in results["runs"] for key in ("accuracy", "train_accuracy"))
    means = [row["mean"] for row in results["models"]]
    assert len(means) == 6
    assert means == sorted(means, reverse=True)
    scores = {row["name"]: row["values"] for row in results["models"]}
    first = results["differences"][0]
    assert len(results["differences"]) == 5
    assert first["name"] == "ViT: visible - causal"
    assert first["values"] == [a - b for a, b in zip(scores["ViT-visible"], scores["ViT-causal"], strict=True)]
    assert all(row["zero_inside"] == (abs(row["mean"]) <= row["half"]) for row in results["differences"])
    assert (ablated / "ablation.png").read_bytes().startswith(b"\x89PNG")


def test_interval_is_students():
    from intervals import mean_and_interval

    result = mean_and_interval([1.0, 2.0, 3.0])
    assert result["mean"] == 2.0
    assert result["half"] == pytest.approx(4.3027 / 3**0.5, rel=1e-4)  # the 97.5 % quantile at two degrees of freedom


def test_stopped_ablation_goes_on_to_the_same_numbers(ablated, tmp_path, monkeypatch, capsys):
    """Ctrl-C in the third run."""
    import ablation as module

    whole, calls = module.run, []

    def stops(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(*arguments)

    models = ["--models", "ViT-causal", "GatedConv+SSM-visible"]
    plot = ["--plot", str(tmp_path / "pictures" / "one.png")]
    monkeypatch.setattr(module, "run", stops)
    assert run("ablation", tmp_path, *MOMENT, *models, *plot) == 130
    assert "has 2 finished runs" in capsys.readouterr().err
    assert len(ablation(tmp_path)["runs"]) == 2
    assert run("ablation", tmp_path, *MOMENT, *models, *plot) == 0
    assert len(calls) == 5  # what was finished is not run again
    known = {(row["model"], row["seed"]): row for row in ablation(ablated)["runs"]}
    rows = ablation(tmp_path)["runs"]
    assert len(rows) == 4
    assert all(row == known[row["model"], row["seed"]] for row in rows)
    assert (tmp_path / "pictures" / "one.png").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--epochs", "3"], "is of other settings"),
        (["--seeds", "1"], "--seeds must be 2 or more"),
        (["--train-images", "1797"], "--train-images must be 10 to 1787"),
    ],
)
def test_ablation_refuses(arguments, said, ablated, capsys):
    assert run("ablation", ablated, *MOMENT, *arguments) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("mixer", ["ViT", "GatedConv", "GatedConv+SSM"])
def test_causal_models_are_causal(mixer):
    """A change at one token changes itself and some after it, none before; where all is visible, all."""
    from ablation import Classifier

    images = torch.randn(2, 8, 8)
    changed = images.clone()
    changed[:, 4:6, 2:4] += 1  # token 9 of 4 x 4
    for mode in ("visible", "causal"):
        model = Classifier(f"{mixer}-{mode}").eval()
        with torch.no_grad():
            differs = (model.tokens(images) != model.tokens(changed)).any(-1).any(0).flatten()
        assert differs[:9].all() == differs[:9].any() == (mode == "visible")
        assert differs[9:].all() if mode == "visible" else differs[9] and differs[10:].any()
