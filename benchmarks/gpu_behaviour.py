"""How a backend behaves on a GPU beyond its numbers; and, run as a program, the calls that sanitizers and ncu watch.

python gpu_behaviour.py all       forward and backward at every stage in bf16, then odd sizes
python gpu_behaviour.py 2         at the second stage alone
"""

import copy
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import Tensor

from mambaout_kernels import backends
from mambaout_kernels.benchmarking import accuracy, error_bounds, shapes
from mambaout_kernels.benchmarking.inputs import enlivened
from mambaout_kernels.nn.block import FusedGatedCNNBlock

Found = Iterator[tuple[str, dict[str, Any]]]
ALIGNED, ODD = (2, 14, 14, 256, 96), (2, 9, 11, 41, 17)  # N, H, W, D, C
DTYPES = (torch.bfloat16, torch.float32, torch.float16)


def inputs(sizes: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """u, weight, bias, dy, made on the host and copied: initcheck does not see what kernels of PyTorch write."""
    N, H, W, D, C = sizes
    generator = torch.Generator().manual_seed(0)
    of = ((N, H, W, 2 * D), (C, 1, 7, 7), (C,), (N, H, W, D))
    scales = (1, 1 / 7, 1, 1)
    found = (torch.randn(size, generator=generator) * scale for size, scale in zip(of, scales, strict=True))
    u, weight, bias, dy = (t.to(dtype).to(device) for t in found)
    return u, weight, bias, dy


def results(module: Any, u: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> list[Tensor]:
    y = module.gated_dwconv(u, weight, bias, "gelu")
    return [y, *module.gated_dwconv_backward(dy, u, weight, bias, "gelu")]


def examine(backend: str, device: str) -> Found:
    """Every finding a note or a failure; one that raises does not end the others."""
    checks: list[tuple[str, Callable[[], str | None]]] = []
    for dtype in DTYPES:
        for name, sizes in (("aligned", ALIGNED), ("odd", ODD)):
            how = partial(_same_bits, backends.load(backend), inputs(sizes, dtype, device))
            kinds = ["a second run", "u and dy as slices", "an expanded dy"]
            kinds += ["another stream", "a CUDA graph"] if device == "cuda" else []
            checks += [(f"{name} {_short(dtype)}, {kind}", partial(how, kind)) for kind in kinds]
    for index in range(1, torch.cuda.device_count()):
        checks.append((f"device {index} while another is current", partial(_on_device, backend, index)))
    if device == "cuda":
        checks.append(("beyond 2^31 elements", partial(_beyond_int32, backend)))
        checks.append(("a weight on another device is refused", partial(_refuses, backend)))
    for compiled in (False, True) if device == "cuda" else (False,):  # last: a compiler takes its time
        for dtype, low in ((torch.bfloat16, None), (torch.float32, torch.bfloat16), (torch.float32, torch.float16)):
            what = f"a block's training step, {_short(dtype)}{f' under {_short(low)} autocast' if low else ''}"
            what += ", compiled" if compiled else ""
            checks.append((what, partial(_trained_block, backend, device, dtype, low, compiled)))
    yield from findings(backend, checks)


def findings(subject: str, checks: list[tuple[str, Callable[[], str | None]]]) -> Found:
    """Of checks that say what is wrong, or None; without TF32 in eager's convolutions."""
    for what, run in checks:
        try:
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                wrong = run()
        except Exception as error:
            wrong = f"{type(error).__name__}: {str(error).strip()[-500:]}"
        if wrong is None:
            yield "note", {"text": f"{subject}, {what}: right"}
        else:
            yield "fail", {"text": f"{subject}, {what}: {wrong}"}


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _differ(first: list[Tensor], again: list[Tensor]) -> str | None:
    names = [n for n, a, b in zip(("y", "du", "dweight", "dbias"), first, again, strict=True)
             if not torch.equal(a.cpu(), b.cpu())]  # fmt: skip
    return f"other bits of {', '.join(names)}" if names else None


def _same_bits(module: Any, given: tuple[Tensor, ...], kind: str) -> str | None:
    u, weight, bias, dy = given
    if kind == "an expanded dy":
        wide = dy[:1].expand(dy.shape)
        return _differ(results(module, u, weight, bias, wide.contiguous()), results(module, u, weight, bias, wide))
    first = results(module, *given)
    if kind == "u and dy as slices":
        u, dy = (torch.cat((t, t), -1)[..., : t.shape[-1]] for t in (u, dy))
    if kind == "another stream":
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            again = results(module, u, weight, bias, dy)
        torch.cuda.current_stream().wait_stream(stream)
        return _differ(first, again)
    if kind == "a CUDA graph":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            again = results(module, u, weight, bias, dy)
        graph.replay()
        torch.cuda.synchronize()
        return _differ(first, again)
    return _differ(first, results(module, u, weight, bias, dy))


def _on_device(backend: str, index: int) -> str | None:
    module = backends.load(backend)
    here, there = (results(module, *inputs(ALIGNED, torch.bfloat16, f"cuda:{i}")) for i in (0, index))
    if any(t.device.index != index for t in there):
        return f"results on {[str(t.device) for t in there]}"
    return _differ(here, there)


def _beyond_int32(backend: str) -> str | None:
    """The last image of a tensor of more than 2^31 elements, and the image alone."""
    H, W, D = 56, 56, 256
    _, weight, bias, _ = inputs((1, H, W, D, 96), torch.bfloat16, "cuda")
    images = 2**31 // (H * W * 2 * D) + 2
    u = torch.zeros((images, H, W, 2 * D), dtype=torch.bfloat16, device="cuda")
    u[-1] = torch.randn(u.shape[1:], device="cuda").bfloat16()
    module = backends.load(backend)
    y, alone = module.gated_dwconv(u, weight, bias, "gelu"), module.gated_dwconv(u[-1:].clone(), weight, bias, "gelu")
    return None if torch.equal(y[-1:], alone) else "the last image differs"


def _refuses(backend: str) -> str | None:
    u, weight, bias, _ = inputs(ALIGNED, torch.bfloat16, "cuda")
    try:
        backends.load(backend).gated_dwconv(u, weight.cpu(), bias, "gelu")
    except (RuntimeError, ValueError) as error:
        return None if "weight" in str(error) else f"the message does not name it: {error}"
    return "it is not"


def _trained_block(
    backend: str, device: str, dtype: torch.dtype, low: torch.dtype | None, compiled: bool
) -> str | None:
    """Output and every gradient, within the policy of accuracy.py.

    Without the compiler's cache on the disk: torch 2.11 finds in it under fp16 autocast what it kept under bf16.
    """
    block = enlivened(FusedGatedCNNBlock(96)).to(device, dtype)
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn((2, 14, 14, 96), generator=generator).to(device, dtype) for _ in range(2))

    def step(of: Any, name: str, precision: torch.dtype, cast: torch.dtype | None) -> dict[str, Tensor]:
        leaf = x.to(precision).requires_grad_()
        run = torch.compile(of, fullgraph=True, dynamic=False) if compiled and name == backend else of
        casting = torch.autocast(device, cast or torch.bfloat16, enabled=cast is not None)
        with backends.force(name), casting, functorch_config.patch(enable_autograd_cache=False):
            y = run(leaf)
        names, parameters = zip(*of.named_parameters(), strict=True)
        gradients = torch.autograd.grad(y, [leaf, *parameters], dy.to(y.dtype))
        return {"y": y.detach(), **dict(zip(("x", *names), gradients, strict=True))}

    actual, eager = step(block, backend, dtype, low), step(block, "reference", dtype, low)
    exact = step(copy.deepcopy(block).double(), "reference", torch.float64, None)
    found = accuracy.compare_all(actual, eager, exact, error_bounds.of_block(block, x, dy, low))
    found += accuracy.compare_model(actual, eager, exact)
    return "; ".join(str(one) for one in found if not one.passed) or None


def main(which: str) -> None:
    from mambaout_kernels.backends import cuda

    for stage in shapes.stages("mambaout_tiny", () if which == "all" else (int(which),)):
        sizes = (2 if which == "all" else 128, stage.height, stage.width, stage.hidden, stage.conv_channels)
        results(cuda, *inputs(sizes, torch.bfloat16, "cuda"))
    if which == "all":
        for dtype in DTYPES:
            results(cuda, *inputs(ODD, dtype, "cuda"))
    torch.cuda.synchronize()


if __name__ == "__main__":
    main(sys.argv[1])
