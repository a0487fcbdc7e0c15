"""Comparing runs: which belong together, and the table of them."""

import json
import statistics
from collections.abc import Callable

from minisiss.metrics.forgetting import wilson_interval
from minisiss.metrics.quality import Moments, frechet_distance
from minisiss.report.evaluation import Results

Groups = dict[str, list[Results]]  # the runs of each method (and its settings), which differ in nothing but the seed

# Settings in which two runs of the same experiment may differ.
INCIDENTAL = {
    "seed", "out", "resume", "device", "precision", "accumulate", "save_every", "evaluate_every", "sample_every",
    "samples", "sampling_steps", "eta", "draws", "memory_timesteps", "preset", "skip_unreadable", "checkpoint_activations", "compile",
}  # fmt: skip


def group(results: list[Results]) -> Groups:
    """Runs with the same settings but for the seed, under the name of their method; pretrained and retrained come first.

    Where a method was run with several settings, the name says what distinguishes them: "siss (lam 0.1)".
    """
    first = ["pretrained", "retrained"]
    results = sorted(results, key=lambda result: first.index(result["method"]) if result["method"] in first else len(first))
    together: dict[tuple[str, str], list[Results]] = {}
    for result in results:
        settings = {name: value for name, value in sorted(result["settings"].items()) if name not in INCIDENTAL}
        together.setdefault((result["method"], json.dumps(settings)), []).append(result)
    groups: Groups = {}
    for method, settings in together:
        alike = [json.loads(other) for name, other in together if name == method]
        differing = [f"{name} {value}" for name, value in json.loads(settings).items() if any(other.get(name) != value for other in alike)]
        groups[f"{method} ({', '.join(differing)})" if differing else method] = together[method, settings]
    return groups


def add_distances(results: list[Results], features: list[Moments]) -> None:
    """Add to each run's results the Fréchet distance of its samples to those of the retrained model, as "to_retrained".

    features: the moments of each run's samples, T-shirts included. With several retrained models it is the mean distance
    to them, for one of them to the others; None where there is no (other) retrained model.
    """
    retrained = [place for place, result in enumerate(results) if result["method"] == "retrained"]
    for place, result in enumerate(results):
        distances = [frechet_distance(features[place], features[other]) for other in retrained if other != place]
        result["to_retrained"] = statistics.mean(distances) if distances else None


def mean_and_spread(values: list[float | None]) -> tuple[float | None, float | None]:
    """Mean and standard deviation (divisor n − 1) over runs; None where a run has no value, or for the deviation of one."""
    if None in values:
        return None, None
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def table(groups: Groups, timestep: int) -> str:
    """The comparison in Markdown, a row a group, with the columns aligned so that it reads as plain text too.

    timestep: the one at which memory is shown. A column in which no run has anything is left out.
    """

    def figure(results: list[Results], name: str, form: str, own: str = "") -> str:
        """Mean ± spread over the runs; for a single run ± its `own` uncertainty, if it has one."""
        mean, spread = mean_and_spread([result.get(name) for result in results])
        spread = results[0].get(own) if len(results) == 1 else spread
        return "—" if mean is None else f"{mean:{form}}" + (f" ± {spread:{form}}" if spread is not None else "")

    def tshirt_rate(results: list[Results]) -> str:
        # The interval is that of a single run: the runs share the noise that they sample from, and are no independent trials.
        if "tshirt_rate" not in results[0]:
            return "—"
        rate = statistics.mean(result["tshirt_rate"] for result in results)
        low, high = wilson_interval(rate * results[0]["samples"], results[0]["samples"])
        return f"{rate:.2%} ({low:.2%} to {high:.2%})"

    columns: dict[str, Callable[[list[Results]], str]] = {
        "runs": lambda results: str(len(results)),
        "steps": lambda results: f"{results[0]['steps']:,}",
        "seconds": lambda results: f"{statistics.mean(result['seconds'] for result in results):,.0f}",
        "T-shirts (95% interval)": tshirt_rate,
        f"memory, t = {timestep}": lambda results: figure([result[f"memory_{timestep}"] for result in results], "similarity", ".3f"),
        "in dB": lambda results: figure([result[f"memory_{timestep}"] for result in results], "psnr", ".1f"),
        "kept, in dB": lambda results: figure([result.get(f"kept_memory_{timestep}", {}) for result in results], "psnr", ".1f"),
        "NLL, bits/dim": lambda results: figure(results, "nll", ".3f", "nll_error"),
        "inception score": lambda results: figure(results, "inception_score", ".3f", "inception_score_std"),
        "left out": lambda results: str(sum(result["left_out"] for result in results)) if "left_out" in results[0] else "—",
        "Fréchet distance": lambda results: figure(results, "frechet", ".2f"),
        "to retrained": lambda results: figure(results, "to_retrained", ".2f"),
        "SSCD of memory": lambda results: figure(results, "copy_similarity", ".3f"),
        "FID": lambda results: figure(results, "fid", ".2f"),
    }
    cells = {name: [cell(results) for results in groups.values()] for name, cell in columns.items()}
    told = {name: column for name, column in cells.items() if set(column) != {"—"}}
    return aligned([["method", *told], *([label, *row] for label, row in zip(groups, zip(*told.values(), strict=True), strict=True))])


def table_of_losses(groups: Groups) -> str:
    """The denoising losses in Markdown: a row a group and set of images, a column a range of timesteps."""
    rows = []
    for label, results in groups.items():
        for name in results[0]["losses"]:
            means = [statistics.mean(values) for values in zip(*(result["losses"][name] for result in results), strict=True)]
            rows.append([label, name, *(f"{mean:.4f}" for mean in means)])
    return aligned([["method", "images", *(f"{number}/{len(means)}" for number in range(1, len(means) + 1))]] + rows)


def aligned(rows: list[list[str]]) -> str:
    """A Markdown table of a heading and rows, the first column flush left and the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[cell.ljust(width) if place == 0 else cell.rjust(width) for place, (cell, width) in enumerate(zip(row, widths, strict=True))] for row in rows]
    rule = ["-" * width if place == 0 else "-" * (width - 1) + ":" for place, width in enumerate(widths)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


EXPLANATION = """\
Forgetting. *T-shirts*: the share of samples within an L2 distance of 10 of the T-shirt, with the interval of one run. *Memory*: the
cosine similarity of the image to forget with itself, noised to that timestep and denoised, and *in dB* the peak signal-to-noise ratio;
*kept* is that of kept pictures, where they are few enough to be remembered. *NLL*: the negative log-likelihood of the image to forget,
in bits per dimension; higher is less likely.

Quality. *Inception score* (higher is better) and *Fréchet distance* to MNIST's test digits (lower is better), with the digit classifier;
the samples that are the T-shirt are *left out* of these two. *To retrained*: the Fréchet distance to the samples of the model trained
without the T-shirt, none left out.

±: over the runs of a row their standard deviation; for a single run, the standard error over the likelihood's probes and the deviation
over the inception score's ten splits. A dash: not measurable, or nothing to compare with.
"""
