"""Checkpoints. A file from a stranger runs no code; whatever is wrong with it is one UserError."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minisiss.lab import files, published
from minisiss.lab.cli import UserError
from minisiss.lab.data import ASSETS
from minisiss.schedule import NoiseSchedule
from minisiss.unet import UNet, UNetConfig

BUNDLED = {"bundled": ASSETS / "mnist-small.pt", "bundled-prompts": ASSETS / "prompts.pt"}


@dataclass
class Checkpoint:
    """What a checkpoint holds."""

    model: UNet  # with the averaged weights
    schedule: NoiseSchedule
    made_by: dict[str, Any]  # settings, steps
    memorised: dict[str, Tensor] = field(default_factory=dict)  # by prompt, [C, H, W] uint8
    forgotten: list[str] = field(default_factory=list)  # names of pictures
    training: dict[str, Any] = field(default_factory=dict)  # what a resumed run needs


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint. Whatever happens, `path` is the old file or the new one."""
    model = checkpoint.model
    state = vars(checkpoint) | {"config": asdict(model.config), "weights": model.state_dict()}
    state["schedule"] = {"betas": checkpoint.schedule.betas}
    del state["model"]
    files.write_atomically(path, lambda file: torch.save(state, file))


def load(path: Path | str, device: torch.device | str = "cpu") -> Checkpoint:
    """Read a checkpoint. Raises UserError, naming the file, where it is damaged or foreign."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint")
    with files.reading(path):
        state = files.read_tensors(path)
        # On "meta" a network has names and shapes, and takes no memory before the weights fit it.
        with torch.device("meta"):
            model = UNet(UNetConfig(**state["config"]))
        files.load_weights(model, state["weights"])
        schedule = NoiseSchedule.from_betas(state["schedule"]["betas"])
        return Checkpoint(
            model.to(device), schedule.to(device), dict(state["made_by"]),
            dict(state.get("memorised", {})), list(state.get("forgotten", [])),
            dict(state["training"]))


def load_any(name: str, device: torch.device | str = "cpu",
             timesteps: Sequence[int] = (0,)) -> Checkpoint:
    """Read 'bundled', a checkpoint, or the directory of a run or of a published model. Raises
    UserError where its schedule ends before the timesteps that it is used at."""
    path = BUNDLED.get(name, Path(name))
    if (path / "model.pt").is_file():
        path = path / "model.pt"
    if path.is_dir():
        model, schedule = published.load(path)
        checkpoint = Checkpoint(model.to(device), schedule.to(device), {"published": name})
    else:
        checkpoint = load(path, device)
    last = len(checkpoint.schedule) - 1
    if max(timesteps) > last:
        raise UserError(f"--memory-timesteps: the last timestep of {name} is {last}")
    return checkpoint


def load_finished(name: str, device: torch.device, timesteps: list[int]) -> Checkpoint:
    """As `load_any`. Raises UserError for a run that was stopped too, and for one on prompts."""
    found = load_any(name, device, timesteps)
    settings, steps = found.made_by.get("settings", {}), found.made_by.get("steps", 0)
    if settings.get("data") == "prompts":
        raise UserError(f"{name}: a run on prompts; unlearn.py has shown what it gives")
    if steps < settings.get("steps", 0):
        raise UserError(f"{name}: was stopped at step {steps}; --resume it first")
    found.training = {}  # takes three times the memory of the weights
    return found
