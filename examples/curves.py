"""Curves of runs of train.py laid over each other: python examples/curves.py OUT.png RUN [RUN ...]."""

import csv
import sys
from pathlib import Path

PANELS = (("train_loss", "training loss"), ("val_loss", "validation loss"), ("val_accuracy", "validation accuracy"))


def read(run: Path) -> list[dict[str, float]]:
    with (run / "log.csv").open(encoding="utf-8") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def plot(runs: list[Path], path: Path) -> None:
    """One panel per quantity, one line per run; later runs are dashed, so that curves on top of each other show."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.5), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        for number, run in enumerate(runs):
            rows = read(run)
            style = {"linestyle": "--" if number else "-", "linewidth": 1.2 if number else 2.4}
            axes.plot([row["epoch"] for row in rows], [row[key] for row in rows], label=run.name, **style)
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    plot([Path(run) for run in sys.argv[2:]], Path(sys.argv[1]))
