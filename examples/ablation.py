"""The paper's ablation (arXiv 2405.07992, section 3.2), from scratch: must a classifier see all, and does it need SSM?

    python examples/ablation.py --out runs/ablation

Six small classifiers of scikit-learn's digits, 2 x 2 pixels a token: attention (a ViT), a gated convolution (MambaOut's
block), and a gated convolution with an SSM after it (Mamba's block); each fully visible, and causal in raster order.
Stem, head and recipe are the same. A seed draws the split, the weights, the batches and the shifts, so that models are
compared seed by seed. OUT gets results.json and ablation.png; a stopped run goes on with the same command.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from intervals import mean_and_interval, plot, report
from torch import Tensor, nn

import mambaout_kernels as mk
from mambaout_kernels.comparators import scan_orders
from mambaout_kernels.comparators.ssm import SelectiveSSM

IMAGES, SIZE, PATCH, CLASSES = 1797, 8, 2, 10
DIM, HEADS, STATES = 48, 3, 8
KERNEL_SIZE = 3  # of 4 x 4 tokens, a filter of 7 sees all at once and leaves an SSM nothing to add
RECIPE = {"batch": 50, "lr": 2e-3, "weight_decay": 0.05, "warmup_epochs": 5, "shift": 1}


class AttentionBlock(nn.Module):
    """x = x + proj(attention(norm1(x)));   x = x + mlp(norm2(x))"""

    def __init__(self, causal: bool):
        super().__init__()
        self.causal = causal
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).flatten(1, 2).unflatten(-1, (3, HEADS, -1))  # (N, L, 3, heads, dim / heads)
        y = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), is_causal=self.causal)
        x = x + self.proj(y.transpose(1, 2).reshape(x.shape))
        return x + self.mlp(self.norm2(x))


class GatedConvBlock(mk.FusedGatedCNNBlock):
    """x + fc2(act(g) * conv(c)),   g, c = fc1(norm(x));   all channels are convolved, as in the paper's figure 1."""

    def __init__(self, causal: bool):
        super().__init__(DIM, expansion_ratio=2, conv_ratio=2, kernel_size=KERNEL_SIZE, causal=causal)


class MambaBlock(GatedConvBlock):
    """x + fc2(act(g) * ssm(act(conv(c)))).   Causal, the SSM scans row by row; fully visible, also back."""

    def __init__(self, causal: bool):
        super().__init__(causal)
        self.ssm = SelectiveSSM(2 * DIM, scans=1 if causal else 2, states=STATES, rank=DIM // 16)

    def forward(self, x: Tensor) -> Tensor:
        g, c = self.fc1(self.norm(x)).chunk(2, dim=-1)
        c = self.act(self.conv(c.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        order = scan_orders.cached(scan_orders.bidirectional, x, *x.shape[1:3])[: self.ssm.scans]
        y = self.ssm.scan(c.flatten(1, 2).unsqueeze(1), order).squeeze(1).view_as(c)
        return x + self.fc2(self.act(g) * y)


MIXERS: dict[str, tuple[type[nn.Module], int]] = {  # and the depth, for about the same number of parameters
    "ViT": (AttentionBlock, 2),
    "GatedConv": (GatedConvBlock, 4),
    "GatedConv+SSM": (MambaBlock, 4),
}
MODES = ("visible", "causal")
MODELS = tuple(f"{mixer}-{mode}" for mixer in MIXERS for mode in MODES)
PAIRS = {f"{mixer}: visible - causal": (f"{mixer}-visible", f"{mixer}-causal") for mixer in MIXERS}
PAIRS |= {f"{mode}: with - without SSM": (f"GatedConv+SSM-{mode}", f"GatedConv-{mode}") for mode in MODES}


class Classifier(nn.Module):
    """Images (N, 8, 8) to logits (N, 10): patches and positions, blocks, the mean of all tokens, a linear head."""

    def __init__(self, name: str):
        super().__init__()
        mixer, mode = name.split("-")
        block, depth = MIXERS[mixer]
        self.stem = nn.Conv2d(1, DIM, PATCH, stride=PATCH)
        self.positions = nn.Parameter(0.5 * torch.randn(SIZE // PATCH, SIZE // PATCH, DIM))  # as large as the stem's
        self.blocks = nn.Sequential(*(block(causal=mode == "causal") for _ in range(depth)))
        self.norm = nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, CLASSES)

    def tokens(self, images: Tensor) -> Tensor:
        return self.norm(self.blocks(self.stem(images.unsqueeze(1)).permute(0, 2, 3, 1) + self.positions))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.tokens(images).mean((1, 2)))

    def no_weight_decay(self) -> set[str]:
        """As Mamba has it; biases, norms and other vectors timm leaves out by itself."""
        return {name for name, _ in self.named_parameters() if name.endswith(("positions", "A_logs"))}


def split(train_images: int, seed: int) -> list[Tensor]:
    """Training images, held-out images, training labels, held-out labels; of every class alike."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images, labels = torch.from_numpy(digits.images).float(), torch.from_numpy(digits.target)
    images = (images / 16 - 0.305) / 0.376
    return train_test_split(images, labels, train_size=train_images, stratify=labels, random_state=seed)


def shifted(images: Tensor, most: int) -> Tensor:
    """Each image moved by up to `most` pixels each way; background comes in."""
    padded = F.pad(images, (most,) * 4, value=images.min().item())
    down, right = torch.randint(2 * most + 1, (2, len(images)))
    return padded.unfold(1, SIZE, 1).unfold(2, SIZE, 1)[torch.arange(len(images)), down, right]


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (model(images).argmax(1) == labels).float().mean().item()


def run(name: str, seed: int, epochs: int, train_images: int) -> dict[str, Any]:
    """One model trained from one seed on one thread; judged once, after the last epoch."""
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler

    torch.set_num_threads(1)
    images, held_out_images, labels, held_out_labels = split(train_images, seed)
    torch.manual_seed(seed)
    model = Classifier(name)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=RECIPE["lr"], weight_decay=RECIPE["weight_decay"])
    warmup = min(RECIPE["warmup_epochs"], epochs // 2)
    scheduler = CosineLRScheduler(optimizer, t_initial=epochs, warmup_t=warmup, warmup_lr_init=1e-5)
    torch.manual_seed(seed)  # the same batches and shifts for every model
    seconds = []
    for epoch in range(epochs):
        start = time.perf_counter()
        scheduler.step(epoch)
        for batch in torch.randperm(len(images)).split(RECIPE["batch"]):
            loss = F.cross_entropy(model(shifted(images[batch], RECIPE["shift"])), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        seconds.append(time.perf_counter() - start)
    return {
        "model": name,
        "seed": seed,
        "accuracy": accuracy(model, held_out_images, held_out_labels),
        "train_accuracy": accuracy(model, images, labels),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds_per_epoch": statistics.median(seconds),
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of runs in the order of their seeds: each model's accuracy, best first, and differences seed by seed."""

    def of(name: str, key: str) -> list[Any]:
        return [row[key] for row in runs if row["model"] == name]

    models = [
        {
            "name": name,
            **mean_and_interval(of(name, "accuracy")),
            "train_accuracy": statistics.mean(of(name, "train_accuracy")),
            "parameters": of(name, "parameters")[0],
            "seconds_per_epoch": statistics.median(of(name, "seconds_per_epoch")),
        }
        for name in dict.fromkeys(row["model"] for row in runs)
    ]
    scores = {row["name"]: row["values"] for row in models}
    differences = [
        {"name": name, **mean_and_interval([a - b for a, b in zip(scores[one], scores[other], strict=True)])}
        for name, (one, other) in PAIRS.items()
        if one in scores and other in scores
    ]
    for row in differences:
        row["zero_inside"] = abs(row["mean"]) <= row["half"]
    return {"models": sorted(models, key=lambda row: -row["mean"]), "differences": differences}


def save(results: dict[str, Any], path: Path) -> None:
    """Whole or not at all, whenever the process is killed."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Token mixing fully visible and causal, with an SSM and without.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results; unfinished ones in it go on")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="default: OUT/ablation.png")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="default: all")
    parser.add_argument("--seeds", type=int, default=8, help="from 0 on, two or more; default: %(default)s")
    parser.add_argument("--epochs", type=int, default=120, help="default: %(default)s")
    parser.add_argument("--train-images", type=int, default=500, help="the rest is held out; default: %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="runs at a time, of a thread each")
    args = parser.parse_args(argv)
    if args.seeds < 2 or min(args.epochs, args.threads) < 1:
        parser.error("--seeds must be 2 or more, --epochs and --threads 1 or more")
    if not CLASSES <= args.train_images <= IMAGES - CLASSES:
        parser.error(f"--train-images must be {CLASSES} to {IMAGES - CLASSES}")
    return args


def main(argv: list[str] | None = None) -> int:
    from joblib import Parallel, delayed

    args = parse(argv)
    path = args.out / "results.json"
    settings = {"epochs": args.epochs, "train_images": args.train_images, "held_out_images": IMAGES - args.train_images}
    results: dict[str, Any] = {"settings": {**RECIPE, **settings}, "runs": []}
    if path.exists():
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["settings"] != results["settings"]:
            print(f"error: --out: {path} is of other settings; choose another folder", file=sys.stderr)
            return 2
        results = stored
    args.out.mkdir(parents=True, exist_ok=True)
    runs = results["runs"]
    wanted = [(name, seed) for seed in range(args.seeds) for name in args.models]
    finished = {(row["model"], row["seed"]) for row in runs}
    jobs = [delayed(run)(*job, args.epochs, args.train_images) for job in wanted if job not in finished]
    try:
        for row in Parallel(args.threads, return_as="generator_unordered")(jobs):
            runs.append(row)
            save(results, path)
            print(f"{row['model']}, seed {row['seed']}: {row['accuracy']:.2%}", flush=True)
    except KeyboardInterrupt:
        print(f"stopped; {path} has {len(runs)} finished runs, and the same command goes on", file=sys.stderr)
        return 130
    runs.sort(key=lambda row: (row["seed"], MODELS.index(row["model"])))
    results.update(summary([row for row in runs if (row["model"], row["seed"]) in wanted]))
    save(results, path)
    report(results)
    plot(results, args.plot or args.out / "ablation.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
