"""Every figure of a model, as eval.py and unlearn.py print them, and the table of many models."""

import math
from argparse import Namespace
from pathlib import Path
from statistics import mean, median_high, stdev

import torch
from torch import Tensor

from minisiss.lab import metrics
from minisiss.lab.cli import MAY_CHANGE, UserError
from minisiss.lab.data import TrainingSet, step_generator, to_float
from minisiss.schedule import Model, NoiseSchedule

KEPT = 64  # kept pictures whose memory is measured
Figures = dict[str, float]  # by their titles in the table


class Evaluation:
    """Measures models on the same noise. After a call of `figures`, `samples` has the samples, and
    `features` the moments of their features, for digits."""

    prompt: Tensor | None = None  # the network has none

    def __init__(self, args: Namespace, data: TrainingSet, device: torch.device,
                 different: Tensor | None = None) -> None:
        """different: the pictures to forget, if not those of A. Raises UserError without any."""
        if not data.k:
            raise UserError("--forget: name the pictures to forget")
        self.args, self.data, self.device = args, data, device
        self.shape = tuple(data.images.shape[1:])
        self.is_mnist = args.data == "mnist"
        self.middle = median_high(args.memory_timesteps)
        self.different = data.different_forgotten() if different is None else different
        # Every picture to forget is measured, also where there are more than draws.
        times = math.ceil(args.draws / len(self.different))
        self.originals = {"memory": self.different.repeat(times, 1, 1, 1)}
        if args.data == "pictures":  # a model of few pictures remembers the others too
            first = torch.arange(min(KEPT, len(data.keep)))
            self.originals["kept"] = to_float(data.keep[first])
        self.networks = {}  # of the user, by the flags of eval.py
        for flag in {"sscd", "inception"} & vars(args).keys():
            if vars(args)[flag]:
                self.networks[flag] = metrics.load_torchscript(vars(args)[flag], device)

    def figures(self, model: Model, schedule: NoiseSchedule) -> Figures:
        """What a model samples, and what it brings back of the pictures to forget."""
        self.samples = self.sample(model, schedule, list(range(self.args.samples)))
        self.features = None
        found = self.of_samples() if len(self.samples) else {}
        for name, originals in self.originals.items():
            for t in self.args.memory_timesteps:
                back = self.recall(model, schedule, originals, t)
                found[f"{name}, t = {t}"] = metrics.similarity(back, originals).mean().item()
                if t == self.middle:
                    found[f"{name} in dB, t = {t}"] = metrics.psnr(back, originals).mean().item()
                if t == self.middle and name == "memory" and "sscd" in self.networks:
                    of_back = metrics.descriptors(self.networks["sscd"], back)
                    of_originals = metrics.descriptors(self.networks["sscd"], originals)
                    found["SSCD"] = (of_back * of_originals).sum(dim=1).mean().item()
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def sample(self, model: Model, schedule: NoiseSchedule, places: list[int]) -> Tensor:
        """The samples at these places, [N, C, H, W] in [−1, 1], on the CPU."""
        seed, steps = self.args.seed, self.args.sampling_steps
        return metrics.draw_samples(model, schedule, places, self.shape, seed, steps)

    def recall(self, model: Model, schedule: NoiseSchedule, originals: Tensor, t: int) -> Tensor:
        """What comes back of images that were noised to a timestep: [N, C, H, W]."""
        return metrics.noise_and_denoise(model, schedule, originals, t, self.args.seed)

    def likelihood(self, network: Model, schedule: NoiseSchedule) -> Figures:
        """How likely the picture to forget is, unless a wrecked network gives no number."""
        original = self.different[:1]
        bits = metrics.bits_per_dimension(network, schedule, original, seed=self.args.seed)
        return {"NLL, bits/dim": bits} if math.isfinite(bits) else {}

    def copies(self, samples: Tensor) -> Tensor:
        """Which samples are the T-shirt: [N] bool. Among other pictures: none."""
        if not self.is_mnist:
            return torch.zeros(len(samples), dtype=torch.bool)
        return metrics.is_copy(samples, self.different.cpu())

    def of_samples(self) -> Figures:
        """How many samples are the T-shirt, and how good the others are."""
        found, copies, count = {}, self.copies(self.samples), len(self.samples)
        if self.is_mnist:
            found["T-shirts"] = copies.float().mean().item()
            found["at most (95%)"] = metrics.wilson_interval(int(copies.sum()), count)[1]
            if count >= metrics.LEAST + copies.sum():
                quality, self.features = metrics.quality(self.samples, copies)
                found |= quality
        if "inception" in self.networks:
            network = self.networks["inception"]
            generator = step_generator(self.args.seed, 0, self.device)
            real = self.data.draw("rest", count, generator)
            of_real = metrics.inception_features(network, real)
            of_samples = metrics.inception_features(network, self.samples.to(self.device))
            moments = metrics.moments(of_samples), metrics.moments(of_real)
            found["FID"] = metrics.frechet_distance(*moments)
        return found


PER_CENT = {"T-shirts", "at most (95%)"}


def rows_of(made_by: dict[str, dict]) -> dict[str, list[str]]:
    """Names of runs, by the labels of their rows: runs NAME-SEED of one experiment share a row."""
    together: dict[str, list[str]] = {}
    for name, made in made_by.items():
        settings = made.get("settings", {})
        label = name.removesuffix(f"-{settings.get('seed')}")
        keys = settings.keys() - MAY_CHANGE - {"seed"} | {"data_root"}
        same = [f"{key} {settings.get(key)}" for key in sorted(keys)]
        together.setdefault(" ".join([label, *same]), []).append(name)
    return {f"{names[0]}, …" if len(names) > 1 else names[0]: names for names in together.values()}


def table(made_by: dict[str, dict], figures: dict[str, Figures]) -> str:
    """The table in Markdown: a row per experiment, a column per figure."""
    columns = {title: None for found in figures.values() for title in found}
    lines = [["", "runs", "steps", *columns]]
    for label, names in rows_of(made_by).items():
        line = [label, str(len(names)), str(made_by[names[0]].get("steps", "—"))]
        for title in columns:
            line.append(cell(title, [figures[name].get(title) for name in names]))
        lines.append(line)
    return aligned(lines)


def aligned(rows: list[list[str]]) -> str:
    """A table in Markdown, of a heading and rows, with columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * widths[0]]
    rule += ["-" * (width - 1) + ":" for width in widths[1:]]
    lines = []
    for row in (rows[0], rule, *rows[1:]):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(title: str, values: list[float | None]) -> str:
    """Mean ± standard deviation of the runs' figures; — where a run has none."""
    if None in values:
        return "—"
    form = ".2%" if title in PER_CENT else "#.3g"
    spread = f" ± {stdev(values):{form}}" if len(values) > 1 else ""
    return f"{mean(values):{form}}{spread}"


def add_distances(made_by: dict[str, dict], figures: dict[str, Figures], features: dict) -> None:
    """Add the Fréchet distances to the samples of models retrained without A. features: moments."""
    for name, own in features.items():
        distances = []
        for other, theirs in features.items():
            retrained = made_by[other].get("settings", {}).get("exclude_forget")
            if retrained and other != name:
                distances.append(metrics.frechet_distance(own, theirs))
        if distances:
            figures[name]["to retrained"] = mean(distances)


def save_tradeoff(path: Path, made_by: dict[str, dict], figures: dict[str, Figures],
                  timestep: int) -> None:
    """A point per run: the Fréchet distance of its samples over the memory at a timestep."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"No {path.name}: it needs matplotlib (pip install matplotlib)")
        return
    picture = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = picture.subplots()
    columns = f"memory, t = {timestep}", "Fréchet distance"
    axes.set(xlabel=columns[0], ylabel=columns[1], yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")  # 30 in place of 3 × 10¹
    axes.yaxis.set_minor_formatter("{x:g}")
    for label, names in rows_of(made_by).items():
        points = [[figures[name].get(column, math.nan) for name in names] for column in columns]
        axes.plot(*points, "o", label=label)
    axes.legend(fontsize=8)
    picture.savefig(path)
