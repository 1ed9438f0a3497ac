"""A few training steps, in one process or under torchrun; the loss of every step goes to a file.

    python tests/distributed_training.py single OUT
    torchrun --nproc-per-node 2 tests/distributed_training.py ddp|fsdp OUT

Every process sees its share of the same batches, so that the losses, averaged over the processes, are those of one.
Blocks are checkpointed. fsdp trains a patched model of timm's, so that both class swaps meet; its gathered state_dict
comes out under the names of one process.
"""

import gc
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from mambaout_kernels import patch, unpatch
from mambaout_kernels.models import create_model
from mambaout_kernels.nn.block import FusedGatedCNNBlock
from mambaout_kernels.weights.checkpoints import to_authors, to_timm

STEPS, BATCH, CLASSES = 6, 8, 4


def batches():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (BATCH,), generator=generator)
    images = torch.randn(BATCH, 3, 32, 32, generator=generator) + labels.view(-1, 1, 1, 1)
    return [(images, labels)] * STEPS


def make_model():
    torch.manual_seed(0)
    return create_model("test_mambaout", num_classes=CLASSES, ls_init_value=0.5)


def make_patched_model():
    import timm

    model = timm.create_model("test_mambaout", num_classes=CLASSES, ls_init_value=0.5)
    model.load_state_dict(to_timm(make_model().state_dict()), strict=True)
    return patch(model)


def shard(model):
    from torch.distributed.fsdp import fully_shard

    for block in [m for m in model.modules() if isinstance(m, FusedGatedCNNBlock)]:
        fully_shard(block)
    return fully_shard(model)


def refuses_to_unpatch(model):
    try:
        unpatch(model)
    except ValueError as error:
        return "unpatch before fully_shard" in str(error)
    return False


def full_state_dict(model):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def train(kind: str, rank: int, world: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The loss of every step, and the model's state_dict; nothing else that refers to the process group is left."""
    model: nn.Module = make_patched_model() if kind == "fsdp" else make_model()
    model.train()
    apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, FusedGatedCNNBlock))
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    elif kind == "fsdp":
        model = shard(model)
        assert all(type(p).__name__ == "DTensor" for p in model.parameters())
        assert refuses_to_unpatch(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for images, labels in batches():
        loss = nn.functional.cross_entropy(model(images[rank::world]), labels[rank::world])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        if world > 1:
            dist.all_reduce(mean)
        losses.append(mean.item() / world)
    weights = full_state_dict(model) if kind == "fsdp" else model.state_dict()
    weights = {key.removeprefix("module.").replace("_checkpoint_wrapped_module.", ""): w for key, w in weights.items()}
    return losses, to_authors(weights) if kind == "fsdp" else weights


def main(kind: str, out: Path) -> None:
    torch.set_num_threads(1)
    rank, world = 0, 1
    if kind != "single":
        dist.init_process_group("gloo")
        rank, world = dist.get_rank(), dist.get_world_size()
    losses, weights = train(kind, rank, world)
    if rank == 0:
        torch.save(weights, out.with_suffix(".pth"))
        out.write_text(json.dumps(losses))
    if world > 1:
        # Only without any reference to it does gloo join its threads; one that lets go of a tensor while the
        # interpreter shuts down ends the process.
        gc.collect()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
