"""optimize_for_inference: what fuses, what does not and why, and that the result is right and on its own."""

import copy
import functools
import re

import numerics
import pytest
import torch
from torch import nn

import mambaout_kernels as mk
from mambaout_kernels import backends
from mambaout_kernels.backends import cpu
from mambaout_kernels.benchmarking import error_bounds
from mambaout_kernels.benchmarking.inputs import enlivened
from mambaout_kernels.inference import parts
from mambaout_kernels.inference.parts import FusedHead, PackedBlocks, PackedPart
from mambaout_kernels.nn.layers import DropPath

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))

SMALL = {"depths": (1, 2), "dims": (16, 24), "num_classes": 110, "ls_init_value": 0.5}
NEW = {"downsample": "conv_nf", "head_fn": "norm_mlp", "stem_mid_norm": False}


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def make(**options):
    return enlivened(mk.MambaOut(**{**SMALL, **options})).eval()


def timm_model(**options):
    timm = pytest.importorskip("timm")
    return enlivened(timm.create_model("test_mambaout", **{"num_classes": 110, **options})).eval()


def images(n=2, h=64, w=64):
    return torch.randn(n, 3, h, w, generator=torch.Generator().manual_seed(5))


def by_modules(model, x):
    with backends.force("reference"):
        return model(x)


def kinds(fast):
    return [(part.name, part.kind) for part in fast.report() if part.fused]


def reasons(fast):
    return {part.name: part.reason for part in fast.report() if not part.fused}


def assert_as_accurate(fast, model, x, dtype=torch.float32, call=lambda m, x: m(x)):
    """Beside eager in this dtype, against fp64, of weights and images rounded to the dtype."""
    rounded, low = copy.deepcopy(model).to(dtype), x.to(dtype)
    with backends.force("reference"):
        eager, exact = call(rounded, low), call(rounded.double(), low.double())
    numerics.assert_model_accurate({"y": call(fast, x)}, {"y": eager}, {"y": exact})


# --- ours ---


@pytest.mark.parametrize("name", mk.VARIANTS)
def test_every_part_of_every_variant_fuses(name):
    full = mk.VARIANTS[name]
    model = mk.create_model(name, depths=(1, 2, 1, 1), dims=(16, 24, 32, 40), num_classes=10).eval()
    found = mk.optimize_for_inference(model)
    assert kinds(found) == [
        ("downsample_layers.0", "stem"),
        *((f"downsample_layers.{i}", "downsample") for i in (1, 2, 3)),
        ("stages.0.0", "blocks"),
        ("stages.1.0 to 1", "blocks"),
        ("stages.2.0", "blocks"),
        ("stages.3.0", "blocks"),
        ("head", "head"),
    ]
    assert not reasons(found)
    assert found.model.stages[1][0].count == 2
    assert "fused" in str(found.report())
    assert full.act_layer in ("gelu", "silu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, NEW, {"act_layer": "silu", "conv_ratio": 0.5}], ids=["first", "new", "silu"])
def test_ours_against_fp64(isa, options, dtype):
    model = make(**options)
    fast = mk.optimize_for_inference(model, dtype=dtype)
    assert not reasons(fast)
    assert fast.dtype == dtype
    for n, h, w in ((2, 64, 64), (1, 33, 47), (5, 70, 31), (1, 1, 1), (3, 7, 130)):
        assert_as_accurate(fast, model, images(n, h, w), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_whole_variant_against_fp64(dtype):
    model = enlivened(mk.create_model("test_mambaout")).eval()
    assert_as_accurate(mk.optimize_for_inference(model, dtype=dtype), model, images(2, 97, 64), dtype)


def test_a_model_in_bfloat16_stays_in_it():
    model = make().bfloat16()
    fast = mk.optimize_for_inference(model)
    assert fast.dtype == torch.bfloat16
    assert not reasons(fast)
    assert fast(images()).dtype == torch.bfloat16
    assert torch.equal(fast(images()), fast(images().bfloat16()))
    assert_as_accurate(fast, model, images(), torch.bfloat16)


@pytest.mark.parametrize("options", [{}, NEW], ids=["first", "new"])
def test_every_method_agrees_with_the_models(options):
    model = make(**options)
    fast, x = mk.optimize_for_inference(model), images(2, 65, 50)
    for call in (
        lambda m, x: m.forward_features(x),
        lambda m, x: m.forward_head(m.forward_features(x)),
        lambda m, x: m.forward_head(m.forward_features(x), pre_logits=True),
        *(lambda m, x, i=i: m.forward_intermediates(x)[1][i] for i in (0, 1)),
        lambda m, x: m.forward_intermediates(x, indices=[0], stop_early=True, output_fmt="NHWC")[0],
    ):
        assert_as_accurate(fast, model, x, call=call)
    assert torch.equal(fast.forward_head(fast.forward_features(x)), fast(x))
    assert not hasattr(fast.model.head, "fc2")
    assert isinstance(fast.model.head, FusedHead)
    # what a wrapper might call without the head
    assert_as_accurate(fast.model, model, x, call=lambda m, x: m.pool(m.forward_features(x)))


@pytest.mark.parametrize("classes", [0, 7])
def test_classifiers_that_were_reset(classes):
    for options in ({}, NEW):
        model = make(**options)
        model.reset_classifier(classes)
        fast = mk.optimize_for_inference(model)
        assert not reasons(fast)
        assert fast(images()).shape == (2, classes or 4 * 24)
        assert_as_accurate(fast, model, images())


def test_one_block_and_blocks_in_a_row():
    block = enlivened(mk.FusedGatedCNNBlock(20, ls_init_value=0.5, drop_path=0.3)).train()
    x = torch.randn(2, 9, 8, 20)
    fast = mk.optimize_for_inference(block)
    assert kinds(fast) == [("", "block")]
    assert str(fast.report()).split() == ["(all)", "block", "fused"]
    assert block.training
    block.eval()
    exact = by_modules(copy.deepcopy(block).double(), x.double())
    numerics.assert_accurate(fast(x), by_modules(block, x), exact, error_bounds.of_block(block, x)["y"])
    other = enlivened(mk.FusedGatedCNNBlock(20, kernel_size=3)).eval()
    row = nn.Sequential(block, other, nn.Tanh(), block, block, other)
    fast = mk.optimize_for_inference(row)
    assert kinds(fast) == [("0 to 1", "blocks"), ("3 to 5", "blocks")]
    assert_as_accurate(fast, row, x)


def test_blocks_of_other_widths_and_what_is_there_twice():
    wide, narrow = (enlivened(mk.FusedGatedCNNBlock(dim)).eval() for dim in (20, 12))
    row = nn.Sequential(wide, nn.Linear(20, 12), narrow)
    assert_as_accurate(mk.optimize_for_inference(row), row, torch.randn(2, 9, 8, 20))

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.between, self.second = wide, None, wide
            self.inner = nn.ModuleList([nn.Sequential(wide)])

        def forward(self, x):
            return self.inner[0](self.second(self.first(x)))

    fast = mk.optimize_for_inference(Twice())
    assert fast.model.first is fast.model.second
    assert_as_accurate(fast, Twice(), torch.randn(2, 9, 8, 20))


# --- of others ---


TIMM = {
    "test_mambaout": {},
    "a norm in the head": {"head_fn": "default"},
    "conv, norms in the stem": {"downsample": "conv", "stem_mid_norm": True},
    "no layer scale": {"ls_init_value": None},
    "gelu": {"act_layer": "gelu"},
    "no classes": {"num_classes": 0},
    "no classes, a norm": {"num_classes": 0, "head_fn": "default"},
    "stochastic depth": {"drop_path_rate": 0.3, "drop_rate": 0.3},
}


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("options", TIMM)
def test_timms_models(options, patched):
    model = timm_model(**TIMM[options])
    before = [type(module) for module in model.modules()]
    fast = mk.optimize_for_inference(mk.patch(copy.deepcopy(model)) if patched else model)
    assert not reasons(fast)
    assert [kind for _, kind in kinds(fast)] == ["stem", "blocks", *("downsample", "blocks") * 3, "head"]
    assert [type(module) for module in model.modules()] == before
    for x in (images(), images(1, 47, 70)):
        assert_as_accurate(fast, model, x)
    assert_as_accurate(fast, model, images(), call=lambda m, x: m.forward_features(x))
    assert_as_accurate(fast, model, images(), call=lambda m, x: m.forward_head(m.forward_features(x), pre_logits=True))
    for i in range(4):
        assert_as_accurate(fast, model, images(), call=lambda m, x, i=i: m.forward_intermediates(x)[1][i])


def test_timms_model_in_bfloat16():
    model = timm_model()
    assert_as_accurate(mk.optimize_for_inference(model, dtype=torch.bfloat16), model, images(), torch.bfloat16)


@pytest.mark.parametrize("classes", [0, 5])
def test_timms_classifiers_that_were_reset(classes):
    model = timm_model()
    model.reset_classifier(classes)
    fast = mk.optimize_for_inference(model.eval())
    assert not reasons(fast)
    assert_as_accurate(fast, model, images())


def test_timms_head_without_pooling_is_left_to_its_modules():
    model = timm_model()
    model.reset_classifier(0, "")
    fast = mk.optimize_for_inference(model.eval())
    assert reasons(fast) == {"head": "it does not average, or has no hidden layer"}
    assert fast(images()).ndim == 4
    assert_as_accurate(fast, model, images())


@pytest.mark.parametrize("feature_cls", [None, "getter", "fx"])
def test_timms_features(feature_cls):
    model = timm_model(features_only=True, **({"feature_cls": feature_cls} if feature_cls else {}))
    fast = mk.optimize_for_inference(model)
    assert len(fast(images(1, 70, 96))) == 4
    for i in range(4):
        assert_as_accurate(fast, model, images(1, 70, 96), call=lambda m, x, i=i: m(x)[i])
    if feature_cls is None:
        assert not reasons(fast)


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
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x):
        g, i, c = self.fc1(self.norm(x)).split(self.split_indices, dim=-1)
        c = self.conv(c.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.drop_path(self.fc2(self.act(g) * torch.cat((i, c), dim=-1))) + x


class AuthorsStem(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels // 2, 3, 2, 1)
        self.norm1 = nn.LayerNorm(out_channels // 2)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(out_channels // 2, out_channels, 3, 2, 1)
        self.norm2 = nn.LayerNorm(out_channels)

    def forward(self, x):
        x = self.norm1(self.conv1(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.norm2(self.conv2(self.act(x)).permute(0, 2, 3, 1))


class AuthorsDown(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(in_channels, out_channels, 3, 2, 1), nn.LayerNorm(out_channels)

    def forward(self, x):
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class Authors(nn.Module):
    """The backbone and a linear classifier, by the authors' names."""

    def __init__(self):
        super().__init__()
        self.downsample_layers = nn.ModuleList([AuthorsStem(3, 16), AuthorsDown(16, 24)])
        stages = [[GatedCNNBlock(16, drop_path=0.1), GatedCNNBlock(16)], [GatedCNNBlock(24)]]
        self.stages = nn.ModuleList(nn.Sequential(*blocks) for blocks in stages)
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 110)

    def forward(self, x):
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(downsample(x))
        return self.head(self.norm(x.mean((1, 2))))


def test_models_of_the_authors_classes(isa):
    model = enlivened(Authors()).eval()
    fast = mk.optimize_for_inference(model)
    assert kinds(fast) == [
        ("downsample_layers.0", "stem"), ("downsample_layers.1", "downsample"), ("stages.0.0 to 1", "blocks"),
        ("stages.1.0", "blocks"),
    ]  # fmt: skip
    assert not reasons(fast)
    assert_as_accurate(fast, model, images(2, 45, 70))
    with pytest.raises(AttributeError, match="Authors has no forward_features"):
        fast.forward_features(images())


class Another(AuthorsDown):
    def forward(self, x):
        return super().forward(x).relu()


class AnotherStem(AuthorsStem):
    def forward(self, x):
        return super().forward(x) + 1


class NoStem(nn.Module):
    """Its names, and nothing else of it."""

    def __init__(self):
        super().__init__()
        self.conv1 = self.norm1 = self.conv2 = self.norm2 = nn.Identity()
        self.conv1, self.conv2, self.norm1 = nn.Sequential(nn.Identity()), nn.Tanh(), nn.Tanh()
        self.act = nn.GELU()

    def forward(self, x):
        return self.conv2(self.act(self.conv1(x)))


def test_classes_that_compute_something_else_are_left_alone():
    model = enlivened(Authors()).eval()
    model.downsample_layers[0].__class__, model.downsample_layers[1].__class__ = AnotherStem, Another
    model.stages[0].append(nn.Sequential(NoStem()))
    fast = mk.optimize_for_inference(model)
    assert set(reasons(fast)) == {"downsample_layers.0", "downsample_layers.1"}
    assert all("computes something else" in reason for reason in reasons(fast).values())
    assert_as_accurate(fast, model, images())


def test_what_is_recognised_does_not_hang_on_the_weights_nor_touch_the_random_numbers():
    model = timm_model(downsample="conv", head_fn="default")
    for value in (0.0, torch.nan):
        for p in model.parameters():
            p.fill_(value)
        state = torch.get_rng_state()
        assert not reasons(mk.optimize_for_inference(model))
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("wrap", [torch.optim.swa_utils.AveragedModel, nn.DataParallel, torch.compile])
def test_wrappers(wrap):
    model = make()
    fast = mk.optimize_for_inference(wrap(model))
    assert not reasons(fast)
    assert len(kinds(fast)) == 5
    assert_as_accurate(fast, model, images())


def test_a_detector_takes_what_it_took():
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = make()

        def forward(self, images, scale=1.0, *, shift=0.0):
            return scale * self.backbone(torch.stack(images)) + shift

    model = Detector().eval()
    fast = mk.optimize_for_inference(model)
    assert_as_accurate(fast, model, images(), call=lambda m, x: m(list(x), 2.0, shift=0.5))


def test_a_class_that_calls_norm_and_head_itself_stays_right():
    class Backbone(mk.MambaOut):
        def forward(self, x):
            return self.norm(self.forward_features(x))

    class Classifier(mk.MambaOut):
        def forward(self, x):
            return self.head(self.pool(self.forward_features(x)).tanh())

    for kind in (Backbone, Classifier):
        model = enlivened(kind(**SMALL)).eval()
        fast = mk.optimize_for_inference(model)
        assert reasons(fast) == {"head": "its head has hooks, or the model a forward or a forward_head of its own"}
        assert_as_accurate(fast, model, images())


# --- reasons ---


def double_output(module, args, output):
    return 2 * output


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class DoubledConv(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class DoubledBlock(mk.FusedGatedCNNBlock):
    def forward(self, x):
        return 2 * super().forward(x)


def of_class(module, kind):
    module.__class__ = kind


def hook(path, **options):
    return lambda model: model.get_submodule(path).register_forward_hook(double_output, **options)


def replace_forward(path):
    def change(model):
        module = model.get_submodule(path)
        module.forward = functools.partial(doubled_forward, type(module), module)

    return change


def doubled_forward(kind, module, x):
    return 2 * kind.forward(module, x)


def bind(model, name, function):
    """A method on the object, which a copy of the object has of itself."""
    vars(model)[name] = functools.partial(function, model)


def other_head(model, x, pre_logits=False):
    return model.head(2 * model.pool(x), pre_logits)


def largest(model, x):
    return model.norm(x.amax((1, 2)))


def geometry(path, **settings):
    def change(model):
        for name, value in settings.items():
            setattr(model.get_submodule(path), name, value)
        model.get_submodule(path)._reversed_padding_repeated_twice = [
            p for p in reversed(model.get_submodule(path).padding) for _ in range(2)
        ]

    return change


def parametrize(path, name="weight"):
    return lambda model: nn.utils.parametrizations.weight_norm(model.get_submodule(path), name)


def put(path, make):
    def change(model):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, enlivened(make()).eval())

    return change


BLOCK, STEM, DOWN, HEAD = "stages.0.0", "downsample_layers.0", "downsample_layers.1", "head"
# (part, change, what the reason says)
REASONS = {
    **{f"a hook of {name}": (BLOCK, hook(f"{BLOCK}.{name}"), f"{name}.*hooks")
       for name in ("norm", "fc1", "act", "conv", "fc2", "ls", "drop_path")},
    "a hook of a block": (BLOCK, hook(BLOCK), "it has hooks"),
    "a pre-hook": (BLOCK, lambda m: m.get_submodule(f"{BLOCK}.fc1").register_forward_pre_hook(
        lambda module, args: (2 * args[0],)), "fc1 has hooks"),
    **{f"a hook of the stem's {name}": (STEM, hook(f"{STEM}.{name}"), "hooks")
       for name in ("conv1", "norm1", "act", "conv2", "norm2")},
    "a hook of the stem": (STEM, hook(STEM), "it has hooks"),
    "a hook of a downsampling": (DOWN, hook(DOWN), "it has hooks"),
    "a hook of its norm": (DOWN, hook(f"{DOWN}.norm"), "norm has hooks"),
    "a hook of its conv": (DOWN, hook(f"{DOWN}.conv"), "conv has hooks"),
    "a hook of the head": (HEAD, hook(HEAD), "its head has hooks"),
    "a hook of the norm before it": (HEAD, hook("norm"), "norm has hooks"),
    **{f"a hook of the head's {name}": (HEAD, hook(f"head.{name}"), "hooks")
       for name in ("fc1", "act", "norm", "head_dropout", "fc2")},
    "a parametrized fc1": (BLOCK, parametrize(f"{BLOCK}.fc1"), "fc1 is a Parametrized"),
    "a parametrized conv": (BLOCK, parametrize(f"{BLOCK}.conv"), "conv is a ParametrizedConv2d"),
    "a parametrized stem": (STEM, parametrize(f"{STEM}.conv2"), "conv is a Parametrized"),
    "a parametrized head": (HEAD, parametrize("head.fc2"), "fc2 is a Parametrized"),
    "fc1 of another class": (BLOCK, lambda m: of_class(m.stages[0][0].fc1, Doubled), r"fc1 is a \S*Doubled"),
    "conv of another class": (DOWN, lambda m: of_class(m.downsample_layers[1].conv, DoubledConv), r"a \S*DoubledConv"),
    "fc2 of another class": (HEAD, lambda m: of_class(m.head.fc2, Doubled), r"fc2 is a \S*Doubled"),
    "a block of another class": (BLOCK, lambda m: of_class(m.stages[0][0], DoubledBlock), "a forward of its own"),
    "a forward of the block": (BLOCK, replace_forward(BLOCK), "it has hooks"),
    "a forward of fc2": (BLOCK, replace_forward(f"{BLOCK}.fc2"), "fc2 has hooks"),
    "a forward of a downsampling": (DOWN, replace_forward(DOWN), "it has hooks"),
    "a forward of the head": (HEAD, lambda m: bind(m, "forward_head", other_head), "forward_head of its own"),
    "another pooling": (HEAD, lambda m: bind(m, "pool", largest), "its pooling"),
    "another act": (BLOCK, put(f"{BLOCK}.act", nn.ReLU), "act ReLU is none of gelu, gelu_tanh, silu, identity"),
    "another act of the stem": (STEM, put(f"{STEM}.act", nn.Tanh), "act is a Tanh"),
    "another act of the head": (HEAD, put("head.act", nn.SiLU), "act is a SiLU, not a GELU"),
    "tanh in the head": (HEAD, lambda m: setattr(m.head.act, "approximate", "tanh"), "act .*not a GELU"),
    "another norm": (BLOCK, put(f"{BLOCK}.norm", lambda: nn.RMSNorm(16)), "norm is a RMSNorm"),
    "another norm of a downsampling": (DOWN, put(f"{DOWN}.norm", lambda: nn.RMSNorm(24)), "norm is a RMSNorm"),
    "another norm before the head": (HEAD, put("norm", lambda: nn.RMSNorm(24)), "norm is a RMSNorm"),
    "a norm over rows": (DOWN, put(f"{DOWN}.norm", lambda: nn.LayerNorm((8, 24))), r"\(8, 24\), not \(24,\)"),
    "a norm over more": (HEAD, put("head.norm", lambda: nn.GroupNorm(1, 96)), "the norm after fc1 is a GroupNorm"),
    "another scale": (BLOCK, put(f"{BLOCK}.ls", lambda: nn.Linear(16, 16)), "ls is a Linear, not a LayerScale"),
    "something after the branch": (BLOCK, put(f"{BLOCK}.drop_path", nn.Tanh), "drop_path is a Tanh"),
    "padding mode": (BLOCK, geometry(f"{BLOCK}.conv", padding_mode="circular"), "padding_mode=circular"),
    "dilation": (BLOCK, geometry(f"{BLOCK}.conv", dilation=(2, 2), padding=(6, 6)), "conv is Conv2d.*dilation=.2, 2"),
    "padding mode of the stem": (STEM, geometry(f"{STEM}.conv1", padding_mode="reflect"), "padding_mode=reflect"),
    "groups": (DOWN, put(f"{DOWN}.conv", lambda: nn.Conv2d(16, 24, 3, 2, 1, groups=4)), "groups=4.*, not 3 x 3"),
    "stride": (DOWN, put(f"{DOWN}.conv", lambda: nn.Conv2d(16, 24, 3, 1, 1)), r"stride=\(1, 1\).*, not 3 x 3"),
    "padding": (DOWN, put(f"{DOWN}.conv", lambda: nn.Conv2d(16, 24, 3, 2, 0)), "not 3 x 3 with stride 2"),
    "a larger filter": (DOWN, put(f"{DOWN}.conv", lambda: nn.Conv2d(16, 24, 5, 2, 2)), r"kernel_size=\(5, 5\)"),
    "dilation of a downsampling": (DOWN, put(f"{DOWN}.conv", lambda: nn.Conv2d(16, 24, 3, 2, 2, 2)), "dilation=.2, 2"),
    "dropout that is not": (HEAD, put("head.head_dropout", nn.Tanh), "dropout is a Tanh, not an nn.Dropout"),
    "a wider classifier": (HEAD, put("head.fc2", lambda: nn.Sequential(nn.Linear(96, 110))), "fc2 is a Sequential"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:FusedGatedCNNBlock runs as separate:RuntimeWarning")
@pytest.mark.parametrize("case", REASONS)
def test_what_a_fused_op_would_change_is_left_to_the_modules(case):
    part, change, said = REASONS[case]
    model = make()
    change(model)
    fast = mk.optimize_for_inference(model)
    found = reasons(fast)
    assert list(found) == [part]
    assert re.search(said, found[part]), found[part]
    assert len(kinds(fast)) >= 3
    assert_as_accurate(fast, model, images())
    unchanged = mk.optimize_for_inference(make())
    assert reasons(unchanged) == {}


def test_each_reason_is_of_one_block_only():
    model = make()
    model.stages[1][0].fc2.register_forward_hook(double_output)
    fast = mk.optimize_for_inference(model)
    assert list(reasons(fast)) == ["stages.1.0"]
    assert ("stages.1.1", "blocks") in kinds(fast)
    assert "stages.1.0           block       not fused: fc2 has hooks" in str(fast.report())
    assert_as_accurate(fast, model, images())


def test_a_hook_that_only_looks_is_called_each_time():
    model, calls = make(), []
    model.stages[0][0].fc1.register_forward_hook(lambda *_: calls.append(1))
    model.stages[1].register_forward_hook(lambda *_: calls.append(2))
    fast = mk.optimize_for_inference(model)
    for _ in range(3):
        fast(images())
    assert calls == [1, 2] * 3


def test_causal_blocks():
    model = make(causal=True)
    fast = mk.optimize_for_inference(model)
    assert set(reasons(fast).values()) == {"conv is causal"}
    assert_as_accurate(fast, model, images())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_other_dtypes(dtype):
    model = make().to(dtype)
    fast = mk.optimize_for_inference(model)
    assert not kinds(fast)
    assert set(reasons(fast).values()) == {f"the fused ops compute in float32 and bfloat16, not in {dtype}"}
    assert fast.dtype == dtype
    with backends.force("reference"):
        expected = model(images().to(dtype))
    numerics.assert_alike(fast(images()), expected, share=1e-2 if dtype == torch.float16 else 1e-12)  # a few roundings
    assert not reasons(mk.optimize_for_inference(model, dtype=torch.float32))


def test_mixed_dtypes():
    block = enlivened(mk.FusedGatedCNNBlock(16)).eval()
    block.conv.bfloat16()
    model = nn.Sequential(enlivened(mk.FusedGatedCNNBlock(16)).eval(), block)
    fast = mk.optimize_for_inference(model)
    assert kinds(fast) == [("0", "blocks")]
    assert reasons(fast) == {"1": "conv.weight is torch.bfloat16 on cpu, not torch.float32 on the CPU"}
    model = make()
    model.norm.double()
    assert "norm.weight is torch.float64" in reasons(mk.optimize_for_inference(model))["head"]
    assert not reasons(mk.optimize_for_inference(model, dtype=torch.float32))


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("fast", [False, True])
def test_fp32_products_follow_torchs_precision(monkeypatch, precision, fast):
    asked = []
    pack = parts.blocks_op.pack

    def recorded(*weights, bf16, **settings):
        asked.append(bf16)
        return pack(*weights, bf16=False, **settings)

    monkeypatch.setattr(parts.blocks_op, "pack", recorded)
    monkeypatch.setattr(cpu, "multiplies_bf16", lambda: fast)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        for dtype in (torch.float32, torch.bfloat16):
            mk.optimize_for_inference(nn.Sequential(mk.FusedGatedCNNBlock(16).to(dtype)))
    finally:
        torch.set_float32_matmul_precision(before)
    assert asked == [fast and precision == "medium", fast]


def test_a_backend_that_is_asked_for():
    model = make()
    with backends.force("reference"):
        fast = mk.optimize_for_inference(model)
    assert not kinds(fast)
    assert set(reasons(fast).values()) == {"the backend 'reference' is asked for"}
    assert_as_accurate(fast, model, images())


def test_other_devices_are_named():
    with torch.device("meta"):
        fast = mk.optimize_for_inference(mk.MambaOut(**SMALL))
    assert not kinds(fast)
    assert set(reasons(fast).values()) == {
        "packed weights are for the CPU, not for meta", "blocks are split on GPUs, not on meta"
    }  # fmt: skip
    moved = mk.optimize_for_inference(make(), device="meta")
    assert {p.device.type for p in moved.parameters()} == {"meta"}


def test_blocks_that_cannot_be_patched():
    class GatedCNNBlock(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            return self.fc(x)

    model = nn.Sequential(GatedCNNBlock(), enlivened(mk.FusedGatedCNNBlock(8)).eval())
    fast = mk.optimize_for_inference(model)
    assert "it has no norm, fc1" in reasons(fast)["0"]
    assert_as_accurate(fast, model, torch.randn(1, 5, 5, 8))


def test_what_is_refused():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        mk.optimize_for_inference(3)
    with pytest.raises(TypeError, match="model must not be an InferenceModel: it is optimized already"):
        mk.optimize_for_inference(mk.optimize_for_inference(make()))
    with pytest.raises(TypeError, match=r"dtype must be a floating-point dtype, got torch\.int8"):
        mk.optimize_for_inference(make(), dtype=torch.int8)
    with pytest.raises(ValueError, match="ReLU has no floating-point parameter"):
        mk.optimize_for_inference(nn.ReLU())
    with pytest.raises(ValueError, match="Linear has no Gated CNN block, stem, downsampling or head"):
        mk.optimize_for_inference(nn.Linear(3, 3))


# --- on its own ---


def storages(model):
    return {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}


@pytest.mark.parametrize("kind", ["ours", "new", "hooked", "timm", "bfloat16", "inference tensors"])
def test_neither_sees_what_is_written_to_the_other(kind):
    if kind == "inference tensors":
        with torch.inference_mode():
            model = make()
    else:
        model = timm_model() if kind == "timm" else make(**(NEW if kind == "new" else {}))
    if kind == "hooked":  # parts that run by their own modules
        hook(BLOCK)(model)
        hook("head.fc1")(model)
        hook(f"{STEM}.conv1")(model)
    dtype = torch.bfloat16 if kind == "bfloat16" else None
    state = {name: t.clone() for name, t in model.state_dict().items()}
    modules = {name: (id(m), type(m), dict(vars(m))) for name, m in model.named_modules()}
    addresses = [t.data_ptr() for t in model.state_dict().values()]
    training = model.training
    fast = mk.optimize_for_inference(model, dtype=dtype)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert {name: (id(m), type(m), dict(vars(m))) for name, m in model.named_modules()} == modules
    assert [t.data_ptr() for t in model.state_dict().values()] == addresses
    assert model.training == training
    assert all(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in fast.parameters())
    assert storages(model).isdisjoint(storages(fast))
    before = fast(images())
    with torch.inference_mode():
        for p in model.parameters():
            p.mul_(-1.5)
        written = by_modules(model, images())
    assert torch.equal(fast(images()), before)
    for t in (*fast.parameters(), *fast.buffers()):
        t.data.view(torch.uint8).fill_(0)
    with torch.inference_mode():
        assert torch.equal(by_modules(model, images()), written)


def test_a_model_in_training_is_copied_into_evaluation():
    model = make(drop_path_rate=0.5, drop_rate=0.5).train()
    model.stages[1][0].register_forward_hook(lambda module, args, output: output)  # one block by its modules
    fast = mk.optimize_for_inference(model)
    assert all(module.training for module in model.modules())
    assert not any(module.training for module in fast.modules())
    assert torch.equal(fast(images()), fast(images()))
    assert_as_accurate(fast, model.eval(), images())


def test_only_what_is_not_fused_stays_beside_the_packed_weights():
    fast = mk.optimize_for_inference(make())
    assert [name for name, _ in fast.named_parameters()] == ["model.norm.weight", "model.norm.bias"]
    assert all(isinstance(m, PackedPart | FusedHead) for m in fast.modules() if list(m.buffers(recurse=False)))
    assert sum(isinstance(m, PackedBlocks) for m in fast.modules()) == 2


def test_modes_of_the_call_do_not_change_it():
    fast = mk.optimize_for_inference(make())
    first = fast(images())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(images()), first)
    with torch.inference_mode():
        assert torch.equal(fast(images()), first)
    with torch.enable_grad():
        assert torch.equal(fast(images()), first)
    assert torch.equal(fast(images().double()), first)
    assert torch.equal(fast(images().contiguous(memory_format=torch.channels_last)), first)


def test_the_same_bits_at_every_thread_count_and_in_a_batch(isa):
    for dtype in (torch.float32, torch.bfloat16):
        fast, x = mk.optimize_for_inference(make(), dtype=dtype), images(5, 70, 90)
        torch.set_num_threads(1)
        first = fast(x)
        assert torch.equal(fast(x[3:4]), first[3:4])
        for threads in (2, 3, 8):
            torch.set_num_threads(threads)
            assert torch.equal(fast(x), first)


def test_no_images_and_wrong_images():
    fast = mk.optimize_for_inference(make())
    assert fast(images()[:0]).shape == (0, 110)
    with pytest.raises(ValueError, match=r"x must be \(N, 3, H, W\)"):
        fast(images()[:, :2])
