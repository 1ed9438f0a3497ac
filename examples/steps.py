"""A plain training loop for the dense examples: AdamW, linear warm-up, cosine to zero; loss.csv and loss.png."""

import argparse
import csv
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import mambaout_kernels as mk


def add_arguments(parser: argparse.ArgumentParser, steps: int) -> None:
    parser.add_argument("--model", default="test_mambaout", choices=list(mk.VARIANTS), help="default: %(default)s")
    parser.add_argument("--weights", metavar="FILE", help="pretrained weights for the backbone")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=steps, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=4, help="images per step, default %(default)s")
    parser.add_argument("--held-out", type=int, default=20, help="scenes to judge by, default %(default)s")
    parser.add_argument("--lr", type=float, default=1e-3, help="default: %(default)s; 1e-4 from pretrained weights")
    parser.add_argument("--seed", type=int, default=0)


def optimise(model: nn.Module, loss: Callable[[int], torch.Tensor], args: argparse.Namespace) -> tuple[float, float]:
    """Mean loss over the first and the last tenth of the steps."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05)
    warmup = max(1, args.steps // 20)

    def factor(step: int) -> float:
        return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / args.steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    losses = []
    for step in range(args.steps):
        value = loss(step)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        losses.append(value.item())
        if (step + 1) % max(1, args.steps // 10) == 0:
            recent = losses[-max(1, args.steps // 10) :]
            print(f"step {step + 1}/{args.steps}: loss {sum(recent) / len(recent):.4f}", flush=True)
    write(losses, args.out)
    tenth = max(1, len(losses) // 10)
    return sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth


def write(losses: list[float], folder: Path) -> None:
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "loss.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("step", "loss"), *enumerate(losses, start=1)])
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(losses) + 1), losses, linewidth=0.8)
    axes.set(xlabel="step", ylabel="training loss")
    axes.grid(alpha=0.3)
    figure.savefig(folder / "loss.png", dpi=110)
