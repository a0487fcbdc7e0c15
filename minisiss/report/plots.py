"""The picture of the trade-off. Imports matplotlib, an optional extra: import this only where it is
wanted."""

from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws into files, where there is no screen too

import matplotlib.pyplot as plt  # noqa: E402

from minisiss.report.comparison import Groups, mean_and_spread  # noqa: E402
from minisiss.runs.directory import read_metrics  # noqa: E402

MARKERS = {"pretrained": "*", "retrained": "D"}


def trajectory(directory: str | Path) -> list[dict[str, Any]]:
    """What unlearn.py logged of memory and of the loss on kept digits, step by step; empty for other runs."""
    return [record for record in read_metrics(Path(directory)) if {"memory", "loss_on_kept"} <= record.keys()]


def save_pareto(path: Path, groups: Groups, timestep: int) -> None:
    """Forgetting to the left, quality below: where each method ends, and the way that each run took.

    Left: the Fréchet distance to real digits, or of other pictures the denoising loss on kept ones, over the
    memory at `timestep`, a point a group with its spread over runs, in pale the single runs. Right: the
    denoising loss on kept digits over memory, from the first step to the last.
    """
    digits = any("frechet" in result for results in groups.values() for result in results)
    figure, (end, way) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for number, (label, results) in enumerate(groups.items()):
        colour, marker = f"C{number % 10}", MARKERS.get(results[0]["method"], "o")
        x, y = [result[f"memory_{timestep}"]["similarity"] for result in results], [result["frechet"] if digits else mean(result["losses"]["kept"]) for result in results]
        (x_mean, x_spread), (y_mean, y_spread) = mean_and_spread(x), mean_and_spread(y)
        if y_mean is None:
            continue
        size = 14 if marker == "*" else 8
        end.errorbar(x_mean, y_mean, y_spread, x_spread, color=colour, marker=marker, markersize=size, linestyle="none", label=label, capsize=2)
        end.plot(x, y, color=colour, marker=".", linestyle="none", alpha=0.4)
        if label == "retrained":
            end.axvline(x_mean, color=colour, linewidth=0.8, linestyle="--", zorder=0)
            end.axhline(y_mean, color=colour, linewidth=0.8, linestyle="--", zorder=0)
        for result in results:
            if records := trajectory(result["run"]):
                memory, loss = ([record[name] for record in records] for name in ("memory", "loss_on_kept"))
                way.plot(memory, loss, color=colour, marker=".", alpha=0.7)
                way.plot(memory[-1:], loss[-1:], color=colour, marker=marker, markersize=8)
    quality = "Fréchet distance to real digits" if digits else "denoising loss on kept pictures"
    end.set(xlabel=f"memory of the image to forget at t = {timestep}", ylabel=quality, yscale="log", title="Where the runs end")
    way.set(xlabel="memory of the image to forget", ylabel="denoising loss on kept images", title="The way there, step by step")
    end.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
