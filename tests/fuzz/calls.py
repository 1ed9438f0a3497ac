"""Valid calls of the ops, and what they give, in plain PyTorch."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambaout_kernels import reference
from mambaout_kernels.comparators import reference as comparators
from mambaout_kernels.comparators import selective_scan as _selective_scan  # noqa: F401 - it defines the op
from mambaout_kernels.reference import ACTIVATIONS

OPS = torch.ops.mambaout_kernels
FLOATS = (torch.float32, torch.bfloat16)
DTYPES = (*FLOATS, torch.float16, torch.float64)


def cpu_ops() -> dict[str, Any]:
    """Every op that the dispatcher runs on CPU tensors, by name."""
    names = sorted(n for n in torch._C._dispatch_get_all_op_names() if n.startswith("mambaout_kernels::"))
    on_cpu = [n for n in names if torch._C._dispatch_has_computed_kernel_for_dispatch_key(n, "CPU")]
    return {n.partition("::")[2]: getattr(OPS, n.partition("::")[2]).default for n in on_cpu}


class Draw(random.Random):
    """Random choices; tensors come from torch's own generator."""

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def size(self, least: int = 1) -> int:
        return self.choice((least, 1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 17, 20, 33))

    def pixels(self) -> tuple[int, int, int]:
        return self.choice((1, 1, 2, 3, 0)), self.randint(0, 3) or self.randint(0, 12), self.choice((1, 2, 5, 9, 12, 0))

    def act(self) -> str:
        return self.choice(ACTIVATIONS)

    def eps(self) -> float:
        return self.choice((1e-6, 1e-5, 1e-3))

    def maybe(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
        return torch.randn(shape).to(dtype) if self.chance(0.7) else None


# --- what an op computes; a packed tensor carries the function that it stands for ---


def _rows(t: Tensor) -> Tensor:
    return t.flatten(0, -2) if t.ndim > 1 else t[None]


def _norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _linear(x, weight, bias, stream_weight=False):
    return F.linear(x, weight, bias)


def _linear_dx(dy, weight):
    return dy @ weight


def _linear_dweight(dy, x):
    return _rows(dy).t() @ _rows(x), _rows(dy).sum(dim=0)


def _name(act) -> str:
    if isinstance(act, Tensor):  # which PyTorch takes for a number
        act = 0 if act.is_meta else int(act)
    return act if isinstance(act, str) else ACTIVATIONS[act]


def _gated_dwconv(u, weight, bias, act):
    return reference.gated_dwconv(u, weight, bias, _name(act))


def _gated_dwconv_backward(dy, u, weight, bias, act):
    if u.is_meta and _gated_dwconv(u, weight, bias, act).shape == dy.shape:
        return u, weight, bias  # the sizes of their gradients
    return reference.gated_dwconv_backward(dy, u, weight, bias, _name(act))


def _head(x, norm_weight, norm_bias, fc1_weight, fc1_bias, mid_weight, mid_bias, fc2_weight, fc2_bias, eps, mid_eps,
          mid_normed, dtype):  # fmt: skip
    y = F.gelu(F.linear(_norm(x.mean((1, 2)), norm_weight, norm_bias, eps), fc1_weight, fc1_bias))
    y = _norm(y, mid_weight, mid_bias, mid_eps) if mid_normed else y
    return y if fc2_weight is None else F.linear(y, fc2_weight, fc2_bias)


def _block(norm_weight, norm_bias, fc1_weight, fc1_bias, conv_weight, conv_bias, fc2_weight, fc2_bias, scale, eps, act,
           bf16):  # fmt: skip
    def block(x):
        weight = x.new_zeros(0, 1, 1, 1) if conv_weight is None else conv_weight
        bias = x.new_zeros(len(weight)) if conv_bias is None or conv_weight is None else conv_bias
        y = _gated_dwconv(F.linear(_norm(x, norm_weight, norm_bias, eps), fc1_weight, fc1_bias), weight, bias, act)
        return x + F.linear(y, fc2_weight, fc2_bias) * (1 if scale is None else scale)

    return block


def _convolution(weight, bias, norm_weight, norm_bias, normed, eps, act, bf16):
    def convolution(x):
        if x.numel() == 0:
            return x.new_empty(len(x), (x.shape[1] + 1) // 2, (x.shape[2] + 1) // 2, len(weight))
        y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, stride=2, padding=1).permute(0, 2, 3, 1)
        return reference.activation(_norm(y, norm_weight, norm_bias, eps) if normed else y, act)

    return convolution


def _run_block(x, packed):
    return packed.layer(x) if hasattr(packed, "layer") else torch.empty(x.shape, device="meta")


def _run_convolution(x, packed, out_channels, dtype):
    shape = (x.shape[0], (x.shape[1] + 1) // 2, (x.shape[2] + 1) // 2, out_channels)
    return packed.layer(x) if hasattr(packed, "layer") else torch.empty(shape, device="meta")


# --- valid arguments ---


def _leading(d: Draw) -> list[int]:
    return [d.choice((1, 2, 3, 5, 0)) for _ in range(d.choice((1, 1, 0, 2, 3)))]


def linear(d):
    inputs, outputs = d.size(0), d.size(0)
    return [torch.randn(*_leading(d), inputs), torch.randn(outputs, inputs), d.maybe(outputs), d.chance(0.5)]


def linear_dx(d):
    inputs, outputs = d.size(0), d.size(0)
    return [torch.randn(*_leading(d), outputs), torch.randn(outputs, inputs)]


def linear_dweight(d):
    leading = _leading(d)
    return [torch.randn(*leading, d.size(0)), torch.randn(*leading, d.size(0))]


def gated_dwconv(d):
    dtype, hidden, K = d.choice(DTYPES), d.size(0), d.choice((7, 7, 1, 3, 5, 9, 31))
    parameters = torch.float32 if dtype.itemsize == 2 and d.chance(0.5) else dtype
    C = d.choice((0, hidden, d.randint(0, hidden)))
    u = torch.randn(*d.pixels(), 2 * hidden).to(dtype)
    return [u, torch.randn(C, 1, K, K).to(parameters) / K, torch.randn(C).to(parameters), d.act()]


def gated_dwconv_backward(d):
    u, *others = gated_dwconv(d)
    return [torch.randn(*u.shape[:3], u.shape[3] // 2).to(u.dtype), u, *others]


def _with_code(arguments):
    return [*arguments[:-1], ACTIVATIONS.index(arguments[-1])]


def pack_gated_cnn_block(d, dim=0):
    dim, hidden, K = dim or d.size(), d.size(), d.choice((7, 7, 1, 3, 5, 9))
    C, dtype = d.randint(0, hidden), d.choice(FLOATS)
    conv = torch.randn(C, 1, K, K).to(dtype) / K if d.chance(0.9) else None
    return [
        d.maybe(dim, dtype=dtype), d.maybe(dim), torch.randn(2 * hidden, dim).to(dtype), d.maybe(2 * hidden),
        conv, None if conv is None else d.maybe(C), torch.randn(dim, hidden).to(dtype), d.maybe(dim), d.maybe(dim),
        d.eps(), d.act(), False,
    ]  # fmt: skip


def pack_conv3x3s2(d):
    outputs, inputs, dtype = d.size(), d.size(), d.choice(FLOATS)
    return [
        torch.randn(outputs, inputs, 3, 3).to(dtype), d.maybe(outputs, dtype=dtype), d.maybe(outputs), d.maybe(outputs),
        d.chance(0.5), d.eps(), d.act(), False,
    ]  # fmt: skip


def packed_block(d, dim=0) -> Tensor:
    arguments = pack_gated_cnn_block(d, dim)
    packed = OPS.pack_gated_cnn_block(*arguments)
    packed.layer, packed.channels = _block(*map(wide, arguments)), arguments[2].shape[1]
    return packed


def packed_blocks(d) -> Tensor:
    first = packed_block(d)
    if d.chance(0.6):
        return first
    second = packed_block(d, first.channels)
    both = OPS.join_packed([first, second])
    both.layer, both.channels, both.joined = lambda x: second.layer(first.layer(x)), first.channels, True
    return both


def packed_convolution(d) -> Tensor:
    arguments = pack_conv3x3s2(d)
    packed = OPS.pack_conv3x3s2(*arguments)
    packed.layer, packed.channels, packed.outputs = _convolution(*map(wide, arguments)), *arguments[0].shape[1::-1]
    return packed


def gated_cnn_blocks(d):
    packed = packed_blocks(d)
    return [torch.randn(*d.pixels(), packed.channels).to(d.choice(FLOATS)), packed]


def conv3x3s2(d):
    packed = packed_convolution(d)
    x = torch.randn(*d.pixels(), packed.channels).to(d.choice(FLOATS))
    return [x, packed, packed.outputs, d.choice(FLOATS)]


def head(d):
    channels, hidden, classes, dtype = d.size(), d.size(), d.size(), d.choice(FLOATS)
    N, H, W = d.pixels()
    vector = lambda count: d.maybe(count, dtype=dtype)  # noqa: E731
    return [
        torch.randn(N, H + 1, W + 1, channels).to(d.choice(FLOATS)), vector(channels), vector(channels),
        torch.randn(hidden, channels).to(dtype), vector(hidden), vector(hidden), vector(hidden),
        d.maybe(classes, hidden, dtype=dtype), vector(classes), d.eps(), d.eps(), d.chance(0.5), d.choice(FLOATS),
    ]  # fmt: skip


def selective_scan(d, dtypes=DTYPES):
    N, G, L, D, S = (
        d.choice((1, 2, 0)),
        d.randint(1, 4),
        d.choice((1, 5, 31, 32, 33, 70)),
        d.size(),
        d.choice((1, 3, 4, 9)),
    )
    dtype, w = d.choice(dtypes), torch.randn
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    order = torch.stack([torch.randperm(L) for _ in range(G)]).int()
    tokens = [w(N, d.choice((1, G)), L, D), w(N, G, L, D), w(N, G, L, S), w(N, G, L, S)]
    x, delta, B, C = (t.to(dtype) for t in tokens)
    A, skip, bias = (t.to(parameter) for t in (-w(G, D, S).abs(), w(G, D), w(G, D)))
    return [x, delta, A, B, C, skip, bias, order]


def selective_scan_backward(d, dtypes=DTYPES):
    arguments = selective_scan(d, dtypes)
    return [torch.randn(arguments[0].shape).to(arguments[0].dtype), *arguments]


def join_packed(d):
    return [[packed_blocks(d) for _ in range(d.randint(1, 3))]]


def split_gated_cnn_block(d):  # a GPU's: to be refused
    dim, hidden = d.size(), 8
    w = torch.randn
    return [
        w(*d.pixels(), dim), w(dim), w(dim), w(2 * hidden, dim), w(2 * hidden), w(5, 1, 3, 3), w(5), w(10, 16),
        w(dim, hidden), w(dim), d.maybe(dim), d.eps(), d.act(),
    ]  # fmt: skip


def layer_norm_act(d):  # likewise
    dim = d.size()
    return [torch.randn(*d.pixels(), dim), d.maybe(dim), torch.randn(dim), torch.randn(dim), d.eps(), d.act(), None]


def layer_norm_act_backward(d):  # likewise
    dim, pixels = d.size(), d.pixels()
    dy, x, weight, bias = (torch.randn(size) for size in ((*pixels, dim), (*pixels, dim), (dim,), (dim,)))
    return [dy, x, weight, bias, d.eps(), d.act(), d.chance(0.5)]


def conv3x3s2_norm_act(d):  # likewise
    channels, dim = d.size(), d.size()
    w = torch.randn
    x = w(1, channels, 5, 4, dtype=torch.bfloat16)
    return [x, *(t.bfloat16() for t in (w(9 * channels, dim), w(dim), w(dim), w(dim))), d.eps(), d.act()]


@dataclass(frozen=True)
class Known:
    """An op: valid arguments, what it computes, and the dtypes of its results, from the arguments."""

    valid: Callable[[Draw], list] | None
    computes: Callable[..., Any] | None = None
    dtypes: Callable[[list], tuple[torch.dtype, ...]] = lambda a: (a[0].dtype,)


def _bytes(arguments: list) -> tuple[torch.dtype, ...]:
    return (torch.uint8,)


def _of_gradients(a: list) -> tuple[torch.dtype, ...]:
    return tuple(t.dtype for t in a[1:4])


def _of_scan(a: list) -> tuple[torch.dtype, ...]:
    return tuple(t.dtype for t in a[1:8])


KNOWN = {
    "linear": Known(linear, _linear),
    "linear_dx": Known(linear_dx, _linear_dx),
    "linear_dweight": Known(linear_dweight, _linear_dweight, lambda a: (a[0].dtype, a[0].dtype)),
    "gated_dwconv": Known(gated_dwconv, _gated_dwconv),
    "gated_dwconv_cpu": Known(lambda d: _with_code(gated_dwconv(d)), _gated_dwconv),
    "gated_dwconv_backward": Known(gated_dwconv_backward, _gated_dwconv_backward, _of_gradients),
    "gated_dwconv_backward_cpu": Known(
        lambda d: _with_code(gated_dwconv_backward(d)), _gated_dwconv_backward, _of_gradients
    ),
    "head": Known(head, _head, lambda a: (a[-1],)),
    "pack_gated_cnn_block": Known(pack_gated_cnn_block, _block, _bytes),
    "gated_cnn_blocks": Known(gated_cnn_blocks, _run_block),
    "join_packed": Known(join_packed, lambda packed: torch.cat([p.flatten() for p in packed]), _bytes),
    "repack_gated_cnn_blocks": Known(lambda d: [packed_blocks(d)], None, _bytes),
    "runs_packed_gated_cnn_blocks": Known(lambda d: [packed_blocks(d)]),
    "pack_conv3x3s2": Known(pack_conv3x3s2, _convolution, _bytes),
    "conv3x3s2": Known(conv3x3s2, _run_convolution, lambda a: (a[-1],)),
    "repack_conv3x3s2": Known(lambda d: [packed_convolution(d)], None, _bytes),
    "runs_packed_conv3x3s2": Known(lambda d: [packed_convolution(d)]),
    "selective_scan": Known(selective_scan, comparators.selective_scan),
    "selective_scan_cpu": Known(lambda d: selective_scan(d, DTYPES[:3]), comparators.selective_scan),
    "selective_scan_backward": Known(selective_scan_backward, comparators.selective_scan_backward, _of_scan),
    "selective_scan_backward_cpu": Known(
        lambda d: selective_scan_backward(d, DTYPES[:3]), comparators.selective_scan_backward, _of_scan
    ),
    "split_gated_cnn_block": Known(split_gated_cnn_block),
    "layer_norm_act": Known(layer_norm_act),
    "layer_norm_act_backward": Known(layer_norm_act_backward),
    "conv3x3s2_norm_act": Known(conv3x3s2_norm_act),
}
REFUSED = ("split_gated_cnn_block", "layer_norm_act", "layer_norm_act_backward", "conv3x3s2_norm_act")


def image(arguments: list) -> Tensor:
    """For what is packed of these arguments: something to run it on."""
    weight = arguments[0] if len(arguments) == 8 else arguments[2]
    return torch.randn(1, 4, 5, weight.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def wide(value: Any) -> Any:
    """Floating tensors in fp64; packed tensors and everything else as they are."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double()
    return value


def as_meta(value: Any) -> Any:
    """A tensor of these sizes without values, in fp64 where it is floating."""
    if isinstance(value, list):
        return [as_meta(v) for v in value]
    if not isinstance(value, Tensor):
        return value
    return torch.empty(value.shape, dtype=torch.float64 if value.is_floating_point() else value.dtype, device="meta")
