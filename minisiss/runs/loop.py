"""The steps of a run, as both loops share them: resuming, bar and log, saving, stopping on a signal."""

import json
import os
import signal
import time
import weakref
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from minisiss.errors import Diverged
from minisiss.machine.command_line import command
from minisiss.machine.ranks import World
from minisiss.runs import checkpoint
from minisiss.runs.directory import compare_inputs, cut_metrics, lock, new_directory, write_config
from minisiss.runs.files import UNFINISHED
from minisiss.schedule import NoiseSchedule
from minisiss.unet import UNet


@dataclass
class State:
    """What a run is made of, and what a checkpoint of it holds."""

    model: UNet  # takes the steps
    average: UNet  # the average of its weights over the steps: what is looked at, and kept
    optimizer: torch.optim.Optimizer
    schedule: NoiseSchedule
    memorised: dict[str, Tensor] = field(default_factory=dict)  # pictures by the prompts that bring them back
    step: int = 0  # steps taken
    seconds: float = 0.0  # spent in them


class Loop:
    """The steps from where a run is to its last:

        with Loop(args, "unlearn.py", state, world, inputs) as loop:
            for step in loop:
                ...  # draw, step, average
                loop.stepped()
                if loop.due(10):
                    ...  # log, look

    It saves when that is due, and after the step in which Ctrl-C, SIGTERM or SIGHUP comes, where it ends; a
    second Ctrl-C ends it at once. A run to resume takes up its checkpoint on entering: until then the weights
    are those before the run. FloatingPointError inside ends the run as Diverged, which names the last good
    checkpoint. Raises UserError where no directory can be made, another process is running there, or the run
    cannot be continued: not with other `inputs`, see `compare_inputs`.
    """

    def __init__(self, args: Namespace, script: str, state: State, world: World, inputs: dict[str, int],
                 **made_by: Any) -> None:
        self.args, self.script, self.state, self.world, self.made_by = args, script, state, world, made_by
        self.name, self.words = getattr(args, "method", "train"), {}
        self.noted = self.status = 0  # the exit status: 0, or 128 + the signal that ended the run
        self.out = Path(args.resume or world.on_rank_0(lambda: new_directory(args.out, self.name)))
        self.path, self.training = self.out / "model.pt", None
        self.unlock = lambda: None
        world.on_rank_0(self.open)
        if args.resume and self.path.exists():  # a run that was killed early has none
            self.training = checkpoint.load_training(self.path, state.model, args.steps)
            state.step, state.seconds = self.training["step"], self.training["seconds"]
        self.start = self.saved = state.step
        world.on_rank_0(lambda: (
            compare_inputs(self.out, inputs),
            write_config(self.out, args),
            cut_metrics(self.out, self.start)))

    def open(self) -> None:
        """Keep other processes out of the directory until the steps are done."""
        if (handle := lock(self.out)) is not None:
            self.unlock = weakref.finalize(self, os.close, handle)
        for unfinished in self.out.glob(f"{UNFINISHED}*"):  # a killed process left it half written
            unfinished.unlink(missing_ok=True)

    def __enter__(self) -> "Loop":
        if found := self.training:
            state = self.state
            state.model.load_state_dict(found["weights"])
            state.average.load_state_dict(found["ema"] or found["weights"])
            state.optimizer.load_state_dict(state.optimizer.state_dict() | {"state": found["moments"]})
        if not self.start:
            self.save()
        kinds = [signal.SIGINT, signal.SIGTERM]
        hangup = getattr(signal, "SIGHUP", None)  # of a terminal that is closed; Windows has none
        if hangup and signal.getsignal(hangup) is not signal.SIG_IGN:  # nohup ignores it
            kinds.append(hangup)
        self.handlers = {kind: signal.signal(kind, self.note) for kind in kinds}
        self.bar = tqdm(initial=self.start, total=self.args.steps, desc=self.name, unit="step")
        return self

    def note(self, number: int, frame: object) -> None:
        """Take a signal, for the end of the step."""
        self.noted = 128 + number
        signal.signal(signal.SIGINT, self.handlers[signal.SIGINT])

    def __iter__(self) -> Iterator[int]:
        while self.state.step < self.args.steps and not self.status:
            self.began = time.perf_counter()
            yield self.state.step
            if self.due(self.args.save_every) or self.status:
                self.save()
            self.bar.update()

    def stepped(self) -> None:
        """Count the step and stop its clock."""
        self.state.seconds += time.perf_counter() - self.began
        self.state.step += 1
        self.status = self.world.max(self.noted)  # one rank may have got it alone

    def due(self, every: int) -> bool:
        """Whether something is due that happens every so many steps, and after the last."""
        return self.state.step % every == 0 or self.state.step == self.args.steps

    def log(self, figures: dict[str, Tensor | float], shown: tuple[str, ...] = ()) -> dict[str, float]:
        """Write figures to metrics.jsonl, and those that are `shown` on the bar. Returns them as numbers."""
        numbers = {name: one.tolist() if isinstance(one, Tensor) else one for name, one in figures.items()}
        if self.state.step > self.start or not self.start:  # what a run resumes from is in its log already
            self.write(**numbers)
        self.words |= {name: f"{numbers[name]:.3g}" for name in shown if name in numbers}
        self.bar.set_postfix(self.words)
        return numbers

    def write(self, **figures: Any) -> None:
        """Add a line to metrics.jsonl, which rank 0 does."""
        if self.world.rank == 0:
            line = {"step": self.state.step, "seconds": self.state.seconds, **figures}
            with (self.out / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")

    def save(self) -> None:
        """Write model.pt, for use and for --resume."""
        state, step, seconds = self.state, self.state.step, self.state.seconds
        made_by = {"script": self.script, "settings": vars(self.args), "steps": step, "seconds": seconds}
        training = {"step": step, "seconds": seconds, "optimizer": state.optimizer.state_dict()}
        of_run = made_by | self.made_by, state.average.state_dict(), training, state.memorised
        self.world.on_rank_0(lambda: checkpoint.save(self.path, state.model, state.schedule, *of_run))
        self.saved = step

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        self.bar.close()
        self.unlock()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        step = self.state.step
        if isinstance(error, FloatingPointError):
            kept = f"{self.path} holds step {self.saved}, the last good one"
            raise Diverged(f"step {step + 1}: {error}; {kept}") from error
        if self.status and not error:
            print(f"stopped at step {step}; continue with: {command(self.script, resume=self.out)}")
