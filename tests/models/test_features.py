import copy

import pytest
import torch
from torch import nn

from mambaout_kernels.models import MambaOut, create_model
from mambaout_kernels.weights.checkpoints import to_authors, to_timm


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = create_model("test_mambaout", num_classes=3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.eval()


@pytest.fixture(scope="module")
def theirs(model):
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("test_mambaout", num_classes=3)
    theirs.load_state_dict(to_timm(model.state_dict()))
    return theirs.eval()


ARGUMENTS = [
    {},
    {"output_fmt": "NHWC"},
    {"indices": 2},
    {"indices": [0, -2]},
    {"indices": [3, 1], "stop_early": True},
    {"indices": (0,), "stop_early": True, "output_fmt": "NHWC"},
    {"intermediates_only": True, "norm": True},
]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@pytest.mark.parametrize("size", [(64, 96), (65, 33)])
def test_forward_intermediates_are_timms(arguments, size, model, theirs):
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    actual, expected = model.forward_intermediates(x, **arguments), theirs.forward_intermediates(x, **arguments)
    if not arguments.get("intermediates_only"):
        torch.testing.assert_close(actual[0], expected[0], rtol=1e-4, atol=1e-4)
        actual, expected = actual[1], expected[1]
    assert len(actual) == len(expected)
    for ours, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4)
        assert ours.is_contiguous() == other.is_contiguous()


def test_reductions(model):
    maps = model.forward_intermediates(torch.randn(1, 3, 64, 96), intermediates_only=True)
    for features, info in zip(maps, model.feature_info, strict=True):
        assert features.shape == (1, info["num_chs"], 64 // info["reduction"], 96 // info["reduction"])
    assert [info["reduction"] for info in model.feature_info] == [4, 8, 16, 32]


def test_the_last_map_is_forward_features(model):
    x = torch.randn(1, 3, 40, 40)
    assert torch.equal(model.forward_intermediates(x)[0], model.forward_features(x))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"output_fmt": "NCWH"}, "output_fmt must be one of NCHW, NHWC, got 'NCWH'"),
        ({"indices": 5}, "indices must be in 1 to 4 as a number of stages, got 5"),
        ({"indices": [4]}, r"indices must be stages from -4 to 3, at least one; got \[4\]"),
        ({"indices": []}, "at least one"),
    ],
)
def test_bad_arguments(arguments, words, model):
    with pytest.raises(ValueError, match=words):
        model.forward_intermediates(torch.randn(1, 3, 32, 32), **arguments)
    with pytest.raises(ValueError, match=r"x must be \(N, 3, H, W\)"):
        model.forward_intermediates(torch.randn(1, 32, 32, 3))


def test_gradient_checkpointing_gives_the_same_and_keeps_less(model):
    """Same bits, and fewer bytes between forward and backward."""
    model, x, kept, results = copy.deepcopy(model).train(), torch.randn(2, 3, 64, 64), {}, {}
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        model.zero_grad()
        seen = {}

        def keep(tensor, seen=seen):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = model(x)
        kept[enabled] = sum(seen.values())
        y.sum().backward()
        results[enabled] = [y.detach(), *(p.grad.clone() for p in model.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(results[False], results[True], strict=True))
    # the hooks do not see the tensors that checkpoint itself hides; what they see must not include the blocks'
    assert kept[True] < 0.7 * kept[False]


def test_gradient_checkpointing_with_stochastic_depth():
    model = create_model("test_mambaout", drop_path_rate=0.5).train()
    x, results = torch.randn(8, 3, 32, 32), []
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        torch.manual_seed(2)
        results.append(torch.autograd.grad(model(x).sum(), list(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("coarse", [False, True])
def test_groups_are_timms(coarse, model, theirs):
    """The same parameters in the same order of groups, for layer-wise learning rates."""
    group_parameters = pytest.importorskip("timm.models").group_parameters
    ours = group_parameters(model, model.group_matcher(coarse), reverse=True)
    expected = to_authors(group_parameters(theirs, theirs.group_matcher(coarse), reverse=True))
    assert ours == expected
    assert len(set(ours.values())) > 4


def test_layer_decay(model):
    optim = pytest.importorskip("timm.optim")
    groups = optim.param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    scales = [group["lr_scale"] for group in groups]
    assert max(scales) == 1.0
    assert min(scales) < 0.05
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_one_stage_has_maps_too():
    model = MambaOut(depths=(1,), dims=(8,), num_classes=2)
    assert isinstance(model.stages, nn.ModuleList)
    assert model.forward_intermediates(torch.randn(1, 3, 9, 9))[1][0].shape == (1, 8, 3, 3)
