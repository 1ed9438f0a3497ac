"""Train a MambaOut from scratch with DeiT's recipe, that of the authors.

    python examples/train.py --model test_mambaout --data digits --out runs/fused
    python examples/train.py --model mambaout_tiny --data path/to/imagenet --out runs/tiny --autocast

Every hyperparameter is in recipes.json: the recipe, then where a variant or a data set differs; `--set name=json`
overrides one. A run that was stopped or killed goes on with the same command, from the last whole epoch, to the same
result. OUT gets last.pth, log.csv and curves.png.
"""

import argparse
import contextlib
import csv
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from curves import plot
from data import DIGITS, datasets
from torch import nn
from torch.utils.data import DataLoader

import mambaout_kernels as mk

RECIPES = json.loads(Path(__file__).with_name("recipes.json").read_text(encoding="utf-8"))
COLUMNS = ("epoch", "lr", "train_loss", "val_loss", "val_accuracy", "ema_accuracy", "seconds")


def recipe_for(model: str, data: str, changes: list[str]) -> dict[str, Any]:
    """The recipe, with what the variant, the data set and the command line set otherwise."""
    recipe = {**RECIPES["deit"], **RECIPES["variants"].get(model, {}), **RECIPES["data"].get(data, {})}
    allowed = [*recipe, "ls_init_value"]
    for change in changes:
        name, _, value = change.partition("=")
        if name not in allowed:
            raise argparse.ArgumentTypeError(f"--set: {name!r} is no hyperparameter; allowed: {', '.join(allowed)}")
        recipe[name] = json.loads(value)
    return recipe


def seed_everything(seed: int) -> None:
    """What augmentation, mixup and stochastic depth draw from; set for each epoch, so that one can be done again."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class Run:
    """Model, optimizer, schedule, average and history; saved whole after every epoch."""

    def __init__(self, args: argparse.Namespace, recipe: dict[str, Any]):
        from timm.data import Mixup
        from timm.optim import create_optimizer_v2
        from timm.scheduler import CosineLRScheduler
        from timm.utils import ModelEmaV3

        self.args, self.recipe = args, recipe
        self.train_set, self.val_set, classes = datasets(args.data, recipe)
        seed_everything(args.seed)
        options = {key: recipe[key] for key in ("drop_path_rate", "ls_init_value") if key in recipe}
        self.model = mk.create_model(args.model, num_classes=classes, causal=args.causal, **options).to(args.device)
        self.ema = ModelEmaV3(self.model, decay=recipe["ema_decay"]) if recipe["ema_decay"] else None
        self.optimizer = create_optimizer_v2(
            self.model,
            opt=recipe["opt"],
            lr=recipe["lr_per_1024"] * recipe["batch"] / 1024,
            weight_decay=recipe["weight_decay"],
        )
        self.scheduler = CosineLRScheduler(
            self.optimizer,
            t_initial=recipe["epochs"],
            lr_min=recipe["min_lr"],
            warmup_t=recipe["warmup_epochs"],
            warmup_lr_init=recipe["warmup_lr"],
        )
        self.mixup = Mixup(
            mixup_alpha=recipe["mixup"],
            cutmix_alpha=recipe["cutmix"],
            prob=recipe["mixup_prob"] if recipe["mixup"] or recipe["cutmix"] else 0.0,
            switch_prob=recipe["mixup_switch_prob"],
            label_smoothing=recipe["label_smoothing"],
            num_classes=classes,
        )
        self.history: list[dict[str, Any]] = []

    @property
    def epochs(self) -> int:
        return self.recipe["epochs"] + self.recipe["cooldown_epochs"]

    def loader(self, dataset: Any, train: bool, epoch: int) -> DataLoader:
        return DataLoader(
            dataset,
            batch_size=self.recipe["batch"],
            shuffle=train,
            drop_last=train,
            num_workers=self.args.workers,
            generator=torch.Generator().manual_seed(self.args.seed * 100_003 + epoch),
        )

    def autocast(self) -> Any:
        return torch.autocast(self.args.device, torch.bfloat16, enabled=self.args.autocast)

    def train_epoch(self, epoch: int, step: Any) -> float:
        """Mean training loss; `step()` is called after every batch."""
        seed_everything(self.args.seed * 100_003 + epoch)
        self.scheduler.step(epoch)
        self.model.train()
        total, count = 0.0, 0
        for images, labels in self.loader(self.train_set, True, epoch):
            images, targets = self.mixup(images.to(self.args.device), labels.to(self.args.device))
            with self.autocast():
                loss = nn.functional.cross_entropy(self.model(images), targets)
            self.optimizer.zero_grad()
            loss.backward()
            if self.recipe["clip_grad"]:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe["clip_grad"])
            self.optimizer.step()
            if self.ema is not None:
                self.ema.update(self.model)
            total, count = total + loss.item() * len(images), count + len(images)
            step()
        return total / count

    @torch.inference_mode()
    def evaluate(self, model: nn.Module) -> tuple[float, float]:
        """(mean loss, accuracy) on the validation set."""
        model.eval()
        loss, right = 0.0, 0
        for images, labels in self.loader(self.val_set, False, 0):
            labels = labels.to(self.args.device)
            with self.autocast():
                logits = model(images.to(self.args.device)).float()
            loss += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            right += int((logits.argmax(1) == labels).sum())
        return loss / len(self.val_set), right / len(self.val_set)

    def save(self, folder: Path) -> None:
        """Whole or not at all, whenever the process is killed."""
        content = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
            "recipe": self.recipe,
            "name": self.args.model,
            **({"model_ema": self.ema.module.state_dict()} if self.ema is not None else {}),
        }
        torch.save(content, folder / "last.tmp")
        os.replace(folder / "last.tmp", folder / "last.pth")
        with (folder / "log.tmp").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.history)
        os.replace(folder / "log.tmp", folder / "log.csv")

    def resume(self, path: Path) -> None:
        content = torch.load(path, map_location=self.args.device, weights_only=True)
        if (content["name"], content["recipe"]) != (self.args.model, self.recipe):
            raise argparse.ArgumentTypeError(f"--out: {path} is of another model or recipe; choose another folder")
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        if self.ema is not None:
            self.ema.module.load_state_dict(content["model_ema"])
        self.history = content["history"]


@contextlib.contextmanager
def progress(epochs: int, batches: int, done: int) -> Iterator[Any]:
    """Yields show(batch, text): a bar on a terminal, else one line per epoch."""
    if not sys.stderr.isatty():
        yield lambda text=None: print(text, flush=True) if text else None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}")) as bar:
        task = bar.add_task("", total=epochs * batches, completed=done * batches)

        def show(text: str | None = None) -> None:
            if text:
                bar.update(task, description=text)
            else:
                bar.advance(task)

        yield show


def train(args: argparse.Namespace, recipe: dict[str, Any]) -> list[dict[str, Any]]:
    run = Run(args, recipe)
    args.out.mkdir(parents=True, exist_ok=True)
    if (args.out / "last.pth").exists():
        run.resume(args.out / "last.pth")
    batches, done = len(run.train_set) // recipe["batch"], len(run.history)
    with progress(run.epochs, batches, done) as show:
        for epoch in range(done, min(run.epochs, args.stop_after or run.epochs)):
            start = time.perf_counter()
            train_loss = run.train_epoch(epoch, show)
            val_loss, accuracy = run.evaluate(run.model)
            row = dict.fromkeys(COLUMNS, "") | {
                "epoch": epoch + 1, "lr": run.optimizer.param_groups[0]["lr"], "train_loss": train_loss,
                "val_loss": val_loss, "val_accuracy": accuracy, "seconds": time.perf_counter() - start,
            }  # fmt: skip
            if run.ema is not None:
                row["ema_accuracy"] = run.evaluate(run.ema.module)[1]
            run.history.append(row)
            run.save(args.out)
            show(f"epoch {epoch + 1}/{run.epochs}: loss {train_loss:.4f}, val {val_loss:.4f}, accuracy {accuracy:.2%}")
    plot([args.out], args.out / "curves.png")
    return run.history


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict[str, Any]]:
    parser = argparse.ArgumentParser(description="Train a MambaOut with DeiT's recipe.")
    parser.add_argument("--model", default="test_mambaout", choices=list(mk.VARIANTS), help="default: %(default)s")
    parser.add_argument("--data", default=DIGITS, help=f"{DIGITS!r} or a folder with train/ and val/")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; an unfinished run in it goes on")
    parser.add_argument("--backend", choices=mk.backends.NAMES, help="default: the fastest there is")
    parser.add_argument("--causal", action="store_true", help="causal convolutions, for the paper's ablation")
    parser.add_argument("--autocast", action="store_true", help="bf16 autocast")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=0, help="processes that load images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop-after", type=int, metavar="EPOCHS", help="stop early; the same command goes on later")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=JSON", help="one hyperparameter")
    args = parser.parse_args(argv)
    try:
        return args, recipe_for(args.model, args.data, args.set)
    except (argparse.ArgumentTypeError, json.JSONDecodeError) as error:
        parser.error(str(error))


def main(argv: list[str] | None = None) -> int:
    args, recipe = parse(argv)
    try:
        with mk.backends.force(args.backend) if args.backend else contextlib.nullcontext():
            history = train(args, recipe)
    except argparse.ArgumentTypeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if history:
        best = max(history, key=lambda row: row["val_accuracy"])
        print(f"last {history[-1]['val_accuracy']:.2%}, best {best['val_accuracy']:.2%} in epoch {best['epoch']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
