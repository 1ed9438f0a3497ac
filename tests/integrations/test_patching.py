import copy
import io
import subprocess

import pytest
import torch
from processes import python
from torch import nn

import mambaout_kernels as mk
from mambaout_kernels import backends, optimize_for_inference, patch, unpatch
from mambaout_kernels.integrations import patching
from mambaout_kernels.nn.block import FusedGatedCNNBlock

timm = pytest.importorskip("timm")


class GatedCNNBlock(nn.Module):
    """The block under the authors' name, without layer scale; written from the paper's algorithm 1."""

    def __init__(self, dim, expansion_ratio=8 / 3, kernel_size=7, conv_ratio=1.0, drop_path=0.0):
        super().__init__()
        hidden, channels = int(expansion_ratio * dim), int(conv_ratio * dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.fc1 = nn.Linear(dim, 2 * hidden)
        self.act = nn.GELU()
        self.split_indices = (hidden, hidden - channels, channels)
        self.conv = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop_path = timm.layers.DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x):
        g, i, c = self.fc1(self.norm(x)).split(self.split_indices, dim=-1)
        c = self.conv(c.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.drop_path(self.fc2(self.act(g) * torch.cat((i, c), dim=-1))) + x


def randomise(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(("gamma" in name) + 0.2 * torch.randn(p.shape, generator=generator))
    return model


def make(**options):
    return randomise(timm.create_model("test_mambaout", num_classes=5, **options))


def images(n=2, size=40, seed=1):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def step(model, x=None):
    """Logits and the gradients of every parameter of a fixed loss."""
    model.zero_grad(set_to_none=True)
    y = model(images() if x is None else x)
    y.square().mean().backward()
    return {"y": y.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


def assert_close(actual, expected, tolerance=1e-4):
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype
        assert (actual[key] - value).norm() <= tolerance * value.norm() + 1e-9, key


def blocks_of(model):
    return [m for m in model.modules() if isinstance(m, timm.models.mambaout.GatedConvBlock)]


def test_objects_stay_what_they_were():
    model = make()
    before = {
        "modules": dict(model.named_modules()),
        "parameters": dict(model.named_parameters()),
        "keys": list(model.state_dict()),
        "attributes": [dict(vars(block)) for block in blocks_of(model)],
        "types": [type(module) for module in model.modules()],
    }
    expected = step(model)
    assert patch(model) is model
    assert all(isinstance(block, FusedGatedCNNBlock) and block.unfused_reason() is None for block in blocks_of(model))
    assert {name: id(m) for name, m in model.named_modules()} == {n: id(m) for n, m in before["modules"].items()}
    assert all(p is before["parameters"][name] for name, p in model.named_parameters())
    assert list(model.state_dict()) == before["keys"]
    assert_close(step(model), expected)
    assert unpatch(model) is model
    assert [type(module) for module in model.modules()] == before["types"]
    assert [dict(vars(block)) for block in blocks_of(model)] == before["attributes"]
    for key, value in step(model).items():
        assert torch.equal(value, expected[key])


# What differs between the variants; all of timm's are patched in test_timm.py.
OPTIONS = {
    "default": {"stem_mid_norm": True, "downsample": "conv", "head_fn": "default", "ls_init_value": None},
    "layer scale": {"ls_init_value": 0.5},
    "gelu": {"act_layer": "gelu"},
    "wide": {"expansion_ratio": 3.0, "conv_ratio": 1.5},
    "kernel": {"kernel_size": 5},
    "naive": {"expansion_ratio": 3.0, "conv_ratio": 3.0},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_computes_the_same(options):
    model = make(**OPTIONS[options])
    other = patch(copy.deepcopy(model))
    assert_close(step(other), step(model))
    assert_close({"y": other.eval()(images())}, {"y": model.eval()(images())})


def test_runs_whole_where_no_gradient_is_wanted():
    """timm's norm, layer scale and drop path are known to the packed ops, so a patched model is as fast as ours."""
    if backends.preferred("cpu") != "cpu":
        pytest.skip("the compiled module is not there")
    model = patch(make(drop_path_rate=0.1)).eval()
    assert all(part.fused for part in optimize_for_inference(model).report())


def test_the_same_samples_are_dropped():
    model = make(drop_path_rate=0.5, drop_rate=0.2).train()
    other = patch(copy.deepcopy(model))
    results = []
    for m in (model, other):
        torch.manual_seed(11)
        results.append(step(m))
    assert_close(*results)


def test_authors_block():
    model = randomise(nn.Sequential(GatedCNNBlock(16), GatedCNNBlock(16, drop_path=0.3)))
    x = torch.randn(8, 5, 6, 16)
    names = [name for name, _ in model.named_modules()]
    torch.manual_seed(3)
    expected = step(model, x)
    patch(model)
    assert all(isinstance(block, FusedGatedCNNBlock) and isinstance(block, GatedCNNBlock) for block in model)
    assert [name for name, _ in model.named_modules()] == names
    torch.manual_seed(3)
    assert_close(step(model, x), expected)
    unpatch(model)
    assert not hasattr(model[0], "ls")
    assert not hasattr(model[0], "dim")


def test_optimizer_hooks_and_average_go_on():
    """Training that is patched half way equals training that is not."""
    losses, seen = {}, []
    for patched in (False, True):
        model = make().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        average = timm.utils.ModelEmaV3(model, decay=0.5)
        model.stages[1].blocks[0].register_forward_hook(lambda *args: seen.append(type(args[0]).__name__))
        losses[patched] = []
        for number in range(4):
            if number == 2 and patched:
                patch(model)
            optimizer.zero_grad()
            loss = model(images(seed=number)).square().mean()
            loss.backward()
            optimizer.step()
            average.update(model)
            losses[patched].append(loss.item())
        losses[patched].append(average(images()).square().mean().item())
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)
    assert losses[True][3] < losses[True][0]
    assert seen == ["GatedConvBlock"] * 6 + ["FusedGatedConvBlock"] * 2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_checkpointing(checkpointing):
    model = make()
    expected = step(model)
    patch(model).set_grad_checkpointing(checkpointing)
    assert_close(step(model), expected)


def test_replaced_parts_take_effect():
    model = patch(make())
    block = model.stages[0].blocks[0]
    block.act = nn.GELU()
    assert block.op_act == "gelu"
    unpatch(model)
    assert type(block.act) is nn.GELU
    assert_close(step(patch(model)), step(unpatch(copy.deepcopy(model))))


def test_copies_and_pickles():
    model = patch(make()).eval()
    expected = model(images())
    file = io.BytesIO()
    torch.save(model, file)
    for other in (copy.deepcopy(model), torch.load(io.BytesIO(file.getvalue()), weights_only=False)):
        assert torch.equal(other(images()), expected)
        assert all(isinstance(block, FusedGatedCNNBlock) for block in blocks_of(other))
        unpatch(other)
        assert not any(isinstance(block, FusedGatedCNNBlock) for block in blocks_of(other))
        assert all(isinstance(block, FusedGatedCNNBlock) for block in blocks_of(model))


def test_unpickles_in_another_process(tmp_path):
    torch.save(patch(make()), tmp_path / "model.pt")
    code = f"""
import torch
model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
print(type(model.stages[0].blocks[0]).__name__, model(torch.zeros(1, 3, 32, 32)).shape[1])
"""
    found = subprocess.run([python(), "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.split() == ["FusedGatedConvBlock", "5"]


def test_state_dict_goes_both_ways():
    model, patched = make(), patch(randomise(timm.create_model("test_mambaout", num_classes=5), seed=9))
    patched.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(patched.state_dict(), strict=True)
    assert_close({"y": patched(images())}, {"y": model(images())})


def test_wrapped_models():
    ema = timm.utils.ModelEmaV3(make())
    patch(ema)
    assert len(blocks_of(ema)) == 6
    assert all(isinstance(block, FusedGatedCNNBlock) for block in blocks_of(ema))
    features = patch(timm.create_model("test_mambaout", features_only=True))
    assert all(isinstance(block, FusedGatedCNNBlock) for block in blocks_of(features))


def test_again_and_again():
    model = patch(patch(make()))
    unpatch(unpatch(model))
    assert {type(block).__name__ for block in blocks_of(model)} == {"GatedConvBlock"}
    assert patch(mk.create_model("test_mambaout")) is not None  # fused from the start


def test_random_state_is_left_alone():
    patching._mismatch.cache_clear()
    model = make()
    before = torch.get_rng_state()
    patch(model)
    assert torch.equal(torch.get_rng_state(), before)


class Altered(timm.models.mambaout.GatedConvBlock):
    def forward(self, x):
        return super().forward(x) * 1.01


class Extended(timm.models.mambaout.GatedConvBlock):
    """A user's own class that computes the same."""


class Demanding(GatedCNNBlock):
    def __init__(self, dim, more):
        super().__init__(dim)


def test_subclasses_that_compute_the_same_are_fused():
    block = patch(Extended(16))
    assert isinstance(block, FusedGatedCNNBlock)
    assert isinstance(block, Extended)
    unpatch(block)
    assert type(block) is Extended


def replaced_forward():
    block = GatedCNNBlock(16)
    block.forward = lambda x: x
    return block


def incomplete():
    block = GatedCNNBlock(16)
    del block.fc2
    return block


@pytest.mark.parametrize(
    ("make_block", "words"),
    [
        (lambda: Altered(16), "a Altered computes something else"),
        (lambda: Demanding(16, 1), r"Demanding\(dim\) could not be tried: .*'more'"),
        (replaced_forward, "its forward was replaced"),
        (incomplete, "it has no fc2"),
    ],
)
def test_refuses_what_it_cannot_fuse_and_changes_nothing(make_block, words):
    model = nn.Sequential(GatedCNNBlock(16), make_block())
    types = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=f"model: block '1' cannot be fused: {words}.*nothing was changed"):
        patch(model)
    assert [type(module) for module in model.modules()] == types


def test_refuses_other_models():
    with pytest.raises(ValueError, match="Linear has no block of a class named GatedCNNBlock or GatedConvBlock"):
        patch(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        patch({})
