"""Checkpoints: one file with the network, its schedule and what made it; and published models
(`load_pretrained`)."""

import json
from argparse import Namespace
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minisiss.data.digits import ASSETS, BUNDLED
from minisiss.errors import UserError
from minisiss.runs.files import check_tensors, read_tensors, write_atomically
from minisiss.runs.pretrained import load_pretrained  # noqa: F401: both kinds of checkpoint, one place to look
from minisiss.schedule import NoiseSchedule
from minisiss.unet import UNet, UNetConfig

FORMAT = "minisiss-1"
MOST_TIMESTEPS = 100_000
MOST_PARAMETERS = 10**9  # of a new network: with their average, gradients and AdamW's state 20 GB


@dataclass
class Checkpoint:
    """What `load` finds in a file."""

    model: UNet  # with the EMA weights where the file has them, otherwise the only weights
    schedule: NoiseSchedule
    made_by: dict[str, Any]  # what made it: script, settings, steps, seconds
    training: dict[str, Any]  # what --resume needs; empty in a checkpoint that is not to be continued


def save(
    path: Path | str,
    model: UNet,
    schedule: NoiseSchedule,
    made_by: dict[str, Any],
    ema: dict[str, Tensor] | None = None,
    training: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint, atomically: whatever happens, `path` is the old file or the new one."""
    state = {
        "format": FORMAT,
        "config": asdict(model.config),
        "weights": model.state_dict(),
        "ema": ema,
        "schedule": vars(schedule),
        "made_by": made_by,
        "training": training or {},
    }
    write_atomically(Path(path), lambda file: torch.save(state, file))


def load(path: Path | str, device: torch.device | str = "cpu") -> Checkpoint:
    """Read a checkpoint, of anyone. Raises UserError, naming the file, for what is no whole checkpoint of
    ours."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        state = read_tensors(path)
    except Exception as error:  # a damaged file can fail anywhere in torch's readers
        reason = "not a readable checkpoint (truncated, damaged, or of another program)"
        raise UserError(f"{path}: {reason}") from error
    if type(state) is not dict or state.get("format") != FORMAT:
        raise UserError(f"{path}: not a minisiss checkpoint (its format is not '{FORMAT}')")
    try:
        for part in ("config", "weights", "ema", "schedule", "made_by", "training"):
            if not isinstance(state.get(part), dict) and not (part == "ema" and state.get(part) is None):
                raise ValueError(f"its {part} is missing, or no dict")
        with torch.device("meta"):  # names and shapes only: memory comes when all of them fit
            model = UNet(UNetConfig(**state["config"]))
        weights, ema = dict(state["weights"]), dict(state["ema"]) if state.get("ema") else None
        for tensors in (weights, ema) if ema else (weights,):
            check_tensors(path, tensors, {name: parameter.shape for name, parameter in model.state_dict().items()})
        model.to_empty(device=device).load_state_dict(ema or weights)
        schedule, made_by = checked_schedule(state["schedule"]), checked_origin(state["made_by"])
        training = state["training"] and {**state["training"], "weights": weights, "ema": ema}
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: the checkpoint does not fit together: {reason}") from error
    return Checkpoint(model, schedule.to(device), made_by, training)


def checked_schedule(values: dict[str, Tensor]) -> NoiseSchedule:
    """The schedule in a checkpoint: β between 0 and 1, and what follows from them. Raises an error
    otherwise."""
    betas = values.get("betas")
    row = isinstance(betas, Tensor) and betas.ndim == 1 and 0 < len(betas) <= MOST_TIMESTEPS
    if not row or not 0 < betas.min() <= betas.max() < 1:
        raise ValueError(f"its schedule's betas should be 1 to {MOST_TIMESTEPS:,} numbers between 0 and 1")
    expected = vars(NoiseSchedule.from_betas(betas))
    if values.keys() != expected.keys():
        raise ValueError(f"its schedule should hold {', '.join(expected)}")
    for name, value in values.items():
        same = isinstance(value, Tensor) and (value.shape, value.dtype) == (betas.shape, torch.float32)
        if not same or not torch.allclose(value, expected[name], rtol=1e-3, atol=0):
            raise ValueError(f"its schedule's {name} do not follow from its betas")
    # No views of a file that may change.
    return NoiseSchedule(**{name: value.clone() for name, value in values.items()})


def checked_origin(made_by: dict[str, Any]) -> dict[str, Any]:
    """What says how a checkpoint was made, if it is a little JSON: it goes into reports. Raises an error
    otherwise."""
    for count, _ in enumerate(json.JSONEncoder().iterencode(made_by)):  # lists in each other can be endless JSON
        if count > 10_000:
            raise ValueError("its made_by is too long")
    return made_by


def load_training(path: Path | str, model: UNet, steps: int) -> dict[str, Any]:
    """What --resume needs of a checkpoint: weights, ema (or None), step, seconds and moments, AdamW's state.

    Raises UserError if it is not there, is for another network than `model`, or is past `steps`.
    """
    found = load(path)
    training = found.training

    def refuse(reason: str) -> UserError:
        return UserError(f"{path}: cannot be continued, {reason}")

    if not {"optimizer", "step", "seconds"} <= training.keys() or not isinstance(training["optimizer"], dict):
        raise refuse("it holds no optimizer state")
    if found.model.config != model.config:
        raise refuse("its network is not the one in the config.json beside it")
    step, seconds = training["step"], training["seconds"]
    if type(step) is not int or type(seconds) is not float or step < 0 or not 0 <= seconds < float("inf"):
        raise refuse("its steps and seconds are no numbers of steps and seconds")
    if step > steps:
        raise UserError(f"--steps {steps}: {path} has taken {step} already")
    try:
        moments = {place: dict(tensors) for place, tensors in training["optimizer"]["state"].items()}
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise refuse("its optimizer state is none of AdamW's") from error
    if moments or step:
        shapes = {
            f"{name} of parameter {place}": shape
            for place, parameter in enumerate(model.parameters())
            for name, shape in {"step": torch.Size(), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}.items()
        }
        there = {f"{name} of parameter {place}": value for place, of in moments.items() for name, value in of.items()}
        check_tensors(path, there, shapes)
    # Each in memory of its own, as the optimizer works in place.
    clones = {place: {name: value.clone() for name, value in of.items()} for place, of in moments.items()}
    return training | {"moments": clones}


def load_any(path: str, timesteps: list[int], device: torch.device) -> Checkpoint:
    """Read a model for use at these timesteps. Raises UserError where its schedule is shorter.

    path: a checkpoint, the directory of a published model, or "bundled" for the model in assets/.
    """
    if path != BUNDLED and Path(path).is_dir():
        model, schedule = load_pretrained(path)
        found = Checkpoint(model.to(device), schedule.to(device), made_by={"published": path}, training={})
    else:
        found = load(ASSETS / "mnist-small.pt" if path == BUNDLED else path, device)
    if max(timesteps) >= len(found.schedule):
        last = len(found.schedule) - 1
        raise UserError(f"--memory-timesteps {max(timesteps)}: the last timestep of {path} is {last}")
    return found


def untrained(args: Namespace) -> UNet:
    """The network that the flags describe, before its first step. Raises UserError for one that cannot be."""
    try:
        config = UNetConfig(**{field.name: getattr(args, field.name) for field in fields(UNetConfig)})
    except ValueError as error:
        raise UserError(error) from error
    with torch.device("meta"):  # counts without taking memory
        count = sum(parameter.numel() for parameter in UNet(config).parameters())
    if count > MOST_PARAMETERS:
        what = f"a network of {count:,} parameters; here it may have {MOST_PARAMETERS:,}"
        raise UserError(f"--channels, --layers-per-block: {what}")
    torch.manual_seed(args.seed)
    model = UNet(config)
    model.checkpoint_activations = args.checkpoint_activations
    return model
