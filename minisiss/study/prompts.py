"""What prompts bring back, forgotten: the picture of each by every method, and all of them one after another.

    python -m minisiss.study.prompts                     45 prompts, the preset's settings: hours on two cores
    python -m minisiss.study.prompts --prompts 46 50     the tuning prompts, every setting of `TRIED`
    python -m minisiss.study.prompts --in-a-row          SISS on the 45 in one model

Started again it goes on: with other settings or another --seed, in another --out. `--prompts 1 22`
and `--prompts 23 45` are two parts, for two processes.
"""

import copy
import json
from argparse import Namespace
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn

from minisiss import unlearning
from minisiss.data.neighbours import nearest_kept
from minisiss.data.prompts import COUNTED, SIGNATURES, ordinary_prompts, padded
from minisiss.data.training_set import step_generator, to_float
from minisiss.errors import UserError
from minisiss.machine.command_line import Parser, filename, number, run, seed
from minisiss.machine.device import adamw, at_precision, pick_device
from minisiss.machine.ranks import ALONE
from minisiss.metrics.classifier import classify, load_classifier
from minisiss.metrics.forgetting import is_copy
from minisiss.metrics.quality import frechet_distance, moments
from minisiss.presets import PRESETS
from minisiss.report.prompted import COPY, SHOWN, Prompted, median_distance
from minisiss.report.table import aligned
from minisiss.runs.checkpoint import load_any
from minisiss.runs.files import write_atomically
from minisiss.sampling import guided, sample

SISS = [(2e-4, 0.5), (3e-4, 0.2), (3e-4, 0.3), (3e-4, 0.4), (3e-4, 0.5), (4e-4, 0.3)]
TRIED = {  # on the tuning prompts: learning rates, and ρ
    "siss": [dict(lr=lr, grad_ratio=rho) for lr, rho in SISS],
    "siss_no_is": [dict(lr=lr, grad_ratio=rho) for lr, rho in SISS],
    "naive_deletion": [dict(lr=lr) for lr in (3e-4, 5e-4, 7e-4)],
    "erasediff": [dict(lr=lr) for lr in (3e-5, 6e-5, 1e-4)],
    "neggrad": [dict(lr=lr) for lr in (1e-5, 2e-5, 3e-5)],
    "retrack": [dict(lr=lr) for lr in (3e-4, 5e-4, 7e-4)],
}
# On the counted ones: the preset's settings, and, as in the paper, without holding the other prompts.
MEASURED = {method: [{}] for method in TRIED}
MEASURED["siss"] = [{}, dict(hold=0.0, lr=3e-4, grad_ratio=0.2)]
MEASURED["naive_deletion"] = [{}, dict(hold=0.0, lr=3e-4)]
PAPER = {"siss": "87 / 71", "siss_no_is": "87 / 69", "naive_deletion": "56 / 34", "erasediff": "49 / 24"}
KINDS = "modified", "original"
# Mitigated: no copy among 16 at the end, and halfway and then at least this share shows the digit named.
NAMED = 0.75
ORDINARY, MANY = 50, 1000  # prompts that are looked at after a picture, and where quality is measured
AFTER = 1, 5, 15, COUNTED  # pictures in a row, when quality is measured
Record = dict[str, Any]


def settings_of(method: str, seed: int, **changed: Any) -> Namespace:
    """What `unlearn.py --preset prompts` has in its flags, as far as it is used here."""
    fixed = dict(method=method, seed=seed, eta=0.0, fixed_prompt="modified", hold=0.0, forget=[])
    preset = PRESETS["prompts"]
    return Namespace(**fixed | preset["unlearn"] | preset.get(f"unlearn {method}", {}) | changed)


def forget(report: Prompted, network: nn.Module, how: Namespace) -> Iterator[nn.Module]:
    """The network halfway through a method's steps, which are those of unlearn.py, and at their end."""
    method, data, device = unlearning.METHODS[how.method], report.data, report.data.images.device
    numbers = {name: value for name, value in vars(how).items() if name in method.reads}
    settings = unlearning.Settings(**numbers)
    near = nearest_kept(data, settings.neighbours) if method.neighbours else None
    model = copy.deepcopy(network).requires_grad_(True)
    optimizer, here = adamw(model, how.lr), at_precision(model, device, "fp32")
    predict, report.args.hold = guided(here, report.prompt), how.hold
    for step in range(1, how.steps + 1):
        generator = step_generator(how.seed, step - 1, device)
        batch = unlearning.draw_batch(data, how.batch_size, report.schedule, generator, neighbours=near)
        terms = method.terms(predict, batch, report.schedule, settings)
        unlearning.step(method, terms, optimizer, settings, also=report.hold(here, generator))
        if step in (how.steps // 2, how.steps):
            yield model


class Study:
    """The model that has memorised pictures, and what it and those made from it draw."""

    def __init__(self, args: Namespace) -> None:
        self.base = load_any("bundled-prompts", [0], pick_device(args.device))
        self.network, self.prompts = self.base.model.requires_grad_(False), list(self.base.memorised)
        self.classifier, self.real = load_classifier()
        self.ordinary, self.seed = ordinary_prompts(MANY, seed=0), args.seed

    def at(self, network: nn.Module) -> Any:
        return at_precision(network, self.base.schedule.gamma.device, "fp32")  # devices agree, nearly

    def report(self, prompt: str, network: nn.Module) -> Prompted:
        """What the network draws at a modified prompt, in two clusters. Raises UserError as `Prompted`."""
        return Prompted(settings_of("siss", self.seed, prompt=prompt), self.base, self.at(network), ALONE)

    def draw(self, network: nn.Module, prompts: list[str]) -> Tensor:
        """A sample of each prompt, without guidance; the noise is the same for all networks."""
        schedule, drawn, batch = self.base.schedule, [], 50
        device = schedule.gamma.device
        for first in range(0, len(prompts), batch):
            part = padded(prompts[first : first + batch]).to(device)
            model = guided(self.at(network), part)
            shape, generator = (len(part), *network.config.image_shape), step_generator(0, first, device)
            drawn.append(sample(model, schedule, shape, generator=generator, steps=10, eta=0.0, order=2))
        return torch.cat(drawn).cpu()

    def remembered(self, network: nn.Module) -> Tensor:
        """Which of the memorised prompts bring back their picture: [50] bool."""
        pictures = to_float(torch.stack([*self.base.memorised.values()]))
        return is_copy(self.draw(network, self.prompts), pictures, COPY)

    def shown(self, network: nn.Module, count: int) -> tuple[Tensor, Tensor]:
        """What ordinary prompts draw: features [count, 128], and the digit that each shows [count]."""
        features, probabilities = classify(self.classifier, self.draw(network, self.ordinary[:count]))
        return features, probabilities.argmax(dim=1)

    def each(self, prompt: str, jobs: list[tuple[str, Record]]) -> Iterator[Record]:
        """A record of each job, a method and what is changed in its settings: one picture is forgotten."""
        try:
            report = self.report(prompt, self.network)
        except UserError as error:  # there is no modified prompt: nothing is done
            for method, changed in jobs:
                record = {"prompt": prompt, "method": method, "changed": changed, "failed": str(error)}
                as_before = {"copies": dict.fromkeys(KINDS, SHOWN), "named": {kind: [1.0] for kind in KINDS}}
                yield record | as_before | {"lost": 0, "moved": 0.0}
            return
        others, (_, digits) = self.remembered(self.network), self.shown(self.network, ORDINARY)
        for method, changed in jobs:
            record = {"prompt": prompt, "modified": report.modified, "method": method, "changed": changed}
            named: dict[str, list[float]] = {kind: [] for kind in KINDS}  # halfway, and at the end
            try:
                for model in forget(report, self.network, settings_of(method, self.seed, **changed)):
                    report.network = self.at(model)
                    drawn = {kind: report.sample(report.prompts[kind], kind) for kind in KINDS}
                    for kind, samples in drawn.items():
                        named[kind].append(report.named(samples, *report.prompts[kind]))
                lost = others & ~self.remembered(model)
                lost[report.which] = False
                moved = self.shown(model, ORDINARY)[1] != digits
                copies = {kind: round(SHOWN * report.share(samples)) for kind, samples in drawn.items()}
                apart = {kind: median_distance(samples) for kind, samples in drawn.items()}
                record |= {"copies": copies, "named": named, "apart": apart}
                record |= {"lost": lost.sum().item(), "moved": moved.float().mean().item()}
            except FloatingPointError as error:  # a network gone to pieces
                record |= {"copies": dict.fromkeys(KINDS, 0), "named": {kind: [0.0] for kind in KINDS}}
                record |= {"lost": int(others.sum()) - 1, "moved": 1.0, "failed": str(error)}
            yield record

    def in_a_row(self, out: Path) -> Iterator[Record]:
        """SISS on the counted prompts in one model: a record of each, and now and then of the quality."""
        state = {"weights": self.network.state_dict(), "done": 0}
        if out.exists():
            state = torch.load(out, map_location="cpu", weights_only=True)
        model = copy.deepcopy(self.network)
        model.load_state_dict(state["weights"])
        if not state["done"]:
            yield self.quality(model, 0)
        for place, prompt in enumerate(self.prompts[:COUNTED]):
            if place < state["done"]:
                continue
            record = {"prompt": prompt, "forgotten": True}
            try:
                *_, model = forget(self.report(prompt, model), model, settings_of("siss", self.seed))
                model.requires_grad_(False)
            except (UserError, FloatingPointError) as error:
                record |= {"forgotten": False, "why": str(error)}
            yield record
            if place + 1 in AFTER:
                yield self.quality(model, place + 1)
            state = {"weights": model.state_dict(), "done": place + 1}
            write_atomically(out, lambda file, state=state: torch.save(state, file))

    def quality(self, network: nn.Module, count: int) -> Record:
        """What is remembered after `count` prompts in a row, and what ordinary prompts draw."""
        remembered = self.remembered(network)
        features, digits = self.shown(network, MANY)
        named = (digits == torch.arange(MANY) % 10).float().mean().item()
        left, kept = remembered[:count].sum().item(), remembered[count:].sum().item()
        frechet = frechet_distance(moments(features), self.real)
        return {"after": count, "left": left, "kept": kept, "named": named, "frechet": frechet}


def read(path: Path) -> list[Record]:
    """The records of a file, one a line, but for those that were cut off."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(ValueError):
            records.append(json.loads(line))
    return records


def mitigated(record: Record, kind: str) -> bool:
    return record["copies"][kind] == 0 and min(record["named"][kind]) >= NAMED


def name_of(record: Record) -> str:
    """The method, and what is changed in its settings."""
    return ", ".join([record["method"], *(f"{name} {value:g}" for name, value in record["changed"].items())])


def table(records: list[Record]) -> str:
    """A row of each method and setting."""
    rows = [["", "prompts", *(f"mitigated: {kind}" for kind in KINDS), "the paper", "digit named",
             "original: apart", "other pictures lost", "ordinary prompts moved"]]
    for name in dict.fromkeys(name_of(one) for one in records):
        of = [one for one in records if name_of(one) == name]
        shares = [f"{mean(mitigated(one, kind) for one in of):.0%}" for kind in KINDS]
        done = [one for one in of if "modified" in one] or of  # those that have a modified prompt
        named = mean(min(one["named"][kind]) for one in done for kind in KINDS)
        moved = mean(one["moved"] for one in done)
        lost = f"{mean(one['lost'] for one in done):.1f} of {len(SIGNATURES) - 1}"
        paper = PAPER.get(of[0]["method"], "")
        distances = [one["apart"]["original"] for one in done if "apart" in one]
        apart = f"{median(distances):.1f}" if distances else ""  # no network is left, or no modified prompt
        rows.append([name, str(len(of)), *shares, paper, f"{named:.0%}", apart, lost, f"{moved:.0%}"])
    return aligned(rows)


def main() -> None:
    parser, place = Parser(__doc__), number(int, 1, len(SIGNATURES))
    parser.add_argument("--out", type=filename, default="runs/study-prompts", help="directory of the records")
    parser.add_argument("--prompts", type=place, nargs=2, default=[1, COUNTED], metavar=("FIRST", "LAST"))
    parser.add_argument("--methods", nargs="+", choices=TRIED, default=[*TRIED])
    parser.add_argument("--in-a-row", action="store_true", help="SISS on the 45 in one model")
    parser.add_argument("--seed", type=seed, default=0, help="of what both prompts draw, and of the steps")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, …")
    args = parser.parse_args()
    (first, last), out = args.prompts, Path(args.out)
    if last < first or first <= COUNTED < last:
        wanted = f"should be a first and a last of 1 to {COUNTED}, or of those after"
        raise UserError(f"--prompts {first} {last}: {wanted}")
    study = Study(args)
    out.mkdir(parents=True, exist_ok=True)
    tuning = first > COUNTED
    path = out / ("in_a_row.jsonl" if args.in_a_row else "tuning.jsonl" if tuning else "each.jsonl")

    def write(records: Iterator[Record]) -> None:
        for record in records:
            with path.open("a") as file:
                file.write("\n" + json.dumps(record))  # on a line of its own, also after one cut off

    if args.in_a_row:
        write(study.in_a_row(out / "in_a_row.pt"))
        measured = {one["after"]: one for one in read(path) if "after" in one}  # each once
        rows = ([f"{value:.3g}" for value in one.values()] for one in measured.values())
        print(aligned([[*measured[0]], *rows]))
        return
    tried = TRIED if tuning else MEASURED
    for prompt in study.prompts[first - 1 : last]:
        done = [(one["method"], one["changed"]) for one in read(path) if one["prompt"] == prompt]
        jobs = [(method, changed) for method in args.methods for changed in tried[method]]
        if jobs := [job for job in jobs if job not in done]:
            write(study.each(prompt, jobs))
    print(table(read(path)))


if __name__ == "__main__":
    run(main)
