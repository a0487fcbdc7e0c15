"""A run: its directory, its log, its checkpoints, and the loop over its steps.

Stopped or killed and then resumed, it ends as if nothing had happened, bit for bit on a CPU: a
checkpoint has all of its state, and the random draws of a step are a function of seed and step.
"""

import itertools
import json
import math
import os
import shlex
import signal
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from minisiss.lab import files, machine
from minisiss.lab.checkpoint import Checkpoint, load, save
from minisiss.lab.cli import UserError
from minisiss.lab.data import TrainingSet
from minisiss.schedule import NoiseSchedule
from minisiss.unet import UNet


class Run:
    """The steps from where a run is to its last: `for step in run`, within `with Run(…) as run`.

    It saves when that is due, and after the step in which Ctrl-C, SIGTERM or SIGHUP comes; there it
    ends. A second Ctrl-C ends it at once. Raises UserError where a run cannot begin or go on.
    """

    def __init__(self, args: Namespace, model: UNet, average: UNet,
                 optimizer: torch.optim.Optimizer, schedule: NoiseSchedule, data: TrainingSet,
                 base: Checkpoint | None = None) -> None:
        """model takes the steps; average is the average of its weights, which is kept. base: the
        checkpoint that an unlearning begins with."""
        self.args, self.model, self.average, self.optimizer = args, model, average, optimizer
        self.name = getattr(args, "method", "train")
        self.settings = {k: v for k, v in vars(args).items() if k not in ("resume", "out")}
        forgotten = args.forget if base or args.exclude_forget else []
        base = base or Checkpoint(model, schedule, made_by={})
        self.kept = {"schedule": schedule, "memorised": base.memorised,
                     "forgotten": [*base.forgotten, *forgotten]}
        self.fingerprint = data.fingerprint()
        self.start = self.step = 0  # steps taken when this process began, and now
        self.signal = self.status = 0  # the exit status of a run that was stopped: 128 + signal
        self.out = Path(args.resume or machine.gather(new_directory(args.out, self.name))[0])
        self.path, self.log_path = self.out / "model.pt", self.out / "metrics.jsonl"
        if args.resume and self.path.exists():
            self.resume()
        if machine.rank() == 0:
            write_json(self.out / "config.json", self.settings)

    def resume(self) -> None:
        """Take up the state in the checkpoint."""
        found = load(self.path)
        if found.training["fingerprint"] != self.fingerprint:
            raise UserError(f"--resume {self.out}: that run began with other pictures")
        self.average.load_state_dict(found.model.state_dict())
        self.model.load_state_dict(found.training["weights"])
        self.optimizer.load_state_dict(found.training["optimizer"])
        self.start = self.step = found.made_by["steps"]
        if machine.rank() == 0:  # lines past the checkpoint go: these steps are taken again
            os.truncate(self.log_path, found.training["log_bytes"])

    def save(self) -> None:
        """Write model.pt, for use and for --resume."""
        if machine.rank() > 0:
            return
        self.log_path.touch()
        made_by = {"settings": self.settings, "steps": self.step}
        training = {"weights": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                    "fingerprint": self.fingerprint, "log_bytes": self.log_path.stat().st_size}
        state = Checkpoint(self.average, made_by=made_by, training=training, **self.kept)
        save(self.path, state)

    def __enter__(self) -> "Run":
        if self.step == 0:
            self.save()
        self.handlers = {}
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number and signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores it
                self.handlers[number] = signal.signal(number, self.note_signal)
        self.bar = tqdm(initial=self.step, total=self.args.steps, desc=self.name, unit="step")
        return self

    def note_signal(self, number: int, frame: object) -> None:
        """Remember a signal until the step is done."""
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __iter__(self) -> Iterator[int]:
        """The numbers of the steps, from 0. Within a step `self.step` counts it already."""
        for step in range(self.start, self.args.steps):
            self.step = step + 1
            yield step
            stop = max(machine.gather(self.signal))  # one rank may have got it alone
            if stop or self.due(self.args.save_every):
                self.save()
            self.bar.update()
            if stop:
                self.status = 128 + stop
                return

    def due(self, every: int) -> bool:
        """Whether something is due that happens every so many steps, and after the last."""
        return self.step % every == 0 or self.step == self.args.steps

    def log(self, figures: dict[str, Tensor], shown: tuple[str, ...], every: int = 1) -> None:
        """In every so many steps add a line to metrics.jsonl, and show some of its figures beside
        the bar. Raises FloatingPointError for a figure that is not finite."""
        if not self.due(every):
            return
        numbers = {name: float(figure) for name, figure in figures.items()}
        for name, value in numbers.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"{name} is {value}")
        self.bar.set_postfix({name: f"{numbers[name]:.3g}" for name in shown})
        if machine.rank() == 0:
            line = {"step": self.step, **numbers}
            with self.log_path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        self.bar.close()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if isinstance(error, FloatingPointError):
            last = f"the last good checkpoint is {self.path}"
            raise FloatingPointError(f"step {self.step}: {error}; {last}") from error
        if self.status and not error:
            command = shlex.join(["python", sys.argv[0], "--resume", str(self.out)])
            print(f"stopped at step {self.step}; to go on: {command}")


def new_directory(out: str | None, name: str) -> Path | None:
    """Make the directory of a new run: `out`, or the first free one of runs/name-1, runs/name-2, …
    Rank 0 makes it. Raises UserError if `out` exists."""
    if machine.rank() > 0:
        return None
    for number in itertools.count(1):
        path = Path(out or f"runs/{name}-{number}")
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError as error:
            if out or not path.is_dir():
                raise UserError(f"--out {path}: is there already") from error


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a readable JSON file, atomically."""
    text = json.dumps(record, indent=2, default=str) + "\n"
    files.write_atomically(path, lambda file: file.write(text.encode()))
