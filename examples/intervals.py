"""What ablation.py found, over its seeds: means with their intervals, as a table and as a plot."""

import statistics
from pathlib import Path
from typing import Any

COLORS = {"visible": "tab:blue", "causal": "tab:orange"}  # of models; differences are grey


def mean_and_interval(values: list[float]) -> dict[str, Any]:
    """Of the mean over seeds, the 95 % interval by Student's t: mean +- half."""
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return {"mean": statistics.mean(values), "half": float(half), "values": values}


def report(results: dict[str, Any]) -> None:
    print(f"\n{'held-out images right, %':38}{'mean':>6}{'95 %':>9}{'training':>10}{'parameters':>12}{'s/epoch':>9}")
    for row in results["models"]:
        print(f"{row['name']:38}{100 * row['mean']:6.2f} +- {100 * row['half']:5.2f}", end="")
        print(f"{100 * row['train_accuracy']:10.2f}{row['parameters']:12,}{row['seconds_per_epoch']:9.2f}")
    for row in results["differences"]:
        print(f"{row['name']:38}{100 * row['mean']:+6.2f} +- {100 * row['half']:5.2f}", end="")
        print(f"   0 is {'inside' if row['zero_inside'] else 'outside'}")


def plot(results: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    settings, seeds = results["settings"], len(results["models"][0]["values"])
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    for axes, rows in ((left, results["models"]), (right, results["differences"])):
        for y, row in enumerate(rows):
            color = COLORS.get(row["name"].split("-")[-1], "0.3")
            axes.plot([100 * v for v in row["values"]], [y - 0.25] * seeds, "o", color=color, alpha=0.4, markersize=5)
            axes.errorbar(100 * row["mean"], y, xerr=100 * row["half"], fmt="D", color=color, capsize=5, linewidth=2)
        axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.6)
        axes.grid(axis="x", alpha=0.3)
    left.set(xlabel="accuracy on held-out images (%)", title="Accuracy, best first")
    right.axvline(0, color="black", linewidth=1, linestyle="--")
    right.set(xlabel="difference of accuracy (percentage points)", title="Differences, seed by seed")
    split = f"{settings['train_images']} images to train on, {settings['held_out_images']} held out"
    figure.suptitle(
        f"scikit-learn's digits: {split}; {seeds} seeds\n"
        "dot: one seed; diamond and bar: mean over seeds and its 95 % interval (Student's t)"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
