"""The picture of the trade-off. Imports matplotlib, an optional extra: import it where it is wanted."""

from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")  # draws into files, where there is no screen too

import matplotlib.pyplot as plt
from matplotlib.ticker import LogFormatter

from minisiss.report.evaluation import Results
from minisiss.report.table import mean_and_spread
from minisiss.runs.directory import read_metrics

MARKERS = {"pretrained": "*", "retrained": "D"}


def save_pareto(path: Path, groups: dict[str, list[Results]], timestep: int) -> None:
    """Where each method ends, and the way that each run took.

    Left, a point a group with its spread, in pale the single runs: the Fréchet distance of its samples over
    the memory at `timestep`. With a retrained model among the runs, this is the aim, in the lower left: the
    distance to its samples over the distance of the memories from its own, a mean over timesteps. For other
    pictures than digits, the denoising loss on kept ones over the memory. Right: the denoising loss on kept
    images over memory, step by step, as unlearn.py logged them.
    """
    digits = any("frechet" in result for results in groups.values() for result in results)
    aim = memories(groups["retrained"]) if digits and "retrained" in groups else None
    figure, (end, way) = plt.subplots(1, 2, figsize=(11, 5.2), layout="constrained")
    for number, (label, results) in enumerate(groups.items()):
        marker = MARKERS.get(results[0]["method"], "o")
        look, size = {"color": f"C{number % 10}", "marker": marker}, 14 if marker == "*" else 8
        x = [result[f"memory_{timestep}"]["similarity"] for result in results]
        y = [result["frechet"] if digits else mean(result["losses"]["kept"]) for result in results]
        if aim:
            x = [mean(abs(memories([result])[t] - there) for t, there in aim.items()) for result in results]
            y = [result["to_retrained"] for result in results]
        (x_mean, x_spread), (y_mean, y_spread) = mean_and_spread(x), mean_and_spread(y)
        if y_mean is None:
            continue
        end.errorbar(x_mean, y_mean, y_spread, x_spread, **look, ms=size, ls="none", label=label, capsize=2)
        end.plot(x, y, color=look["color"], marker=".", ls="none", alpha=0.4)
        for result in results:
            logged = [r for r in read_metrics(Path(result["run"])) if {"memory", "loss_on_kept"} <= r.keys()]
            memory, loss = ([record[name] for record in logged] for name in ("memory", "loss_on_kept"))
            way.plot(memory, loss, color=look["color"], marker=".", alpha=0.7)
            way.plot(memory[-1:], loss[-1:], **look, markersize=8)
    memory = "memory of the image to forget"
    over, quality = f"{memory} at t = {timestep}", "Fréchet distance to real digits"
    if aim:
        over = "difference of the memories from the retrained model's, mean over t"
        quality = "Fréchet distance to samples of the retrained model"
    elif not digits:
        quality = "denoising loss on kept pictures"
    end.set(xlabel=over, ylabel=quality, yscale="log", title="Where the runs end")
    end.yaxis.set_major_formatter("{x:g}")
    end.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False))  # 2.5, and not 2.5 × 10⁰
    way.set(xlabel=memory, ylabel="denoising loss on kept images", title="The way there, step by step")
    figure.legend(*end.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def memories(results: list[Results]) -> dict[str, float]:
    """The similarity of what comes back, by timestep, as the mean over runs."""
    names = [name for name in results[0] if name.startswith("memory_")]
    return {name: mean(result[name]["similarity"] for result in results) for name in names}
