"""What timm.data reads of our models is what it reads of timm's."""

import pytest

import mambaout_kernels as mk
from mambaout_kernels.models import MambaOut
from mambaout_kernels.models.pretrained_cfg import PRETRAINED, pretrained_cfg

mambaout = pytest.importorskip("timm.models.mambaout")
data = pytest.importorskip("timm.data")


@pytest.mark.parametrize(("variant", "tag"), [(v, t) for v, tags in PRETRAINED.items() for t in tags])
def test_as_timms(variant, tag):
    theirs = mambaout.default_cfgs[variant].cfgs[tag].to_dict()
    ours = pretrained_cfg(variant, tag)
    names = {"architecture", "tag", "first_conv", "classifier"}  # of our own models
    assert {key: theirs[key] for key in ours.keys() - names} == {key: ours[key] for key in ours.keys() - names}
    for test_size in (False, True):
        ours_resolved = data.resolve_data_config(pretrained_cfg=ours, use_test_size=test_size)
        assert ours_resolved == data.resolve_data_config(pretrained_cfg=theirs, use_test_size=test_size)


def test_every_variant_has_one():
    assert set(PRETRAINED) == set(mk.models.VARIANTS)
    for variant, tags in PRETRAINED.items():
        assert mambaout.default_cfgs[variant].tags[0] == next(iter(tags))


def test_names_of_modules_are_the_models():
    model = mk.create_model("test_mambaout")
    cfg = model.pretrained_cfg
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    assert model.get_submodule(cfg["first_conv"]).in_channels == 3


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda: mk.create_model("test_mambaout"), (3, 160, 160)),
        (lambda: mk.create_model("mambaout_femto", in_chans=5), (5, 224, 224)),
        (lambda: MambaOut(depths=(1,), dims=(8,)), (3, 224, 224)),
        (lambda: mk.optimize_for_inference(mk.create_model("test_mambaout")), (3, 160, 160)),
    ],
    ids=["a variant", "in_chans", "without a variant", "optimized"],
)
def test_models_carry_it(make, size):
    found = data.resolve_model_data_config(make())
    assert (found["input_size"], found["crop_pct"]) == (size, 1.0)


def test_it_is_the_models_own():
    first, second = mk.create_model("test_mambaout"), mk.create_model("test_mambaout")
    first.pretrained_cfg["crop_pct"] = 0.5
    assert second.pretrained_cfg["crop_pct"] == 1.0


def test_a_saved_inference_model_keeps_it(tmp_path):
    pytest.importorskip("safetensors")
    model = mk.create_model("test_mambaout")
    model.pretrained_cfg |= {"mean": (0.5, 0.5, 0.5), "input_size": (3, 96, 96)}
    mk.optimize_for_inference(model).save(tmp_path / "model.safetensors")
    assert mk.load_inference_model(tmp_path / "model.safetensors").pretrained_cfg == model.pretrained_cfg
