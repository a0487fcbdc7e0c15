"""The command line that the scripts share. Imports no torch, so that --help is instant."""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minisiss.lab.presets import PRESETS


class UserError(Exception):
    """Something that the user can put right. It is printed as one line, with exit status 2."""


def rank() -> int:
    """Which of torchrun's processes this is; 0 without torchrun."""
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0


def run(main: Callable[[], int]) -> None:
    """Call a script's main function. An error that is the user's becomes one line on stderr, with
    status 2; a loss that is not finite has status 1."""
    for stream in (sys.stdout, sys.stderr):  # a terminal that is not UTF-8 shows escapes
        stream.reconfigure(errors="backslashreplace")
    if rank():  # rank 0 speaks for all
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open until the end)
        os.environ["TQDM_DISABLE"] = "1"  # tqdm reads it when it is imported
    try:
        sys.exit(main())
    except (FloatingPointError, UserError, OSError, KeyboardInterrupt) as error:
        complain(str(error) or "interrupted")
        sys.exit({FloatingPointError: 1, KeyboardInterrupt: 130}.get(type(error), 2))


def complain(error: object) -> None:
    """Print one line on stderr."""
    print(f"{sys.argv[0]}: error: {' '.join(str(error).split())}", file=sys.stderr)


def number(kind: type, least: float = -math.inf, most: float = math.inf) -> Callable:
    """An argparse type: a finite number of this kind, from `least` to `most`."""

    def parse(text: str) -> float:
        value = kind(text)  # argparse makes one line of a ValueError
        if not (least <= value <= most and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text} is not a number from {least} to {most}")
        return value

    parse.__name__ = kind.__name__
    return parse


positive_int = number(int, 1, 10**9)
positive = number(float, 1e-30)
decay = number(float, 0, 0.999999)

# Flags that do not change an experiment: a resumed run may have other values of them.
MAY_CHANGE = {"device", "precision", "compile", "save_every", "data_root"}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, but not those that are None."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser whose defaults are those of a preset, and that raises UserError for wrong input."""

    def __init__(self, description: str, *parts: str) -> None:
        """parts: of the preset, those whose values are the defaults of flags."""
        super().__init__(description=description, formatter_class=HelpFormatter,
                         allow_abbrev=False)
        self.parts = parts
        self.add_argument("--preset", choices=PRESETS, default="mnist-small",
                          help="an experiment: defaults of the other flags")

    def error(self, message: str) -> None:
        raise UserError(f"{message} (see --help)")

    def parse(self) -> argparse.Namespace:
        """Parse the command line. Defaults are the preset's, or the settings of a resumed run."""
        early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        early.add_argument("--preset", nargs="?", default=self.get_default("preset"))
        early.add_argument("--method", nargs="?")
        chosen = early.parse_known_args()[0]
        preset = PRESETS.get(chosen.preset, {})  # the real parser reports an unknown name
        for part in self.parts:
            self.set_known_defaults(preset.get(part, {}))
        method = chosen.method or self.get_default("method")
        self.set_known_defaults(preset.get(f"unlearn {method}", {}))
        args = self.parse_args()
        if getattr(args, "resume", None) is None:
            return args

        config = read_config(args.resume)
        self.set_known_defaults(config)
        args = self.parse_args()
        for name, value in config.items():
            if name not in MAY_CHANGE and getattr(args, name, None) != value:
                run_has = f"that run has --{name.replace('_', '-')} {value}"
                raise UserError(f"--resume {args.resume}: {run_has}, and keeps it")
        return args

    def set_known_defaults(self, values: dict[str, Any]) -> None:
        """Set the defaults of the flags that this script has."""
        known = {action.dest for action in self._actions}
        self.set_defaults(**{name: value for name, value in values.items() if name in known})

    def add_data(self, root: str) -> None:
        add = self.add_argument
        add("--data", choices=["mnist", "prompts", "pictures"], default="mnist",
            help="digits and a T-shirt, digits with captions (unlearn.py), or a folder")
        add("--data-root", default=root,
            help="folder of pictures, or of MNIST (or download it); 'bundled': 10,000 digits")
        add("--forget", nargs="+", default=[], metavar="NAME",
            help="pictures to forget, in the folder")

    def add_machine(self) -> None:
        add = self.add_argument
        add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="seed of everything random")
        add("--device", default="auto", help="auto, cpu, cuda, cuda:1, …; mps is untested")
        add("--precision", choices=["auto", "bf16", "fp32"], default="auto",
            help="auto: bf16 where the processor has it")
        add("--compile", action="store_true", help="torch.compile: minutes at first, then faster")

    def add_sampling(self) -> None:
        add = self.add_argument
        add("--samples", type=number(int, 0, 10**6), default=1024, help="samples to draw")
        add("--sampling-steps", type=positive_int, default=25, help="network calls per sample")
        add("--draws", type=number(int, 1, 4096), default=32, help="draws per memory timestep")
        add("--memory-timesteps", type=number(int, 0, 99_999), nargs="+", metavar="T",
            default=[300, 400, 500, 600], help="timesteps to which the forget image is noised")

    def add_run(self, name: str, save_every: int) -> None:
        add = self.add_argument
        add("--save-every", type=positive_int, default=save_every, help="steps between checkpoints")
        add = self.add_mutually_exclusive_group().add_argument
        add("--out", help=f"directory of this run (default: runs/{name}-N)")
        add("--resume", metavar="DIR", help="continue the run in this directory")


def read_config(directory: str) -> dict[str, Any]:
    """The settings that a run was started with. Raises UserError where a run is missing."""
    path = Path(directory) / "config.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{directory}: holds no run ({path}: {error})") from error
