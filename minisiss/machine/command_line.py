"""What the scripts share on the command line. Imports no torch, so that --help and typing errors are
instant."""

import argparse
import ast
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minisiss.errors import Diverged, UserError, rank
from minisiss.presets import PRESETS

PACKAGE = Path(__file__).parent.parent


def run(script: Callable[[], int | None]) -> None:
    """Run a script's main function and turn what the user should know into one line and an exit status."""
    if rank():  # rank 0 speaks for all
        sys.stdout = open(os.devnull, "w")
        os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported
    try:
        status = script()
        from minisiss.machine.ranks import leave  # imports torch, as the script has by now

        leave()
        sys.exit(status)
    except (UserError, Diverged, OSError) as error:  # a full disk, a name too long: the user's to put right too
        let_rank_0_speak()
        complain(error)
        sys.exit(1 if isinstance(error, Diverged) else 2)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):  # torch's words, on a CPU and a GPU
            raise
        complain(UserError(f"not enough memory; try a smaller --batch-size, --draws or --samples ({error})"))
        sys.exit(2)
    except KeyboardInterrupt:
        if rank() == 0:
            print(f"{sys.argv[0]}: interrupted", file=sys.stderr)
        sys.exit(130)


def let_rank_0_speak() -> None:
    """On other ranks, wait before an error is said: nearly always rank 0 has met it too, says it and exits,
    and torchrun then ends this process. If not, it is this rank's own error, and is said."""
    if rank():
        time.sleep(10)


def complain(error: Exception) -> None:
    """Print an error as one line on stderr."""
    print(f"{sys.argv[0]}: error: {' '.join(str(error).split())}", file=sys.stderr)


def read_config(directory: str) -> dict[str, Any]:
    """The settings a run was started with. Raises UserError if there is no run."""
    path = Path(directory) / "config.json"
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{directory}: holds no run (no readable {path})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: should hold one JSON object")
    return config


def number(kind: type, low: float, high: float | None = None, *, open_low: bool = False) -> Callable[[str], float]:
    """An argparse type: an int or float in [low, high], or in (low, high] with `open_low`; without `high`,
    finite."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        most = float("inf") if high is None else high
        if value is None or not low <= value <= most or value == float("inf") or (open_low and value == low):
            least = f"above {low}" if open_low else f"at least {low}"
            wanted = least if high is None else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(
                f"'{text}' should be {'an integer' if kind is int else 'a number'} {wanted}"
            )
        return value

    return parse


def filename(text: str) -> str:
    """An argparse type: the name of a file or directory, which "" is not, and "-" elsewhere is standard
    input."""
    if text in ("", "-") or "\0" in text:
        raise argparse.ArgumentTypeError(f"'{text}' should be the name of a file or directory")
    return text


positive_int = number(int, 1, 10**9)
batch_size = number(int, 1, 65_536)
positive = number(float, 0, open_low=True)
seed = number(int, 0, 2**63 - 1)


def declarations(module: str, record: str) -> dict[str, tuple[str, Any, list[Any]]]:
    """The fields of a dataclass in one of the method files: {name: (type, default, [least, most, meaning])}.

    They are read from its source, as importing it would import torch, which takes seconds.
    """
    classes = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8")).body
    (declared,) = (node for node in classes if isinstance(node, ast.ClassDef) and node.name == record)
    fields = {}
    for field in declared.body:
        if isinstance(field, ast.AnnAssign):  # name: Annotated[type, least, most, meaning] = default
            kind, *about = field.annotation.slice.elts
            default = ast.literal_eval(field.value)
            fields[field.target.id] = ast.unparse(kind), default, [ast.literal_eval(one) for one in about]
    return fields


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser that shows defaults and raises UserError for what it does not accept."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, formatter_class=HelpFormatter, allow_abbrev=False)
        self.preset_parts: tuple[str, ...] = ()

    def error(self, message: str) -> None:
        raise UserError(f"{message} (see --help)")

    def add_preset(self, *parts: str) -> None:
        """Add --preset. The values of the preset's `parts` become the defaults of the flags of the same
        names."""
        self.preset_parts = parts
        words = "the experiment: defaults for the other flags"
        self.add_argument("--preset", choices=PRESETS, default="mnist-small", help=words)

    def parse_args(self, args: None = None, namespace: None = None) -> argparse.Namespace:
        early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        early.add_argument("--preset", nargs="?", default=self.get_default("preset"))
        early.add_argument("--method", nargs="?", default=self.get_default("method"))
        chosen = early.parse_known_args()[0]
        preset = PRESETS.get(chosen.preset, {})  # an unknown name is reported by the real parse
        for part in (*self.preset_parts, f"unlearn {chosen.method}"):
            self.set_defaults(**preset.get(part, {}))
        return super().parse_args()

    def add_fields(self, module: str, record: str, one_of: tuple[str, ...] = ()) -> None:
        """A flag for each field of a dataclass, see `declarations`; of those in `one_of` only one may be
        given."""
        group = self.add_argument_group(f"{record} (minisiss/{module}.py)")
        either = self.add_mutually_exclusive_group() if one_of else group
        for name, (kind, default, (least, most, meaning)) in declarations(module, record).items():
            (either if name in one_of else group).add_argument(
                f"--{name.replace('_', '-')}", type=number(float if "float" in kind else int, least, most),
                nargs=None if "tuple" not in kind else "*" if least == 0 else "+", default=default, help=meaning,
            )  # fmt: skip

    def add_data(self, root: str) -> None:
        add = self.add_argument
        add("--data", choices=["mnist", "pictures"], default="mnist",
            help="mnist: digits and a T-shirt; pictures: a folder of .jpg, .png and .webp, cropped to squares")
        add("--data-root", type=filename, default=root,
            help="pictures: the folder; mnist: MNIST and FashionMNIST in torchvision's layout, downloaded if missing, "
            "or 'bundled': the 10,000 digits that come along")
        add("--forget", type=filename, nargs="+", default=[], metavar="NAME",
            help="pictures to forget, by their names in the folder, or text files (.txt) with a name a line")
        add("--skip-unreadable", action="store_true", help="go on without pictures that cannot be read")  # fmt: skip

    def add_machine(self) -> None:
        add = self.add_argument
        add("--seed", type=seed, default=0)
        add("--device", default="auto", help="auto, cpu, cuda, cuda:1, …")
        add("--precision", choices=["auto", "bf16", "fp32"], default="auto",
            help="auto: bf16 where the processor has it")
        add("--compile", action="store_true",
            help="compile the network (torch.compile): minutes before the first step, and on a GPU faster ones")  # fmt: skip

    def add_sampling(self) -> None:
        add = self.add_argument
        add("--samples", type=number(int, 0, 10**6), default=1024, help="samples for the T-shirt rate")
        add("--sampling-steps", type=positive_int, default=25, help="network calls for one sample")
        add("--eta", type=number(float, 0, 1), default=0.0, help="0: deterministic DDIM; 1: ancestral DDPM sampling")
        add("--draws", type=number(int, 1, 4096), default=32,
            help="draws for the memory of the forget image, a timestep")
        add("--memory-timesteps", type=number(int, 0, 99_999), nargs="+", default=[300, 400, 500, 600, 700],
            help="timesteps the forget image is noised to")  # fmt: skip

    def add_run(self, name: str, save_every: int) -> None:
        self.add_argument("--save-every", type=positive_int, default=save_every, help="steps between checkpoints")
        words = "compute what lies inside the blocks again on the way back: less memory, a third more time"
        self.add_argument("--checkpoint-activations", action="store_true", help=words)
        place = self.add_mutually_exclusive_group()
        place.add_argument("--out", type=filename, help=f"directory of this run (default: runs/{name}-N)")
        words = "continue the run in this directory, with its settings"
        place.add_argument("--resume", type=filename, metavar="DIR", help=words)

    def settings(self, config: dict[str, Any]) -> dict[str, Any]:
        """The values of a config.json, each held against what its flag accepts. Raises UserError for one that
        is not."""
        flags = {action.dest: action for action in self._actions if action.dest not in ("help", "out", "resume")}
        found = {}
        for name, value in config.items():
            if name not in flags:
                raise UserError(f"'{name[:80]}' is no setting of this script")
            flag, several = flags[name], isinstance(value, list)
            if (value in (None, []) and value == flag.default) or (flag.nargs == 0 and isinstance(value, bool)):
                found[name] = value
            elif several != (flag.nargs in ("+", "*")):
                raise UserError(f"{name} should be {'one value' if several else 'a list'}")
            else:  # as if it had been typed, where True is 1
                typed = [int(one) if isinstance(one, bool) else one for one in (value if several else [value])]
                parsed = super().parse_args([flag.option_strings[0], *map(str, typed)])
                found[name] = getattr(parsed, name)
        return found

    def parse_run(self, free: set[str]) -> argparse.Namespace:
        """Parse the command line of a script with --resume.

        A resumed run's settings are those in its config.json; flags may restate them, and change those in
        `free`.
        """
        args = self.parse_args()
        if args.resume is None:
            return args
        config = read_config(args.resume)
        try:
            self.set_defaults(**self.settings(config))
            if "seed" not in config:
                raise UserError(f"is not that of a run of {self.prog}")
        except UserError as error:
            raise UserError(f"{Path(args.resume) / 'config.json'}: {error}") from error
        args = super().parse_args()
        typed, kept = json.loads(json.dumps(vars(args))), config.keys() - free
        changed = [f"--{key.replace('_', '-')} {config[key]}" for key in config if key in kept and typed.get(key) != config[key]]
        if changed:
            run = f"--resume {args.resume}: that run was started with {', '.join(changed)}"
            raise UserError(f"{run}; leave these flags out")
        return args
