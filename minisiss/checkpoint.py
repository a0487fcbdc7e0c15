"""Checkpoints: one file with the network, its schedule and what made it."""

import os
import tempfile
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minisiss.cli import UserError
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
        "betas": schedule.betas,
        "made_by": made_by,
        "training": training or {},
    }
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load(path: Path | str, device: torch.device | str = "cpu") -> Checkpoint:
    """Read a checkpoint. Raises UserError, naming the file, for anything that is not a whole checkpoint of ours."""
    try:
        with warnings.catch_warnings():  # torch warns on its way to an error of its own; one line is enough
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such checkpoint") from error
    except IsADirectoryError as error:
        raise UserError(f"{path}: is a directory; a checkpoint is a file such as {Path(path) / 'model.pt'}") from error
    except Exception as error:  # a damaged file can fail anywhere in torch's readers
        raise UserError(f"{path}: not a readable checkpoint (truncated, damaged, or of another program)") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path}: not a minisiss checkpoint (its format is not '{FORMAT}')")
    try:
        model = UNet(UNetConfig(**state["config"]))
        model.load_state_dict(state["ema"] or state["weights"])
        schedule = NoiseSchedule.from_betas(state["betas"])
        made_by, training = state["made_by"], state["training"]
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"{path}: the checkpoint does not fit together: {str(error).splitlines()[0]}") from error
    if training:
        training["weights"], training["ema"] = state["weights"], state["ema"]
    return Checkpoint(model.to(device), schedule.to(device), made_by, training)
