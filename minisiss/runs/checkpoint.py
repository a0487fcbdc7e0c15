"""Checkpoints: one file with the network, its schedule and what made it."""

import json
import math
from argparse import Namespace
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minisiss.data.digits import ASSETS, MODELS
from minisiss.data.prompts import TOKENS, WORDS
from minisiss.errors import UserError, reading
from minisiss.machine.command_line import NONE
from minisiss.runs import files
from minisiss.runs.pretrained import is_published, load_pretrained
from minisiss.schedule import NoiseSchedule
from minisiss.unet import UNet, UNetConfig

FORMAT = "minisiss-1"
MOST_PARAMETERS = 10**9  # of a new network: with their average, gradients and AdamW's state 20 GB


@dataclass
class Checkpoint:
    """What `load` finds in a file."""

    model: UNet  # with the EMA weights where the file has them, otherwise the only weights
    schedule: NoiseSchedule
    made_by: dict[str, Any]  # what made it: script, settings, steps, seconds
    training: dict[str, Any]  # what --resume needs; empty in a checkpoint that is not to be continued
    memorised: dict[str, Tensor] = field(default_factory=dict)  # by prompts, [C, H, W] uint8 each

    @property
    def forgotten(self) -> list[str]:
        """The names of the pictures that this model has forgotten, or one that it was made from."""
        names, made_by = [], self.made_by
        while isinstance(made_by, dict):
            settings = made_by.get("settings")
            forget = settings.get("forget") if isinstance(settings, dict) else None
            if isinstance(forget, list) and ("method" in settings or settings.get("exclude_forget")):
                names += [name for name in forget if isinstance(name, str)]
            made_by = made_by.get("base")
        return names


def save(
        path: Path | str, model: UNet, schedule: NoiseSchedule, made_by: dict[str, Any],
        ema: dict[str, Tensor] | None = None, training: dict[str, Any] | None = None,
        memorised: dict[str, Tensor] | None = None) -> None:
    """Write a checkpoint, atomically: whatever happens, `path` is the old file or the new one."""
    state = {
        "format": FORMAT, "config": asdict(model.config), "weights": model.state_dict(), "ema": ema,
        "schedule": vars(schedule), "made_by": made_by, "training": training or {},
        "memorised": memorised or {}}
    files.write_atomically(Path(path), lambda file: torch.save(state, file))


def load(path: Path | str, device: torch.device | str = "cpu") -> Checkpoint:
    """Read a checkpoint, of anyone. Raises UserError, naming the file, for what is no whole one of ours."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint")
    with reading(path, "checkpoint"):
        state = files.read_tensors(path)
    if type(state) is not dict or state.get("format") != FORMAT:
        raise UserError(f"{path}: not a minisiss checkpoint (its format is not '{FORMAT}')")
    try:
        for part in ("config", "weights", "ema", "schedule", "made_by", "training"):
            if not isinstance(state.get(part), dict) and (part != "ema" or state.get(part) is not None):
                raise ValueError(f"its {part} is missing, or no dict")
        with torch.device("meta"):  # names and shapes only: memory comes when all of them fit
            model = UNet(UNetConfig(**state["config"]))
        shapes = {name: value.shape for name, value in model.state_dict().items()}
        weights, ema = files.unwrapped(state["weights"]), files.unwrapped(state.get("ema") or {})
        for tensors in (weights, ema) if ema else (weights,):
            files.check_tensors(path, tensors, shapes)
        model.to_empty(device=device).load_state_dict(ema or weights)
        schedule = checked_schedule(state["schedule"]).to(device)
        # Reports show what made it, which should be a little JSON: lists in each other can be endless JSON.
        if any(count > 100_000 for count, _ in enumerate(json.JSONEncoder().iterencode(state["made_by"]))):
            raise ValueError("its made_by is too long")
        training = state["training"] and {**state["training"], "weights": weights, "ema": ema}
        memorised = checked_pictures(state.get("memorised", {}), model.config, Path(path).stat().st_size)
        return Checkpoint(model, schedule, state["made_by"], training, memorised)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: the checkpoint does not fit together: {reason}") from error


def checked_schedule(values: dict[str, Tensor]) -> NoiseSchedule:
    """The schedule in a file: β between 0 and 1, and what follows from them. Raises an error otherwise."""
    betas = values.get("betas")
    row = isinstance(betas, Tensor) and betas.ndim == 1 and 0 < len(betas) <= files.MOST_TIMESTEPS
    if not row or not 0 < betas.min() <= betas.max() < 1:
        most = files.MOST_TIMESTEPS
        raise ValueError(f"its schedule's betas should be 1 to {most:,} numbers between 0 and 1")
    expected = vars(NoiseSchedule.from_betas(betas))
    if values.keys() != expected.keys():
        raise ValueError(f"its schedule should hold {', '.join(expected)}")
    for name, value in values.items():
        same = isinstance(value, Tensor) and (value.shape, value.dtype) == (betas.shape, torch.float32)
        if not same or not torch.allclose(value, expected[name], rtol=1e-3, atol=0):
            raise ValueError(f"its schedule's {name} do not follow from its betas")
    return NoiseSchedule(**{name: value.clone() for name, value in values.items()})  # no views of the file


def checked_pictures(memorised: Any, config: UNetConfig, size: int) -> dict[str, Tensor]:
    """The pictures in a file of so many bytes, by their prompts. Raises ValueError where they are none."""
    if config.vocabulary not in (0, len(WORDS)):
        raise ValueError(f"its vocabulary has {config.vocabulary} words; expected {len(WORDS)}")
    if type(memorised) is not dict or len(memorised) * math.prod(config.image_shape) > size:
        raise ValueError("its memorised should be a dict of pictures by prompts")
    for prompt, image in memorised.items():
        if type(prompt) is not str or not set(prompt.split()) <= TOKENS.keys():
            raise ValueError(f"its memorised prompt '{str(prompt)[:80]}' is not of words in the vocabulary")
        if not isinstance(image, Tensor) or (*image.shape, image.dtype) != (*config.image_shape, torch.uint8):
            raise ValueError(f"its memorised picture of '{prompt[:80]}' is none of the network's")
    return {prompt: image.clone() for prompt, image in memorised.items()}  # no views of the file


def load_training(path: Path | str, model: UNet, steps: int) -> dict[str, Any]:
    """What --resume needs: weights, ema (can be empty), step, seconds and moments, AdamW's state.

    Raises UserError if it is not there, is for another network than `model`, or is past `steps`.
    """
    found, refused = load(path), f"{path}: cannot be continued,"
    training = found.training
    if not {"optimizer", "step", "seconds"} <= training.keys() or not isinstance(training["optimizer"], dict):
        raise UserError(f"{refused} it holds no optimizer state")
    if found.model.config != model.config:
        raise UserError(f"{refused} its network is not the one in the config.json beside it")
    step, seconds = training["step"], training["seconds"]
    if type(step) is not int or type(seconds) is not float or step < 0 or not 0 <= seconds < float("inf"):
        raise UserError(f"{refused} its steps and seconds are no numbers of steps and seconds")
    if step > steps:
        raise UserError(f"--steps {steps}: {path} has taken {step} already")
    try:
        moments = {place: dict(tensors) for place, tensors in training["optimizer"]["state"].items()}
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{refused} its optimizer state is none of AdamW's") from error

    def by_name(state: dict[int, dict[str, Any]]) -> dict[str, Any]:
        return {f"{name} of parameter {i}": value for i, of in state.items() for name, value in of.items()}

    if moments or step:
        sizes = enumerate(parameter.shape for parameter in model.parameters())
        shapes = {i: {"step": torch.Size(), "exp_avg": size, "exp_avg_sq": size} for i, size in sizes}
        files.check_tensors(path, by_name(moments), by_name(shapes))
    # Each in memory of its own, as the optimizer works in place.
    clones = {place: {name: value.clone() for name, value in of.items()} for place, of in moments.items()}
    return training | {"moments": clones}


def load_any(path: str, timesteps: list[int], device: torch.device) -> Checkpoint:
    """Read a model for use at these timesteps. Raises UserError where its schedule is shorter.

    path: a checkpoint, the directory of a published model, or one of `MODELS`, in assets/.
    """
    if path not in MODELS and Path(path).is_dir():
        if (model := Path(path, "model.pt")).is_file() and not is_published(path):
            raise UserError(f"{path}: is the directory of a run; give {model}")
        model, schedule = load_pretrained(path)
        found = Checkpoint(model.to(device), schedule.to(device), made_by={"published": path}, training={})
    else:
        found = load(ASSETS / MODELS[path] if path in MODELS else path, device)
    if (most := max(timesteps)) > (last := len(found.schedule) - 1):
        raise UserError(f"--memory-timesteps {most}: the last timestep of {path} is {last}")
    return found


def untrained(args: Namespace) -> UNet:
    """The network that the flags describe, before its first step. Raises UserError for one that cannot be."""
    try:
        config = UNetConfig(**{field.name: getattr(args, field.name) for field in fields(UNetConfig)})
    except ValueError as error:
        raise UserError(error) from error
    if config.vocabulary != (words := len(WORDS) if args.data == "prompts" else 0):
        raise UserError(f"--vocabulary {config.vocabulary}: --data {args.data} has {words} words")
    with torch.device("meta"):  # counts without taking memory
        count = sum(parameter.numel() for parameter in UNet(config).parameters())
    if count > MOST_PARAMETERS:
        what = f"a network of {count:,} parameters; here it may have {MOST_PARAMETERS:,}"
        raise UserError(f"--channels, --layers-per-block: {what}")
    torch.manual_seed(args.seed)
    model = UNet(config)
    model.checkpoint_activations = args.checkpoint_activations
    if args.init != NONE:
        begun = load_any(args.init, [0], torch.device("cpu")).model
        if begun.config not in (config, replace(config, vocabulary=0)):
            raise UserError(f"--init {args.init}: its network is another one, by more than a new vocabulary")
        model.load_state_dict(model.state_dict() | begun.state_dict())
    return model
