"""The picture of the trade-off. Imports matplotlib, an optional extra: import it where it is wanted."""

from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")  # draws into files, where there is no screen too

import matplotlib.pyplot as plt

from minisiss.report.evaluation import Results
from minisiss.report.table import mean_and_spread
from minisiss.runs.directory import read_metrics

MARKERS = {"pretrained": "*", "retrained": "D"}


def save_pareto(path: Path, groups: dict[str, list[Results]], timestep: int) -> None:
    """Forgetting to the left, quality below: where each method ends, and the way that each run took.

    Left: the Fréchet distance to real digits, or of other pictures the denoising loss on kept ones, over the
    memory at `timestep`: a point a group with its spread, in pale the single runs. Right: the denoising loss
    on kept images over memory, step by step, as unlearn.py logged them.
    """
    digits = any("frechet" in result for results in groups.values() for result in results)
    figure, (end, way) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for number, (label, results) in enumerate(groups.items()):
        marker = MARKERS.get(results[0]["method"], "o")
        look, size = {"color": f"C{number % 10}", "marker": marker}, 14 if marker == "*" else 8
        x = [result[f"memory_{timestep}"]["similarity"] for result in results]
        y = [result["frechet"] if digits else mean(result["losses"]["kept"]) for result in results]
        (x_mean, x_spread), (y_mean, y_spread) = mean_and_spread(x), mean_and_spread(y)
        if y_mean is None:
            continue
        end.errorbar(x_mean, y_mean, y_spread, x_spread, **look, ms=size, ls="none", label=label, capsize=2)
        end.plot(x, y, color=look["color"], marker=".", ls="none", alpha=0.4)
        if label == "retrained":
            for line, place in ((end.axvline, x_mean), (end.axhline, y_mean)):
                line(place, color=look["color"], linewidth=0.8, ls="--", zorder=0)
        for result in results:
            logged = [r for r in read_metrics(Path(result["run"])) if {"memory", "loss_on_kept"} <= r.keys()]
            memory, loss = ([record[name] for record in logged] for name in ("memory", "loss_on_kept"))
            way.plot(memory, loss, color=look["color"], marker=".", alpha=0.7)
            way.plot(memory[-1:], loss[-1:], **look, markersize=8)
    quality = "Fréchet distance to real digits" if digits else "denoising loss on kept pictures"
    memory = "memory of the image to forget"
    end.set(xlabel=f"{memory} at t = {timestep}", ylabel=quality, yscale="log", title="Where the runs end")
    way.set(xlabel=memory, ylabel="denoising loss on kept images", title="The way there, step by step")
    end.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
