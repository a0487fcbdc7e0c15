"""Measure how much was forgotten and what it cost: one table, with a row per experiment.

    python eval.py runs/siss-1                              one run
    python eval.py bundled runs/*/                          all of them, compared
    python eval.py runs/*/ --preset faces-64 --forget 005735.jpg

Runs that differ in nothing but their seed, and are named NAME-SEED, share a row.
"""

from argparse import Namespace
from pathlib import Path
from typing import Any

from minisiss.lab.cli import Parser, UserError, complain, run


def main() -> int:
    args = parse_arguments()
    # These import torch, which takes seconds: the command line is checked first.
    from minisiss.lab import evaluation, machine
    from minisiss.lab.data import load_training_set
    from minisiss.lab.run import new_directory, write_json

    device = machine.start(args.device)
    models, errors = read_models(args.runs, device, args.memory_timesteps)
    shapes = {found.model.config.image_shape for found in models.values()}
    if len(shapes) != 1:
        raise UserError("nothing to measure, or models whose images have several sizes")
    judge = evaluation.Evaluation(args, load_training_set(args, shapes.pop(), device), device)
    out = machine.gather(new_directory(args.out, "eval"))[0]
    at = machine.at_precision(device, args.precision, args.compile)
    made_by, figures, features = {}, {}, {}
    for name, found in models.items():
        network = at(found.model)
        made_by[name] = found.made_by
        figures[name] = judge.figures(network, found.schedule)
        figures[name] |= judge.likelihood(found.model, found.schedule)
        if judge.features:
            features[name] = judge.features
    evaluation.add_distances(made_by, figures, features)
    if machine.rank() == 0:
        table = evaluation.table(made_by, figures)
        write_json(out / "results.json", {"made_by": made_by, "figures": figures})
        Path(out, "results.md").write_text(f"{table}\n", encoding="utf-8")
        print(f"\n{table}\n")
        if features:  # of digits
            path, timestep = out / "tradeoff.png", args.memory_timesteps[0]
            evaluation.save_tradeoff(path, made_by, figures, timestep)
        print(f"Written to {out}.")
    machine.leave()
    return 2 if errors else 0


def read_models(names: list[str], device: Any, timesteps: list[int]) -> tuple[dict, int]:
    """The checkpoints of finished runs, by name, and how many of the others are refused."""
    from minisiss.lab.checkpoint import load_finished

    models, errors = {}, 0
    for name in names:
        if Path(name, "results.md").exists():  # runs/*/ matches earlier evaluations too
            continue
        try:
            models[name.rstrip("/")] = load_finished(name, device, timesteps)
        except UserError as error:  # a broken run does not stop the others
            complain(error)
            errors += 1
    return models, errors


def parse_arguments() -> Namespace:
    parser = Parser(__doc__, "all")
    add = parser.add_argument
    add("runs", nargs="*", default=["bundled"], metavar="RUN",
        help="directories of runs, model.pt files, published DDPMs, or 'bundled'")
    parser.add_data("bundled")
    parser.add_sampling()
    parser.add_machine()
    words = "a TorchScript file is code: take it from whom you trust"
    add("--sscd", metavar="FILE", help=f"network for copy similarity; {words}")
    add("--inception", metavar="FILE", help=f"network for the FID; {words}")
    add("--out", help="directory of this evaluation (default: runs/eval-N)")
    return parser.parse()


if __name__ == "__main__":
    run(main)
