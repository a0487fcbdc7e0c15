"""Checkpoints: one file with the network, its schedule, and what made it.

A file may come from a stranger: nothing in it is run, and whatever is wrong with it is one
UserError.
"""

import zlib
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

BUNDLED = {"bundled": "mnist-small.pt", "bundled-prompts": "prompts.pt"}  # in assets/


@dataclass
class Checkpoint:
    """What a checkpoint holds."""

    model: UNet  # with the averaged weights
    schedule: NoiseSchedule
    made_by: dict[str, Any]  # script, settings, steps, seconds
    memorised: dict[str, Tensor] = field(default_factory=dict)  # by prompt, [C, H, W] uint8
    forgotten: list[str] = field(default_factory=list)  # names of pictures, by this run or before
    training: dict[str, Any] = field(default_factory=dict)  # what a resumed run needs


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint. Whatever happens, `path` is the old file or the new one."""
    model, schedule = checkpoint.model, checkpoint.schedule
    state = vars(checkpoint) | {"config": asdict(model.config), "weights": model.state_dict(),
                                "schedule": {"betas": schedule.betas}}
    del state["model"]
    files.write_atomically(path, lambda file: torch.save(state, file))


def load(path: Path | str, device: torch.device | str = "cpu") -> Checkpoint:
    """Read a checkpoint. Raises UserError, naming the file, for what is no whole one of ours."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        state = files.read_tensors(path)
        # On "meta" a network has names and shapes, and takes no memory before the weights fit it.
        with torch.device("meta"):
            model = UNet(UNetConfig(**state["config"]))
        files.load_weights(model, files.plain(state.get("ema") or state["weights"]))
        return Checkpoint(
            model.to(device),
            NoiseSchedule.from_betas(state["schedule"]["betas"]).to(device),
            dict(state["made_by"]), dict(state.get("memorised", {})),
            list(state.get("forgotten", [])), dict(state["training"]))
    except Exception as error:  # a damaged file can fail anywhere
        raise UserError(f"{path}: not a readable checkpoint ({files.in_short(error)})") from error


@torch.no_grad()
def check_output(model: UNet, schedule: NoiseSchedule) -> None:
    """Raises FloatingPointError for a model whose output is not finite: its samples look black."""
    timesteps = torch.arange(0, len(schedule), -(-len(schedule) // 4), device=schedule.gamma.device)
    generator = torch.Generator(timesteps.device).manual_seed(0)
    shape = len(timesteps), *model.config.image_shape
    noise = torch.randn(shape, generator=generator, device=timesteps.device)
    if not model(noise, timesteps).isfinite().all():
        raise FloatingPointError("the output of the model is not finite")


def load_any(name: str, device: torch.device | str = "cpu",
             timesteps: list[int] | None = None) -> Checkpoint:
    """Read a model: 'bundled', a checkpoint, a run's directory, or the directory of a published
    one.

    timesteps: those it is used at. Raises UserError where its schedule is shorter.
    """
    path = ASSETS / BUNDLED[name] if name in BUNDLED else Path(name)
    if (path / "model.pt").is_file():
        path = path / "model.pt"
    if path.is_dir():
        model, schedule = published.load(path)
        checkpoint = Checkpoint(model.to(device), schedule.to(device), {"published": name})
    else:
        checkpoint = load(path, device)
    last = len(checkpoint.schedule) - 1
    if max(timesteps or [0]) > last:
        raise UserError(f"--memory-timesteps: the last timestep of {name} is {last}")
    return checkpoint


def digest_of(model: UNet) -> int:
    """A number that is the same for the same weights."""
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return zlib.crc32(weights.cpu().numpy())


def find_models(names: list[str], device: torch.device,
                timesteps: list[int]) -> tuple[dict[str, Checkpoint], list[UserError]]:
    """The models of finished runs, each model once, and what is wrong with the other names."""
    models, errors, seen = {}, [], {}
    for name in names:
        if Path(name, "results.md").exists():  # runs/*/ matches earlier evaluations too
            continue
        try:
            found = load_any(name, device, timesteps)
            check_output(found.model, found.schedule)
            steps, settings = found.made_by.get("steps"), found.made_by.get("settings", {})
            if settings.get("data") == "prompts":
                raise UserError(f"{name}: a run on prompts; unlearn.py has shown what it gives")
            if steps is not None and steps < settings.get("steps", steps):
                raise UserError(f"{name}: was stopped at step {steps}; --resume it first")
            first = next(iter(models.values()), found).model.config.image_shape
            if found.model.config.image_shape != first:
                raise UserError(f"{name}: makes images of another size than the first model")
            digest = digest_of(found.model)
            if digest in seen:
                raise UserError(f"{name}: is the same model as {seen[digest]}, and counts once")
            seen[digest] = name
            models[name.rstrip("/")] = found
        except (UserError, FloatingPointError) as error:
            words = str(error) if name in str(error) else f"{name}: {error}"
            errors.append(UserError(words))
    return models, errors
