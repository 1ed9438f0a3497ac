"""A model of odd widths trains in one process without zeros, then by DDP and FSDP2 with them.

    torchrun --nproc-per-node 2 tests/nn/aligned_training.py OUT

The losses go to a file, by kind; everything else is tests/distributed_training.py.
"""

import gc
import json
import sys
from pathlib import Path

import distributed_training as training
import torch
import torch.distributed as dist

from mambaout_kernels import create_model, patch
from mambaout_kernels.nn import alignment
from mambaout_kernels.nn import block as block_module
from mambaout_kernels.weights.checkpoints import to_timm

OPTIONS = {"num_classes": training.CLASSES, "ls_init_value": 0.5, "dims": (17, 34, 51, 60)}


def make_model():
    torch.manual_seed(0)
    return create_model("test_mambaout", **OPTIONS)


def make_patched_model():
    import timm

    model = timm.create_model("test_mambaout", **OPTIONS)
    model.load_state_dict(to_timm(make_model().state_dict()), strict=True)
    return patch(model)


def train(kind: str, rank: int, world: int) -> list[float]:
    widths, op = set(), block_module.gated_dwconv

    def recorded(u, *others):
        widths.add(u.shape[-1] // 2)
        return op(u, *others)

    alignment.prefers_alignment = lambda device_type: kind != "single"
    block_module.gated_dwconv = recorded
    losses, _ = training.train(kind, rank, world)
    block_module.gated_dwconv = op
    assert any(width % 4 for width in widths) == (kind == "single"), widths
    return losses


def main(out: Path) -> None:
    torch.set_num_threads(1)
    training.make_model, training.make_patched_model = make_model, make_patched_model
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    losses = {"single": train("single", 0, 1), "ddp": train("ddp", rank, world), "fsdp": train("fsdp", rank, world)}
    if rank == 0:
        out.write_text(json.dumps(losses))
    gc.collect()  # as distributed_training.py has to
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
