"""Each reason why an op may not stand in for modules, by itself; and that of plain modules there is none."""

import re

import pytest
import torch
from torch import nn

from mambaout_kernels import FusedGatedCNNBlock
from mambaout_kernels.nn.causal import CausalConv2d
from mambaout_kernels.nn.eligibility import (
    conv3x3s2_reason,
    gated_cnn_block_reason,
    gated_dwconv_reason,
    head_reason,
)  # fmt: skip
from mambaout_kernels.nn.layers import LayerScale
from mambaout_kernels.nn.plain import activation_name, is_plain_layer_norm, linear_weights

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:Initializing zero-element")
F32, BF16 = torch.float32, torch.bfloat16


class Subclass(torch.Tensor):
    pass


class Other(nn.Identity):
    pass


def subclass(*shape):
    return nn.Parameter(torch.zeros(shape).as_subclass(Subclass), requires_grad=False)


def hooked(module):
    module.register_forward_hook(lambda *_: None)
    return module


def depthwise(channels=8, kernel=3, **more):
    return nn.Conv2d(channels, channels, kernel, **{"padding": kernel // 2, "groups": channels, **more})


def changed(path, make):
    """A change of a module or parameter somewhere in what is given."""

    def change(module):
        parent, _, name = path.rpartition(".")
        parent = module.get_submodule(parent)
        delattr(parent, name)
        setattr(parent, name, make())

    return change


def attribute(path, **values):
    return lambda module: vars(module.get_submodule(path)).update(values)


NOT_DEPTHWISE = "^conv is .*, not depthwise"
OF_THE_OP = {
    "act of another class": (changed("act", nn.ReLU), "^act ReLU is none of gelu, gelu_tanh, silu, identity$"),
    "GELU of another kind": (attribute("act", approximate="other"), "^act GELU is none of"),
    "hook of act": (lambda b: hooked(b.act), "^act has hooks$"),
    "hook of conv": (lambda b: hooked(b.conv), "^conv has hooks$"),
    "conv of another class": (changed("conv", nn.Identity), "^conv is a Identity, not a plain nn.Conv2d$"),
    "weight": (changed("conv.weight", lambda: subclass(8, 1, 3, 3)), "^conv.weight is a Subclass, not a plain tensor$"),
    "bias": (changed("conv.bias", lambda: subclass(8)), "^conv.bias is a Subclass, not a plain tensor$"),
    "no bias": (changed("conv", lambda: depthwise(bias=False)), NOT_DEPTHWISE),
    "more channels": (attribute("conv", out_channels=16), NOT_DEPTHWISE),
    "groups": (changed("conv", lambda: depthwise(groups=4)), NOT_DEPTHWISE),
    "stride": (changed("conv", lambda: depthwise(stride=2)), NOT_DEPTHWISE),
    "dilation": (changed("conv", lambda: depthwise(dilation=2, padding=2)), NOT_DEPTHWISE),
    "padding": (changed("conv", lambda: depthwise(padding=0)), NOT_DEPTHWISE),
    "not square": (changed("conv", lambda: nn.Conv2d(8, 8, (3, 5), padding=1, groups=8)), NOT_DEPTHWISE),
    "padding mode": (changed("conv", lambda: depthwise(padding_mode="circular")), NOT_DEPTHWISE),
    "filter beyond 31": (changed("conv", lambda: depthwise(kernel=33)), NOT_DEPTHWISE),
    "weight of another shape": (changed("conv.weight", lambda: nn.Parameter(torch.zeros(8, 1, 5, 5))), NOT_DEPTHWISE),
}  # fmt: skip

OF_THE_BLOCK = {
    **OF_THE_OP,
    "hook": (hooked, "^it has hooks$"),
    "hook of norm": (lambda b: hooked(b.norm), "^norm has hooks$"),
    "hook of fc1": (lambda b: hooked(b.fc1), "^fc1 has hooks$"),
    "hook of fc2": (lambda b: hooked(b.fc2), "^fc2 has hooks$"),
    "hook of ls": (lambda b: hooked(b.ls), "^ls has hooks$"),
    "hook of drop_path": (lambda b: hooked(b.drop_path), "^drop_path has hooks$"),
    "norm of another class": (changed("norm", nn.Identity), "^norm is a Identity, not a plain LayerNorm$"),
    "norm's weight": (changed("norm.weight", lambda: subclass(8)), "^norm.weight is a Subclass, not a plain tensor$"),
    "norm over less": (changed("norm", lambda: nn.LayerNorm(4, elementwise_affine=False)),
                       r"^norm normalises \(4,\), not \(8,\)$"),
    "norm's weight of another shape": (changed("norm.weight", lambda: nn.Parameter(torch.ones(1))),
                                       r"^norm.weight is \(1,\), not \(8,\)$"),
    "fc1 of another class": (changed("fc1", nn.Identity), "^fc1 is a Identity, not a plain nn.Linear$"),
    "fc2's bias": (changed("fc2.bias", lambda: subclass(8)), "^fc2.bias is a Subclass, not a plain tensor$"),
    "fc1 sparse": (changed("fc1.weight", lambda: nn.Parameter(torch.zeros(42, 8).to_sparse_csr(), False)),
                   "^fc1.weight is a Parameter of layout torch.sparse_csr, not a plain tensor$"),
    "fc1 wider": (changed("fc1", lambda: nn.Linear(8, 48)), r"^fc1.weight is \(48, 8\), not \(42, 8\)$"),
    "fc2 narrower": (changed("fc2", lambda: nn.Linear(21, 4)), r"^fc2.weight is \(4, 21\), not \(8, 21\)$"),
    "causal": (changed("conv", lambda: CausalConv2d(8, 8, 3, padding=1, groups=8)), "^conv is causal$"),
    "scale of another class": (changed("ls", nn.Tanh), "^ls is a Tanh, not a LayerScale$"),
    "scale of another shape": (changed("ls", lambda: LayerScale(1, 0.5)), r"^ls.gamma is \(1,\), not \(8,\)$"),
    "scale": (changed("ls.gamma", lambda: subclass(8)), "^ls.gamma is a Subclass, not a plain tensor$"),
    "stochastic depth in training": (lambda b: b.drop_path.train(), "^drop_path is a DropPath, not idle$"),
    "a class from elsewhere": (changed("drop_path", Other), rf"^drop_path is a {__name__}.Other, not idle$"),
    "something after the branch": (changed("drop_path", nn.Tanh), "^drop_path is a Tanh, not idle$"),
    "dtype of one part": (lambda b: b.conv.to(BF16), "^conv.weight is torch.bfloat16 on cpu, not torch.float32 on the"),
    "another device": (lambda b: b.fc2.to("meta"), "^fc2.weight is torch.float32 on meta, not torch.float32 on the"),
}  # fmt: skip


# (conv, norm, act) of a layer of a stem.
OF_A_CONVOLUTION = {
    "hook of conv": (lambda m: hooked(m.conv), "^conv has hooks$"),
    "conv of another class": (changed("conv", nn.Identity), "^conv is a Identity, not a plain nn.Conv2d$"),
    "filter": (changed("conv", lambda: nn.Conv2d(3, 8, 5, 2, 1)), "^conv is .*, not 3 x 3 with stride 2"),
    "stride": (changed("conv", lambda: nn.Conv2d(3, 8, 3, 1, 1)), "^conv is .*, not 3 x 3 with stride 2"),
    "groups": (changed("conv", lambda: nn.Conv2d(3, 9, 3, 2, 1, groups=3)), "^conv is .*, not 3 x 3 with stride 2"),
    "weight": (changed("conv.weight", lambda: subclass(8, 3, 3, 3)), "^conv.weight is a Subclass, not a plain tensor$"),
    "hook of norm": (lambda m: hooked(m.norm), "^norm has hooks$"),
    "norm over less": (changed("norm", lambda: nn.LayerNorm(4, elementwise_affine=False)), "^norm normalises"),
    "hook of act": (lambda m: hooked(m.act), "^act has hooks$"),
    "act of another class": (changed("act", nn.ReLU), "^act is a ReLU, not one of gelu, gelu_tanh, silu, identity$"),
    "dtype": (lambda m: m.norm.to(BF16), "^norm.weight is torch.bfloat16 on cpu, not torch.float32 on the CPU$"),
}

OF_THE_HEAD = {
    "hook of norm": (lambda m: hooked(m.norm), "^norm has hooks$"),
    "hook of fc1": (lambda m: hooked(m.fc1), "^fc1 has hooks$"),
    "hook of act": (lambda m: hooked(m.act), "^act has hooks$"),
    "another act": (changed("act", nn.SiLU), "^act is a SiLU, not a GELU$"),
    "hook of mid": (lambda m: hooked(m.mid), "^the norm after fc1 has hooks$"),
    "mid over less": (changed("mid", lambda: nn.LayerNorm(4, elementwise_affine=False)),
                      r"^the norm after fc1 normalises \(4,\), not \(32,\)$"),
    "norm over less": (changed("norm", lambda: nn.LayerNorm(4, elementwise_affine=False)),
                       r"^norm normalises \(4,\), not \(8,\)$"),
    "hook of dropout": (lambda m: hooked(m.dropout), "^dropout has hooks$"),
    "hook of fc2": (lambda m: hooked(m.fc2), "^fc2 has hooks$"),
    "fc2 of another class": (changed("fc2", nn.Tanh), "^fc2 is a Tanh, not a plain nn.Linear$"),
    "fc2 of other features": (changed("fc2", lambda: nn.Linear(16, 5)), "^fc2 is Linear.*, beside 32 features$"),
    "no classes": (changed("fc2", lambda: nn.Linear(32, 0, bias=False)), "^fc2 is Linear.*, beside 32 features$"),
    "fc1 of another class": (changed("fc1", nn.Tanh), "^fc1 is a Tanh, not a plain nn.Linear$"),
    "dtype": (lambda m: m.fc2.to(BF16), "^fc2.weight is torch.bfloat16 on cpu, not torch.float32 on the CPU$"),
}  # fmt: skip


def block_of(**more):
    return FusedGatedCNNBlock(8, kernel_size=3, ls_init_value=0.5, drop_path=0.5, **more).eval()


def layer():
    return nn.ModuleDict({"conv": nn.Conv2d(3, 8, 3, 2, 1), "norm": nn.LayerNorm(8), "act": nn.GELU()}).eval()


def head():
    return nn.ModuleDict({
        "norm": nn.LayerNorm(8), "fc1": nn.Linear(8, 32), "act": nn.GELU(), "mid": nn.LayerNorm(32),
        "dropout": nn.Dropout(0.1), "fc2": nn.Linear(32, 5),
    }).eval()  # fmt: skip


def of_layer(m):
    return conv3x3s2_reason(m.conv, m.norm, m.act, F32)


def of_head(m):
    return head_reason(m.norm, m.fc1, m.act, m.mid, m.dropout, m.fc2, F32)


def of_block(block):
    return gated_cnn_block_reason(block, F32)


CASES = [
    (make, reason, *case)
    for make, reason, cases in (
        (block_of, gated_dwconv_reason, OF_THE_OP),
        (block_of, of_block, OF_THE_BLOCK),
        (layer, of_layer, OF_A_CONVOLUTION),
        (head, of_head, OF_THE_HEAD),
    )
    for case in cases.items()
]


@pytest.mark.parametrize(
    ("make", "reason", "change", "said"),
    [(make, reason, *case) for make, reason, _, case in CASES],
    ids=[f"{reason.__name__}: {name}" for _, reason, name, _ in CASES],
)
def test_the_reason(make, reason, change, said):
    modules = make()
    assert reason(modules) is None
    change(modules)
    found = reason(modules)
    assert found is not None
    assert re.search(said, found), found


@pytest.mark.filterwarnings("ignore:FusedGatedCNNBlock runs as")
def test_what_may_be_left_out():
    assert of_block(block_of(conv_ratio=0)) is None
    assert of_block(FusedGatedCNNBlock(8).eval()) is None  # nn.Identity for ls and drop_path
    block = block_of()
    block.norm = nn.LayerNorm(8, elementwise_affine=False)
    block.fc1.bias = block.fc2.bias = None
    assert of_block(block) is None
    m = layer()
    assert conv3x3s2_reason(m.conv, None, None, F32) is None
    assert conv3x3s2_reason(m.conv, m.norm, None, F32) is None
    m = head()
    assert head_reason(m.norm, m.fc1, m.act, None, m.dropout, m.fc2, F32) is None
    assert head_reason(m.norm, m.fc1, m.act, m.mid, m.dropout, nn.Identity(), F32) is None


def test_dtypes_and_devices():
    said = "the fused ops compute in float32 and bfloat16, not in torch.float16"
    for make, reason in ((block_of, gated_cnn_block_reason), (layer, lambda m, d: conv3x3s2_reason(*m.values(), d)),
                         (head, lambda m, d: head_reason(*m.values(), d))):  # fmt: skip
        assert reason(make().half(), torch.float16) == said
        assert reason(make().bfloat16(), BF16) is None
    block = block_of()
    assert gated_cnn_block_reason(block.half(), torch.float16, dtypes=(F32, torch.float16)) is None
    assert gated_cnn_block_reason(block.float().to("meta"), F32, torch.device("meta")) is None
    assert gated_cnn_block_reason(block_of(), F32, torch.device("meta")) == (
        "norm.weight is torch.float32 on cpu, not torch.float32 on meta"
    )


@pytest.mark.parametrize(
    ("act", "name"),
    [(nn.GELU(), "gelu"), (nn.GELU("tanh"), "gelu_tanh"), (nn.SiLU(), "silu"), (nn.Identity(), "identity"),
     (nn.ReLU(), None), (nn.Hardswish(), None)],
    ids=repr,
)  # fmt: skip
def test_names_of_activations(act, name):
    assert activation_name(act) == name


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_parameters_that_are_no_plain_tensors(part):
    fc, norm = nn.Linear(8, 8), nn.LayerNorm(8)
    assert linear_weights(fc) == (fc.weight, fc.bias)
    assert is_plain_layer_norm(norm)
    for module in (fc, norm):
        setattr(module, part, subclass(*getattr(module, part).shape))
    assert linear_weights(fc) is None
    assert not is_plain_layer_norm(norm)
