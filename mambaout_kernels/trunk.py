"""A trunk that was called before: its ops one after the other, without calling its modules.

A model's weights, read once for an image, drive everything else out of the caches. Each module that is called then
fetches its code and objects from memory: without them a model's call on two threads is a fiftieth shorter.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .linear import all_hooked, hooked
from .packs import Pack
from .seen import Objects, Recording, Seen, observed, recording


def _forwards(modules: Iterable[nn.Module]) -> list[tuple[type, Any]]:
    """Of each type its forward."""
    return [(kind, kind.forward) for kind in {type(m) for m in modules}]


def call(
    pack: Pack,
    modules: Callable[[], tuple[list[nn.Module], list[nn.Module]]],
    run: Callable[[Tensor], Tensor],
    x: Tensor,
) -> Tensor:
    """run(x), or the same result from the ops that it called the last time, where they are all that it does.

    Args:
        pack: where they are kept.
        modules: gives those whose children run goes through, and those that are called.
        run: images (N, C, H, W) to a map (N, H', W', C').
        x: the images.
    """
    if torch.compiler.is_compiling():
        return run(x)
    if pack.seen is not None and type(x) is Tensor and pack.seen.again(x) and not all_hooked():
        forwards, steps = pack.seen.arguments
        if all(kind.forward is forward for kind, forward in forwards):
            y = x.permute(0, 2, 3, 1)
            for op, arguments in steps:
                y = op(y, *arguments)
            return y
    if observed() or type(x) is not Tensor or torch.is_grad_enabled() or all_hooked():
        return run(x)
    with recording() as ops:
        y = run(x)
    if not _is_all(ops, x, y):
        return y
    parents, called = modules()
    if all(_is_known(m) for m in called):
        objects = Objects()
        for parent in parents:
            objects.add_entries(parent._modules)
            objects.sizes.append((parent._modules, len(parent._modules)))
        objects.add_called(called)
        for _, seen in ops.steps:
            objects.add(seen.objects)
        seen = Seen(objects, x, (_forwards(called), [(op, step.arguments) for op, step in ops.steps]))
        pack.seen = seen if seen.again(x) else None
    return y


def _is_known(module: nn.Module) -> bool:
    """Whether calling it does what its class does, which is one of this package."""
    package = __name__.partition(".")[0]
    known = type(module) is nn.Sequential or type(module).__module__.partition(".")[0] == package
    return known and not hooked(module)


def _is_all(ops: Recording, x: Tensor, y: Tensor) -> bool:
    """Whether the ops are all that was done between x and y, as far as modules of this package go."""
    if ops.first is None or not ops.chained or ops.last is not y:
        return False
    image = x.permute(0, 2, 3, 1)
    first = ops.first
    return (first.data_ptr(), first.shape, first.stride()) == (image.data_ptr(), image.shape, image.stride())
