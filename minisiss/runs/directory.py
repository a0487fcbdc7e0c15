"""A run's directory: config.json, metrics.jsonl, model.pt, pictures."""

import itertools
import json
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from minisiss.data.digits import MODELS
from minisiss.errors import UserError
from minisiss.machine.command_line import NONE, PATHS, read_config
from minisiss.runs.files import write_atomically


def new_directory(out: str | None, name: str) -> Path:
    """Create the directory of a new run: `out`, or the first free of runs/name-1, runs/name-2, …

    mkdir is the lock: two runs that start together never get the same. Raises UserError if `out` exists.
    """
    for number in itertools.count(1):
        path = Path(f"runs/{name}-{number}" if out is None else out)
        try:
            path.mkdir(parents=True)
            return path
        except OSError as error:
            if out is not None or not isinstance(error, FileExistsError) or not path.is_dir():
                raise UserError(f"--out {path}: no new directory there ({error.strerror})") from error


def write_config(directory: Path, args: Namespace) -> None:
    """Write config.json, the settings that --resume goes on with, from wherever it is called."""
    settings = {name: value for name, value in vars(args).items() if name not in ("resume", "out")}
    for name in PATHS & settings.keys():
        if settings[name] not in (*MODELS, NONE):
            settings[name] = os.path.abspath(settings[name])
    write_json(directory / "config.json", settings)


def compare_inputs(directory: Path, inputs: dict[str, int]) -> None:
    """Raises UserError, naming what differs, where a run began with other inputs than it would go on with.

    inputs: sizes of files or checksums, by names, kept in inputs.json. A run that has none gets these.
    """
    path = directory / "inputs.json"
    if not path.exists():
        return write_json(path, inputs)
    began, rows = read_config(directory, path.name), []
    for what, names in (
            ("gone", began.keys() - inputs.keys()), ("new", inputs.keys() - began.keys()),
            ("changed", {name for name in began.keys() & inputs.keys() if began[name] != inputs[name]})):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            rows.append(f"{what}: {', '.join(sorted(names)[:3])}{more}")
    if rows:
        raise UserError(f"--resume {directory}: that run began with other data ({'; '.join(rows)})")


def lock(directory: Path) -> int | None:
    """Keep other processes from running in a directory until this file descriptor is closed.

    Raises UserError where another is at it. None where the system has no such locks.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return handle
    except OSError as error:
        os.close(handle)
        if isinstance(error, BlockingIOError):
            raise UserError(f"{directory}: another process is running there") from error
        return None  # a network's file system without locks


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a readable JSON file, atomically."""
    write_atomically(path, lambda file: file.write((json.dumps(record, indent=2) + "\n").encode()))


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, but for a last one that was cut off. Raises UserError if they are none."""
    path = directory / "metrics.jsonl"
    try:
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        records = [json.loads(line) for line in lines if line.endswith("\n")]
        if any(type(record["step"]) is not int for record in records):
            raise TypeError("a step is no integer")
        return records
    except (LookupError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: every line should be a JSON object with a step ({error})") from error


def cut_metrics(directory: Path, start: int) -> None:
    """Leave out the lines of metrics.jsonl past the step that a run resumes from, and that of the end (the
    T-shirt rate, the copies): a run that is extended ends again."""
    path = directory / "metrics.jsonl"
    if path.exists():
        found = read_metrics(directory) if start else []
        kept = [x for x in found if x["step"] <= start and not x.keys() & {"tshirt_rate", "copies"}]
        lines = "".join(json.dumps(record) + "\n" for record in kept)
        write_atomically(path, lambda file: file.write(lines.encode()))
