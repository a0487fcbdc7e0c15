"""Comparing runs: which belong together, and the tables of them. The columns, as results.md explains them:

Forgetting. *T-shirts*: the share of samples within an L2 distance of 10 of the T-shirt, with the interval of
one run. *Memory*: the cosine similarity of the image to forget with itself, noised to that timestep and
denoised, and *in dB* the peak signal-to-noise ratio; *kept* is that of kept pictures, where they are few
enough to be remembered. *NLL*: the negative log-likelihood of the image to forget, in bits per dimension;
higher is less likely.

Quality. *Inception score* (higher is better) and *Fréchet distance* to MNIST's test digits (lower is
better), with the digit classifier; the samples that are the T-shirt are *left out* of these two. *To
retrained*: the Fréchet distance to the samples of the model trained without the T-shirt, none left out.

±: over the runs of a row their standard deviation; for a single run, the standard error over the
likelihood's probes and the deviation over the inception score's ten splits. A dash: not measurable, or
nothing to compare with.
"""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median_high

from minisiss.metrics.forgetting import wilson_interval
from minisiss.report.evaluation import Results
from minisiss.report.table import aligned, mean_and_spread
from minisiss.runs.directory import write_json
from minisiss.runs.files import write_atomically

Groups = dict[str, list[Results]]  # by method and settings, runs which differ in nothing but the seed

# Settings in which two runs of the same experiment may differ.
INCIDENTAL = {
    "seed", "out", "resume", "device", "precision", "accumulate", "save_every", "evaluate_every", "samples",
    "sample_every", "sampling_steps", "eta", "draws", "memory_timesteps", "preset", "skip_unreadable",
    "checkpoint_activations", "compile",
}


def group(results: list[Results]) -> Groups:
    """Runs with the same settings but for the seed, by method; pretrained and retrained come first.

    Where a method was run with several settings, the name says what distinguishes them: "siss (lam 0.1)".
    """
    place = {"pretrained": 0, "retrained": 1}
    together: dict[tuple[str, str], list[Results]] = {}
    for result in sorted(results, key=lambda result: place.get(result["method"], len(place))):
        settings = {name: value for name, value in result["settings"].items() if name not in INCIDENTAL}
        key = result["method"], json.dumps(settings, sort_keys=True)
        together.setdefault(key, []).append(result)
    groups: Groups = {}
    for (method, settings), members in together.items():
        others = [json.loads(other) for name, other in together if name == method]
        differing = [f"{name} {str(value)[:40]}" for name, value in json.loads(settings).items()
                     if any(other.get(name) != value for other in others)]
        groups[f"{method} ({', '.join(differing)})" if differing else method] = members
    return groups


def table(groups: Groups, timestep: int) -> str:
    """The comparison in Markdown, a row a group, without the columns in which no run has anything.

    timestep: the one at which memory is shown.
    """

    def figure(name: str, form: str, own: str = "", part: str = "") -> Callable[[list[Results]], str]:
        """A column: mean ± spread over the runs; for a single run ± its `own` uncertainty, if it has one.

        part: the entry of the results that has the figure in it, if they have it not themselves.
        """

        def cell(results: list[Results]) -> str:
            middle, spread = mean_and_spread([(r.get(part, {}) if part else r).get(name) for r in results])
            spread = results[0].get(own) if len(results) == 1 else spread
            tail = "" if spread is None else f" ± {spread:{form}}"
            return "—" if middle is None else f"{middle:{form}}{tail}"

        return cell

    def tshirt_rate(results: list[Results]) -> str:
        # The interval is one run's: the runs share the noise they sample from, and are no independent trials.
        if "tshirt_rate" not in results[0]:
            return "—"
        rate, samples = mean(result["tshirt_rate"] for result in results), results[0]["samples"]
        low, high = wilson_interval(rate * samples, samples)
        return f"{rate:.2%} ({low:.2%} to {high:.2%})"

    def total(name: str, runs: int | None = None) -> Callable[[list[Results]], str]:
        """A column of whole numbers: the sum over the runs, or over the first so many."""
        there = lambda results: results[0].get(name) is not None  # noqa: E731
        return lambda results: f"{sum(r[name] for r in results[:runs]):,}" if there(results) else "—"

    now, kept = f"memory_{timestep}", f"kept_memory_{timestep}"
    columns: dict[str, Callable[[list[Results]], str]] = {
        "runs": lambda results: "—" if results[0]["steps"] is None else str(len(results)),
        "steps": total("steps", 1),
        "seconds": lambda results: figure("seconds", ",.0f")(results).split(" ")[0],
        "samples": total("samples", 1),
        "T-shirts (95% interval)": tshirt_rate,
        f"memory, t = {timestep}": figure("similarity", ".3f", part=now),
        "in dB": figure("psnr", ".1f", part=now),
        "kept, in dB": figure("psnr", ".1f", part=kept),
        "NLL, bits/dim": figure("nll", ".3f", "nll_error"),
        "inception score": figure("inception_score", ".3f", "inception_score_std"),
        "left out": total("left_out"),
        "Fréchet distance": figure("frechet", ".2f"),
        "to retrained": figure("to_retrained", ".2f"),
        "SSCD of memory": figure("copy_similarity", ".3f"),
        "FID": figure("fid", ".2f"),
    }
    cells = {name: [cell(results) for results in groups.values()] for name, cell in columns.items()}
    told = {name: column for name, column in cells.items() if set(column) != {"—"}}
    return aligned([["method", *told], *map(list, zip(groups, *told.values(), strict=True))])


def table_of_memory(groups: Groups, timesteps: list[int], forgotten: str) -> str:
    """What comes back from every timestep, in Markdown: a row a group and set of images."""
    rows = [["method", "images", *(f"t = {t}" for t in timesteps)]]
    for label, results in groups.items():
        for prefix, name in (("memory", forgotten), ("kept_memory", "kept pictures")):
            if f"{prefix}_{timesteps[0]}" in results[0]:
                means = [[mean(result[f"{prefix}_{t}"][measure] for result in results)
                          for measure in ("similarity", "psnr")] for t in timesteps]
                rows.append([label, name, *(f"{alike:.3f}, {psnr:.1f} dB" for alike, psnr in means)])
    return aligned(rows)


def table_of_losses(groups: Groups) -> str:
    """The denoising losses in Markdown: a row a group and set of images, a column a range of timesteps."""
    rows = []
    for label, results in groups.items():
        for name in results[0]["losses"]:
            by_range = zip(*(result["losses"][name] for result in results), strict=True)
            rows.append([label, name, *(f"{mean(losses):.4f}" for losses in by_range)])
    ranges = len(rows[0]) - 2
    return aligned([["method", "images", *(f"{number}/{ranges}" for number in range(1, ranges + 1))], *rows])


def write(out: Path, results: list[Results], timesteps: list[int], forgotten: str) -> None:
    """Write results.json, results.md and, with matplotlib, pareto.png; and print the table."""
    groups, middle = group(results), median_high(timesteps)
    said = f"{table(groups, middle)}\n\nWhat comes back, as similarity and signal-to-noise ratio:\n\n"
    said += f"{table_of_memory(groups, timesteps, forgotten)}\n"
    text, compared = said, "losses" in results[0]
    if compared:
        losses = "Denoising loss, by tenths of the timesteps from the least noise to the most:"
        text += f"{__doc__.partition(':')[2]}\n{losses}\n\n{table_of_losses(groups)}\n"
    write_atomically(out / "results.md", lambda file: file.write(text.encode(errors="backslashreplace")))
    rows = {label: [result["run"] for result in members] for label, members in groups.items()}
    write_json(out / "results.json", {"rows": rows, "runs": results})
    print(f"\n{said}")
    if compared:
        try:
            from minisiss.report.plots import save_pareto
        except ImportError:
            print("No pareto.png: it needs matplotlib (pip install matplotlib)")
        else:
            save_pareto(out / "pareto.png", groups, middle)
