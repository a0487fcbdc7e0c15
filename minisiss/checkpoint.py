"""Checkpoints: one file with the network, its schedule and what made it; and published models (`load_pretrained`)."""

import warnings
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minisiss.cli import UserError
from minisiss.data import ASSETS, BUNDLED
from minisiss.files import write_atomically
from minisiss.pretrained import load_pretrained, save_pretrained  # noqa: F401: both kinds of checkpoint, one place to look
from minisiss.schedule import NoiseSchedule
from minisiss.unet import UNet, UNetConfig

FORMAT = "minisiss-1"


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
    """Read a checkpoint. Raises UserError, naming the file, for anything that is not a whole checkpoint of ours."""
    try:
        with zipfile.ZipFile(path) as archive, warnings.catch_warnings():
            # Records as torch writes them, uncompressed, so that none claims more memory than the file has bytes; and as
            # they were written, by their checksums.
            if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()) or archive.testzip():
                raise ValueError("damaged")
            warnings.simplefilter("ignore")  # torch warns on its way to an error of its own; one line is enough
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such checkpoint") from error
    except Exception as error:  # a damaged file can fail anywhere in torch's readers
        raise UserError(f"{path}: not a readable checkpoint (truncated, damaged, or of another program)") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path}: not a minisiss checkpoint (its format is not '{FORMAT}')")
    try:
        model = UNet(UNetConfig(**state["config"]))
        model.load_state_dict(state["ema"] or state["weights"])
        schedule = NoiseSchedule(**state["schedule"])
        if len({value.shape for value in vars(schedule).values()}) != 1 or not all(0 < v.min() and v.max() < 1 for v in vars(schedule).values()):
            raise ValueError("the schedule's values should be four rows of equal length between 0 and 1")
        if not all(p.isfinite().all() for p in model.parameters()):
            raise ValueError("some of its weights are not finite")
        made_by, training = state["made_by"], state["training"]
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"{path}: the checkpoint does not fit together: {str(error).splitlines()[0]}") from error
    if training:
        training["weights"], training["ema"] = state["weights"], state["ema"]
    return Checkpoint(model.to(device), schedule.to(device), made_by, training)


def load_training(path: Path | str, device: torch.device | str) -> dict[str, Any]:
    """What --resume needs of a checkpoint: weights, ema, optimizer, step, seconds. Raises UserError if it is not there."""
    training = load(path, device).training
    if not {"weights", "ema", "optimizer", "step", "seconds"} <= training.keys():
        raise UserError(f"{path}: cannot be continued, it holds no optimizer state")
    return training


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
        raise UserError(f"--memory-timesteps {max(timesteps)}: the last timestep of {path} is {len(found.schedule) - 1}")
    return found
