"""Comparing runs: which belong together, and the tables of them."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path

from minisiss.metrics.forgetting import wilson_interval
from minisiss.report.evaluation import Results
from minisiss.report.table import aligned
from minisiss.runs.directory import write_json
from minisiss.runs.files import write_atomically

Groups = dict[str, list[Results]]  # the runs of each method (and its settings), which differ in nothing but the seed

# Settings in which two runs of the same experiment may differ.
INCIDENTAL = {
    "seed", "out", "resume", "device", "precision", "accumulate", "save_every", "evaluate_every", "sample_every",
    "samples", "sampling_steps", "eta", "draws", "memory_timesteps", "preset", "skip_unreadable",
    "checkpoint_activations", "compile",
}  # fmt: skip


def group(results: list[Results]) -> Groups:
    """Runs with the same settings but for the seed, under the name of their method; pretrained and retrained
    come first.

    Where a method was run with several settings, the name says what distinguishes them: "siss (lam 0.1)".
    """
    first = ["pretrained", "retrained"]
    place = {name: number for number, name in enumerate(first)}
    results = sorted(results, key=lambda result: place.get(result["method"], len(first)))
    together: dict[tuple[str, str], list[Results]] = {}
    for result in results:
        settings = {name: value for name, value in sorted(result["settings"].items()) if name not in INCIDENTAL}
        together.setdefault((result["method"], json.dumps(settings)), []).append(result)
    groups: Groups = {}
    for method, settings in together:
        alike = [json.loads(other) for name, other in together if name == method]
        own = json.loads(settings).items()
        differing = [f"{name} {value}" for name, value in own if any(other.get(name) != value for other in alike)]
        groups[f"{method} ({', '.join(differing)})" if differing else method] = together[method, settings]
    return groups


def mean_and_spread(values: list[float | None]) -> tuple[float | None, float | None]:
    """Mean and standard deviation (divisor n − 1) over runs; None where a run has no value, or for the
    deviation of one."""
    if None in values:
        return None, None
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def table(groups: Groups, timestep: int) -> str:
    """The comparison in Markdown, a row a group. timestep: the one at which memory is shown.

    A column in which no run has anything is left out.
    """

    def figure(results: list[Results], name: str, form: str, own: str = "") -> str:
        """Mean ± spread over the runs; for a single run ± its `own` uncertainty, if it has one."""
        middle, spread = mean_and_spread([result.get(name) for result in results])
        spread = results[0].get(own) if len(results) == 1 else spread
        return "—" if middle is None else f"{middle:{form}}" + (f" ± {spread:{form}}" if spread is not None else "")

    def tshirt_rate(results: list[Results]) -> str:
        # The interval is one run's: the runs share the noise they sample from, and are no independent trials.
        if "tshirt_rate" not in results[0]:
            return "—"
        rate = statistics.mean(result["tshirt_rate"] for result in results)
        low, high = wilson_interval(rate * results[0]["samples"], results[0]["samples"])
        return f"{rate:.2%} ({low:.2%} to {high:.2%})"

    def of_memory(results: list[Results], name: str, measure: str, form: str) -> str:
        return figure([result.get(f"{name}_{timestep}", {}) for result in results], measure, form)

    def count(results: list[Results], name: str) -> str:
        return "—" if results[0].get(name) is None else f"{sum(result[name] for result in results):,}"

    columns: dict[str, Callable[[list[Results]], str]] = {
        "runs": lambda results: str(len(results)) if results[0]["steps"] is not None else "—",
        "steps": lambda results: count(results[:1], "steps"),
        "seconds": lambda results: figure([{"s": result["seconds"]} for result in results], "s", ",.0f").split(" ")[0],
        "samples": lambda results: count(results[:1], "samples"),
        "T-shirts (95% interval)": tshirt_rate,
        f"memory, t = {timestep}": lambda results: of_memory(results, "memory", "similarity", ".3f"),
        "in dB": lambda results: of_memory(results, "memory", "psnr", ".1f"),
        "kept, in dB": lambda results: of_memory(results, "kept_memory", "psnr", ".1f"),
        "NLL, bits/dim": lambda results: figure(results, "nll", ".3f", "nll_error"),
        "inception score": lambda results: figure(results, "inception_score", ".3f", "inception_score_std"),
        "left out": lambda results: count(results, "left_out"),
        "Fréchet distance": lambda results: figure(results, "frechet", ".2f"),
        "to retrained": lambda results: figure(results, "to_retrained", ".2f"),
        "SSCD of memory": lambda results: figure(results, "copy_similarity", ".3f"),
        "FID": lambda results: figure(results, "fid", ".2f"),
    }
    cells = {name: [cell(results) for results in groups.values()] for name, cell in columns.items()}
    told = {name: column for name, column in cells.items() if set(column) != {"—"}}
    rows = zip(groups, zip(*told.values(), strict=True), strict=True)
    return aligned([["method", *told], *([label, *row] for label, row in rows)])


def table_of_memory(groups: Groups, timesteps: list[int], forgotten: str) -> str:
    """What comes back from every timestep, in Markdown: a row a group and set of images."""
    rows = []
    for label, results in groups.items():
        for prefix, name in (("memory", forgotten), ("kept_memory", "kept pictures")):
            if f"{prefix}_{timesteps[0]}" in results[0]:
                by_time = ([result[f"{prefix}_{t}"] for result in results] for t in timesteps)
                means = [[statistics.mean(one[m] for one in at) for m in ("similarity", "psnr")] for at in by_time]
                rows.append([label, name, *(f"{alike:.3f}, {psnr:.1f} dB" for alike, psnr in means)])
    return aligned([["method", "images", *(f"t = {t}" for t in timesteps)], *rows])


def table_of_losses(groups: Groups) -> str:
    """The denoising losses in Markdown: a row a group and set of images, a column a range of timesteps."""
    rows = []
    for label, results in groups.items():
        for name in results[0]["losses"]:
            means = [statistics.mean(values) for values in zip(*(result["losses"][name] for result in results), strict=True)]
            rows.append([label, name, *(f"{mean:.4f}" for mean in means)])
    return aligned([["method", "images", *(f"{number}/{len(means)}" for number in range(1, len(means) + 1))], *rows])


def write(out: Path, results: list[Results], timesteps: list[int], forgotten: str) -> None:
    """Write results.json, results.md and, with matplotlib, pareto.png; and print the table."""
    groups = group(results)
    middle = sorted(timesteps)[len(timesteps) // 2]
    memory = f"What comes back, as similarity and signal-to-noise ratio:\n\n{table_of_memory(groups, timesteps, forgotten)}\n"
    text = f"{table(groups, middle)}\n\n{memory}"
    print(f"\n{text}")
    if "losses" in results[0]:
        losses = "Denoising loss, by tenths of the timesteps from the least noise to the most:"
        text = f"{text}\n{EXPLANATION}\n{losses}\n\n{table_of_losses(groups)}\n"
    write_atomically(out / "results.md", lambda file: file.write(text.encode()))
    rows = {label: [result["run"] for result in members] for label, members in groups.items()}
    write_json(out / "results.json", {"rows": rows, "runs": results})
    if "losses" in results[0]:
        try:
            from minisiss.report.plots import save_pareto
        except ImportError:
            print("No pareto.png: it needs matplotlib (pip install matplotlib)")
        else:
            save_pareto(out / "pareto.png", groups, middle)


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
