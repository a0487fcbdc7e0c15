"""What the scripts share on the command line. Imports no torch: --help and typing errors are instant."""

import argparse
import ast
import json
import os
import shlex
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minisiss.errors import Diverged, UserError, rank
from minisiss.presets import PRESETS


def run(script: Callable[[], int | None]) -> None:
    """Run a script's main function and turn what the user should know into one line and an exit status."""
    for stream in (sys.stdout, sys.stderr):  # escape what a terminal that is not of UTF-8 cannot show
        stream.reconfigure(errors="backslashreplace")
    warnings.filterwarnings("ignore", "Image size")  # Pillow's, of pictures that `data.folder` refuses
    if rank():  # rank 0 speaks for all
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open to the end)
        os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # when torch is: the CPU does what mps cannot
    try:
        status = script()
        from minisiss.machine.ranks import leave  # imports torch, as the script has by now

        leave()
        sys.exit(status)
    except (UserError, Diverged, OSError) as error:  # a full disk, a name too long: the user's too
        if rank():  # nearly always rank 0 has met it as well and says it, and torchrun then ends this process
            time.sleep(10)
        complain(error)
        sys.exit(1 if isinstance(error, Diverged) else 2)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):  # torch's word, on CPU and GPU
            raise
        complain(UserError(f"not enough memory; try a smaller --batch-size, --draws or --samples ({error})"))
        sys.exit(2)
    except KeyboardInterrupt:
        if rank() == 0:
            print(f"{sys.argv[0]}: interrupted", file=sys.stderr)
        sys.exit(130)


def complain(error: Exception) -> None:
    """Print an error as one line on stderr."""
    print(f"{sys.argv[0]}: error: {' '.join(str(error).split())}", file=sys.stderr)


NONE = "none"  # the --init that means weights at random
PATHS = {"checkpoint", "data_root", "init"}  # settings that name files: config.json has them absolute
MAY_CHANGE = {  # settings that may be others when a run is resumed
    "steps", "device", "precision", "compile", "checkpoint_activations", "save_every", "sample_every",
    "samples", "checkpoint", "data_root", "skip_unreadable"}
# Flags that say what the data is, and what they are where nothing is said.
OF_DATA = {
    "preset": "mnist-small", "data": "mnist", "data_root": "bundled", "forget": [], "skip_unreadable": False}


def command(script: str, args: argparse.Namespace | None = None, **flags: Any) -> str:
    """A command to paste: a script beside the one that runs, with the data flags of `args`, and these."""
    words = ["python", str(Path(sys.argv[0]).parent / Path(script).name)]
    of_args = {name: getattr(args, name) for name in OF_DATA} if args else {}
    for name, value in (of_args | flags).items():
        if value != OF_DATA.get(name):
            values = value if isinstance(value, list) else [value]
            words += [f"--{name.replace('_', '-')}", *map(str, values if value is not True else [])]
    return shlex.join(words)


def read_config(directory: str | Path, name: str = "config.json") -> dict[str, Any]:
    """The settings a run was started with, or another of its files. Raises UserError if there is no run."""
    path = Path(directory) / name
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{directory}: holds no run (no readable {path})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: should hold one JSON object")
    return config


def number(kind: type, low: float, high: float | None = None, *, open_low: bool = False,
           open_high: bool = False) -> Callable:
    """An argparse type: a finite int or float from low to high, without an end that is open."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        most = sys.float_info.max if high is None else high
        if low <= value <= most and not (open_low and value == low) and not (open_high and value == high):
            return value
        span = f"above {low}" if open_low else f"at least {low}" if high is None else f"from {low} to {high}"
        span = f"at least {low} and below {high}" if open_high else span
        wanted = "an integer" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"'{text}' should be {wanted} {span}")

    return parse


def filename(text: str) -> str:
    """An argparse type: the name of a file or directory. "" is none, and "-" is standard input elsewhere."""
    if text in ("", "-") or "\0" in text:
        raise argparse.ArgumentTypeError(f"'{text}' should be the name of a file or directory")
    return text


def read_names(entry: str) -> list[str]:
    """The names in an entry of --forget: itself, or a .txt's lines. Raises UserError if there are none."""
    if not entry.endswith(".txt"):
        return [entry]
    try:  # a byte-order mark is no part of the first name, and a name need not be UTF-8
        lines = Path(entry).read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"--forget {entry}: not a readable text file ({error})") from error
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise UserError(f"--forget {entry}: names no picture")
    return names


def method_of(args: argparse.Namespace, unlearning: Any) -> tuple:
    """The method and its numbers. Raises UserError for a method not in the table, and flags it ignores."""
    method = unlearning.METHODS.get(args.method)
    if method is None:
        raise UserError(f"--method '{args.method}': unknown; choose from {', '.join(unlearning.METHODS)}")
    numbers = {name: getattr(args, name) for name in unlearning.Settings.__dataclass_fields__}
    # A resumed run may restate what it was started with.
    typed, ignored = {"--method"} if args.resume else {word.partition("=")[0] for word in sys.argv}, []
    for name, value in numbers.items():
        flag, default = f"--{name.replace('_', '-')}", getattr(unlearning.Settings, name)
        # A value is None where another flag is in its place.
        if name not in method.reads and value is not None and (value != default or flag in typed):
            ignored.append(f"{flag} {value}")
    if method.rule is not unlearning.subtract and args.draw_x == "all":
        ignored.append("--draw-x all")
    if ignored:
        chosen = "" if "--method" in typed else f", the default of --preset {args.preset},"
        raise UserError(f"{ignored[0]}: --method {args.method}{chosen} has no use for it")
    return method, unlearning.Settings(**numbers)


positive_int = number(int, 1, 10**9)
batch_size = number(int, 1, 65_536)
decay = number(float, 0, 1, open_high=True)  # at 1 the average would stay where it is
positive = number(float, 0, open_low=True)
seed = number(int, 0, 2**63 - 1)


def declarations(module: str, record: str) -> dict[str, tuple]:
    """The fields of a dataclass in a method file: {name: (type, least, most, meaning, default)}.

    They are read from its source, as importing it would import torch, which takes seconds.
    """
    source = ast.parse((Path(__file__).parent.parent / f"{module}.py").read_text(encoding="utf-8"))
    (declared,) = (node for node in source.body if isinstance(node, ast.ClassDef) and node.name == record)
    fields = {}
    for field in declared.body:
        if isinstance(field, ast.AnnAssign):  # name: Annotated[type, least, most, meaning] = default
            kind, *about = field.annotation.slice.elts
            fields[field.target.id] = ast.unparse(kind), *map(ast.literal_eval, [*about, field.value])
    return fields


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class Instead(argparse.Action):
    """Store the value of one of several flags, and None for the others, which may have one by preset."""

    def __call__(self, parser: "Parser", namespace: argparse.Namespace, value: Any, _: str) -> None:
        for name in parser.one_of:
            setattr(namespace, name, value if name == self.dest else None)


class Parser(argparse.ArgumentParser):
    """An argument parser that shows defaults and raises UserError for what it does not accept."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, formatter_class=HelpFormatter, allow_abbrev=False)
        self.preset_parts: tuple[str, ...] = ()
        self.one_of: tuple[str, ...] = ()  # flags that take the place of each other

    def error(self, message: str) -> None:
        raise UserError(f"{message} (see --help)")

    def add_preset(self, *parts: str) -> None:
        """Add --preset. The values in the preset's `parts` become defaults of the flags of these names."""
        self.preset_parts = parts
        self.add_argument("--preset", choices=PRESETS, default="mnist-small", help="defaults for other flags")

    def parse_args(self, args: None = None, namespace: None = None) -> argparse.Namespace:
        early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        early.add_argument("--preset", nargs="?", default=self.get_default("preset"))
        early.add_argument("--method", nargs="?")
        chosen = early.parse_known_args()[0]
        preset = PRESETS.get(chosen.preset, {})  # an unknown name is reported by the real parse
        for part in self.preset_parts:
            self.set_defaults(**preset.get(part, {}))
        self.set_defaults(**preset.get(f"unlearn {chosen.method or self.get_default('method')}", {}))
        return self.parse_again()

    def parse_again(self) -> argparse.Namespace:
        """Parse with the defaults as they are now. Lists of names to forget are read, and not kept."""
        args = super().parse_args()
        if "forget" in args:
            args.forget = [name for entry in args.forget for name in read_names(entry)]
        return args

    def add_fields(self, module: str, record: str, one_of: tuple[str, ...] = ()) -> None:
        """A flag for each field of a dataclass, see `declarations`; of those in `one_of` one at most."""
        self.one_of = one_of
        group = self.add_argument_group(f"{record} (minisiss/{module}.py)")
        either = self.add_mutually_exclusive_group() if one_of else group
        for name, (kind, least, most, meaning, default) in declarations(module, record).items():
            many = "*" if least == 0 else "+"
            (either if name in one_of else group).add_argument(
                f"--{name.replace('_', '-')}", type=number(float if "float" in kind else int, least, most),
                nargs=many if "tuple" in kind else None, default=default, help=meaning,
                action=Instead if name in one_of else "store")

    def add_data(self, root: str) -> None:
        add = self.add_argument
        add("--data", choices=["mnist", "prompts", "pictures"], default="mnist",
            help="mnist: digits and a T-shirt; prompts: digits with captions; pictures: a folder of them")
        add("--data-root", type=filename, default=root,
            help="pictures: the folder (.jpg, .png, .webp); mnist: MNIST and FashionMNIST in torchvision's "
                 "layout, downloaded if missing, or 'bundled': the 10,000 digits that come along")
        add("--forget", type=filename, nargs="+", default=[], metavar="NAME",
            help="pictures to forget, by their names in the folder, or text files (.txt) with a name a line")
        add("--skip-unreadable", action="store_true", help="go on without pictures that cannot be read")

    def add_prompt(self) -> None:
        self.add_argument("--prompt", metavar="WORDS",
            help="prompts: the one to forget (default: the first that the model memorised)")
        self.add_argument("--fixed-prompt", choices=["modified", "original"], default="modified",
            help="prompts: which one the steps are taken at; the samples are always of the modified one")
        self.add_argument("--hold", type=number(float, 0), default=0.0,
            help="prompts: weight of a loss that holds ordinary ones where they are; 0: as in the paper")
        self.add_argument("--guidance", type=number(float, 0, 100), default=1.0,
            help="w of samples of a prompt: 1: the conditional model, 0: the unconditional one")

    def add_machine(self) -> None:
        add = self.add_argument
        add("--seed", type=seed, default=0)
        add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, …")
        add("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="auto: bf16 if native")
        add("--compile", action="store_true", help="torch.compile: minutes at first, then faster")

    def add_sampling(self) -> None:
        add, timestep = self.add_argument, number(int, 0, 99_999)
        add("--samples", type=number(int, 0, 10**6), default=1024, help="samples for the T-shirt rate")
        add("--sampling-steps", type=positive_int, default=25, help="network calls for one sample")
        add("--eta", type=number(float, 0, 1), default=0.0, help="0: DPM-Solver++, deterministic; 1: DDPM")
        add("--draws", type=number(int, 1, 4096), default=32, help="draws for the memory at each timestep")
        add("--memory-timesteps", type=timestep, nargs="+", default=[300, 400, 500, 600], metavar="T",
            help="timesteps the forget image is noised to")

    def add_run(self, name: str, save_every: int) -> None:
        add = self.add_argument
        add("--save-every", type=positive_int, default=save_every, help="steps between checkpoints")
        add("--checkpoint-activations", action="store_true", help="less memory, more time")
        add = self.add_mutually_exclusive_group().add_argument
        add("--out", type=filename, help=f"directory of this run (default: runs/{name}-N)")
        add("--resume", type=filename, metavar="DIR", help="continue the run in this directory")

    def settings(self, config: dict[str, Any]) -> dict[str, Any]:
        """The values of a config.json. Raises UserError for one that its flag does not accept."""
        flags = {flag.dest: flag for flag in self._actions if flag.dest not in ("help", "out", "resume")}
        found = {}
        for name, value in config.items():
            if name not in flags:
                raise UserError(f"'{name[:80]}' is no setting of this script")
            flag, several = flags[name], isinstance(value, list)
            switch = flag.nargs == 0 and isinstance(value, bool)
            none = value in (None, []) and (value == flag.default or name in self.one_of)
            if switch or none:
                found[name] = value
            elif several != (flag.nargs in ("+", "*")):
                raise UserError(f"{name} should be {'one value' if several else 'a list'}")
            else:  # as if it had been typed, where True is 1
                values = value if several else [value]
                typed = (str(int(one) if isinstance(one, bool) else one) for one in values)
                found[name] = getattr(super().parse_args([flag.option_strings[0], *typed]), name)
        return found

    def parse_run(self) -> argparse.Namespace:
        """Parse the command line of a script with --resume.

        A resumed run has the settings in its config.json; flags may restate them, and change `MAY_CHANGE`.
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
        args = self.parse_again()
        typed = json.loads(json.dumps(vars(args)))
        typed |= {name: os.path.abspath(typed[name]) for name in PATHS & typed.keys()
                  if typed[name] != config.get(name)}
        changed = [f"--{key.replace('_', '-')} {value}" for key, value in config.items()
                   if key not in MAY_CHANGE and typed.get(key) != value]
        if changed:
            started = f"that run was started with {', '.join(changed)}"
            raise UserError(f"--resume {args.resume}: {started}; leave these flags out")
        return args
