"""Published DDPM weights, in the directories that diffusers' UNet2DModel and DDPMScheduler read and write."""

import importlib.util
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from minisiss import unet
from minisiss.errors import UserError, rank, reading
from minisiss.runs.files import MOST_TIMESTEPS, check_tensors, read_tensors, unwrapped
from minisiss.schedule import NoiseSchedule
from minisiss.unet import UNet, UNetConfig

WEIGHTS = "diffusion_pytorch_model"
NETWORKS = ["unet_ema", "unet"]  # where a pipeline, or a checkpoint of a training, can have its network
# Arguments of their UNet2DModel: (our field of `UNetConfig`, their default where a config leaves it out);
FIELDS = {
    "sample_size": ("image_size", None), "in_channels": ("image_channels", 3),
    "block_out_channels": ("channels", [224, 448, 672, 896]), "layers_per_block": ("layers_per_block", 2),
    "attention_head_dim": ("head_channels", 8), "norm_num_groups": ("norm_groups", 32),
    "norm_eps": ("norm_eps", 1e-5), "downsample_padding": ("downsample_padding", 1),
    "flip_sin_to_cos": ("flip_sin_to_cos", True), "freq_shift": ("freq_shift", 0)}
# those that follow from our fields, or do not matter here (the last nine, seven of EMAModel), defaults;
OTHERS = {
    "out_channels": 3, "down_block_types": ["DownBlock2D"] + 3 * ["AttnDownBlock2D"],
    "up_block_types": 3 * ["AttnUpBlock2D"] + ["UpBlock2D"], "dropout": 0.0, "num_train_timesteps": None,
    "decay": None, "inv_gamma": None, "min_decay": None, "optimization_step": None, "power": None,
    "update_after_step": None, "use_ema_warmup": None}
# and those for which we have one value, which is also their default.
ONLY = {
    "_class_name": "UNet2DModel", "center_input_sample": False, "time_embedding_type": "positional",
    "time_embedding_dim": None, "mid_block_type": "UNetMidBlock2D", "mid_block_scale_factor": 1,
    "add_attention": True, "attn_norm_num_groups": None, "downsample_type": "conv", "upsample_type": "conv",
    "resnet_time_scale_shift": "default", "act_fn": "silu", "class_embed_type": None,
    "num_class_embeds": None}
# Of their DDPMScheduler, whose further arguments are about sampling: defaults, and those with one value.
BETAS = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}
LINEAR = {
    "beta_schedule": "linear", "trained_betas": None, "rescale_betas_zero_snr": False,
    "prediction_type": "epsilon"}

# Our parameter names to theirs, in this order.
RENAMES = [
    (r"^time\.0", "time_embedding.linear_1"), (r"^time\.2", "time_embedding.linear_2"),
    (r"^(down|up)\.(\d+)\.blocks\.(\d+)\.0", r"\1_blocks.\2.resnets.\3"),
    (r"^(down|up)\.(\d+)\.blocks\.(\d+)\.1", r"\1_blocks.\2.attentions.\3"),
    (r"^(down|up)\.(\d+)\.(down|up)sample", r"\1_blocks.\2.\3samplers.0"),
    (r"^middle\.0", "mid_block.resnets.0"), (r"^middle\.1", "mid_block.attentions.0"),
    (r"^middle\.2", "mid_block.resnets.1"), (r"^norm_out", "conv_norm_out"),
    (r"\.time\.", ".time_emb_proj."), (r"\.skip\.", ".conv_shortcut."), (r"\.norm\.", ".group_norm."),
    (r"\.(query|key|value)\.", lambda match: f".to_{match[1][0]}."), (r"\.out\.", ".to_out.0.")]
# Their attention's names to those in which the first checkpoints were uploaded.
OLD_NAMES = [
    (r"\.to_q\.", ".query."), (r"\.to_k\.", ".key."), (r"\.to_v\.", ".value."),
    (r"\.to_out\.0\.", ".proj_attn.")]


def rename(name: str, table: list) -> str:
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name


def load_pretrained(directory: Path | str) -> tuple[UNet, NoiseSchedule]:
    """Read a published DDPM, such as google/ddpm-celebahq-256: network, in float32 on the CPU, and schedule.

    `directory`, its unet_ema/ or else its unet/ holds config.json and diffusion_pytorch_model.safetensors or
    .bin. The schedule is that of a scheduler_config.json there, beside unet/, also if that is `directory`, or
    in scheduler/ in one of these; without one, `NoiseSchedule.linear()`. A line on stderr says that this is
    assumed, and another which weights were read, where there are averaged ones. Raises UserError, naming the
    file and the value, key or shape, for a model that our UNet cannot reproduce, and for a link that leads
    out of `directory`, or out of the folder with the schedule beside it.
    """
    directory = Path(directory)
    if not directory.name.strip("."):  # "." has neither a name nor a parent
        directory = directory.resolve()
    folders = directory, *(directory / name for name in NETWORKS)
    folder = next((f for f in folders if (f / "config.json").is_file()), None)
    if folder is None:
        raise UserError(f"{directory}: holds no published model (no config.json in it or in its unet/)")
    pipeline = folder.parent if folder.name in NETWORKS else folder

    def inside(path: Path) -> Path:
        root = directory if path.is_relative_to(directory) else pipeline
        if not path.resolve().is_relative_to(root.resolve()):
            raise UserError(f"{path}: is a link out of {root}; put a copy of the file there")
        return path

    config = read_json(inside(folder / "config.json"), unet_config)
    places = [place / "scheduler_config.json" for f in (folder, pipeline) for place in (f, f / "scheduler")]
    scheduler = next((place for place in places if place.is_file()), None)
    schedule = read_json(inside(scheduler), noise_schedule) if scheduler else NoiseSchedule.linear()
    with torch.device("meta"):  # names and shapes only: memory comes when all of them fit
        model = UNet(config)
    weights = read_weights(inside(weights_file(folder)), model)
    model.to_empty(device="cpu").load_state_dict(weights)
    averaged = pipeline / "unet_ema"
    if folder == averaged:
        say(f"{folder}: these weights were read, which are averaged")
    elif (averaged / "config.json").is_file():
        say(f"{folder}: these weights were read; the averaged ones are in {averaged}")
    if not scheduler:
        assumed = "linear, {:g} to {:g} in {} timesteps".format(*schedule.betas[[0, -1]], len(schedule))
        say(f"{folder}: no scheduler_config.json in it or beside it; the schedule is assumed to be {assumed}")
    return model, schedule


@cache  # eval.py reads a model twice
def say(what: str) -> None:
    """A note on stderr, of rank 0 alone, and only once."""
    if rank() == 0:
        tqdm.write(f"note: {what}", file=sys.stderr)


def save_pretrained(directory: Path | str, model: UNet, schedule: NoiseSchedule) -> None:
    """Write a model that `load_pretrained`, and diffusers, can read: all of it or, if that fails, nothing.

    Raises UserError if `directory` already holds something, if the schedule is not linear, or if the model
    takes prompts: theirs have one embedding a class, and no MLP behind it.
    """
    directory, config = Path(directory), model.config
    if config.vocabulary:
        raise UserError(f"{directory}: a model that takes prompts cannot be saved in this form")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory}: already exists; name a new directory to save the model in")
    # A float32's shortest decimal is what the schedule was made from: 0.0001, not 9.9999997e-05.
    start, end = (float(str(beta)) for beta in schedule.betas[[0, -1]].cpu().numpy())
    if not torch.allclose(torch.linspace(start, end, len(schedule)), schedule.betas.cpu(), rtol=1e-4, atol=0):
        raise UserError(f"{directory}: a schedule that is not linear cannot be saved in this form")
    values = {
        "_class_name": "UNet2DModel", **{name: getattr(config, ours) for name, (ours, _) in FIELDS.items()},
        "out_channels": config.image_channels, **block_types(config)}
    betas = {
        "_class_name": "DDPMScheduler", "num_train_timesteps": len(schedule), "beta_start": start,
        "beta_end": end, "beta_schedule": "linear"}
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as temporary:
        new = Path(temporary) / "new"
        new.mkdir()
        (new / "config.json").write_text(json.dumps(values, indent=2) + "\n")
        (new / "scheduler_config.json").write_text(json.dumps(betas, indent=2) + "\n")
        # Not .safetensors: writing .bin needs nothing but torch, and every version of diffusers reads it.
        weights = {rename(name, RENAMES): tensor.cpu() for name, tensor in model.state_dict().items()}
        torch.save(weights, new / f"{WEIGHTS}.bin")
        os.replace(new, directory)


def block_types(config: UNetConfig) -> dict[str, list[str]]:
    """Their names for our levels; the way up mirrors the way down."""
    levels = range(len(config.channels))
    down = ["AttnDownBlock2D" if level in config.attention_levels else "DownBlock2D" for level in levels]
    up = [name.replace("Down", "Up") for name in reversed(down)]
    return {"down_block_types": down, "up_block_types": up}


def expect(fits: bool, name: str, value: Any, wanted: str) -> None:
    """Raises ValueError for a value that we cannot reproduce."""
    if not fits:
        raise ValueError(f"{name} is {json.dumps(value)[:120]}; expected {wanted}")


def unet_config(published: dict[str, Any]) -> UNetConfig:
    """The UNetConfig of a config.json. Raises ValueError for what our UNet does not do."""
    defaults = {name: default for name, (_, default) in FIELDS.items()}
    values = {**ONLY, **defaults, **OTHERS, "_class_name": None, **published}
    for name, value in values.items():
        if name in ONLY:
            expect(value == ONLY[name], name, value, json.dumps(ONLY[name]))
        elif name in FIELDS:
            wanted = unet.expected(FIELDS[name][0], value)
            expect(not wanted, name, value, wanted)
        elif name not in OTHERS and not name.startswith("_"):
            raise ValueError(f"{name} is no argument of UNet2DModel that minisiss knows")
    channels, out, down = values["in_channels"], values["out_channels"], values["down_block_types"]
    expect(type(out) is int and out == channels, "out_channels", out, f"in_channels, {channels}")
    expect(isinstance(down, list), "down_block_types", down, "a list")
    attention = [level for level, name in enumerate(down) if name == "AttnDownBlock2D"]
    fields = {ours: values[name] for name, (ours, _) in FIELDS.items()}
    config = UNetConfig(attention_levels=attention, **fields)
    for name, types in block_types(config).items():
        expect(values[name] == types, name, values[name], json.dumps(types))
    return config


def noise_schedule(published: dict[str, Any]) -> NoiseSchedule:
    """The schedule of a scheduler_config.json. Raises ValueError unless it is linear, for predicting ε."""
    values = {"_class_name": "DDPMScheduler", **BETAS, **LINEAR, **published}
    kind, timesteps, start, end = (values[name] for name in ("_class_name", *BETAS))
    expect(kind in ("DDPMScheduler", "DDIMScheduler"), "_class_name", kind, "DDPMScheduler or DDIMScheduler")
    for name, value in LINEAR.items():
        expect(values[name] == value, name, values[name], json.dumps(value))
    few = type(timesteps) is int and 1 <= timesteps <= MOST_TIMESTEPS
    expect(few, "num_train_timesteps", timesteps, f"an integer from 1 to {MOST_TIMESTEPS}")
    expect(type(start) is float, "beta_start", start, "a float")
    expect(type(end) is float, "beta_end", end, "a float")
    return NoiseSchedule.linear(timesteps, start, end)


def read_json(path: Path, parse: Callable[[dict[str, Any]], Any]) -> Any:
    """`parse` of the JSON object in a file. Raises UserError, with the file, for what either finds wrong."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("should hold one JSON object")
        return parse(values)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: {error}") from error


def is_published(directory: Path | str) -> bool:
    """Whether a directory has weights in this format, readable or not. Runs have a config.json too."""
    return any(any(Path(directory, name).glob(f"{WEIGHTS}*")) for name in ("", *NETWORKS))


def weights_file(folder: Path) -> Path:
    """The file of weights in `folder`, the safe one if it can be read. Raises UserError if there is none."""
    safe, pickled = folder / f"{WEIGHTS}.safetensors", folder / f"{WEIGHTS}.bin"
    installed = importlib.util.find_spec("safetensors")
    if not safe.is_file() and not pickled.is_file():
        what = f"neither {safe.name} nor {pickled.name}"
        others = rf"{WEIGHTS}[\w.-]+\.(safetensors|bin|index[\w.]*\.json)"
        if other := min(filter(re.compile(others).fullmatch, os.listdir(folder)), default=None):
            part = re.search(r"-of-|\.index\.", other)
            mend = "save it as one file" if part else f"copy it to {WEIGHTS}{Path(other).suffix}"
            what = f"{other} is {'one part of a model' if part else 'a variant'}, which is not read: {mend}"
        raise UserError(f"{folder}: holds no weights ({what})")
    if not pickled.is_file() and not installed:
        raise UserError(f'{safe}: reading it needs an optional extra: pip install "minisiss[safetensors]"')
    return safe if safe.is_file() and installed else pickled


def read_weights(path: Path, model: UNet) -> dict[str, Tensor]:
    """The weights in a file under our names: those of `model` in its shapes. Raises UserError otherwise."""
    with reading(path, "file of weights"):
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = unwrapped(load_file(path))
        else:
            state = unwrapped(read_tensors(path))
    names, shapes = {}, {}  # ours: theirs, and theirs: shape
    for ours, parameter in model.state_dict().items():
        theirs = rename(ours, RENAMES)
        if theirs not in state and (old := rename(theirs, OLD_NAMES)) in state:
            theirs = old
        tensor = state.get(theirs)
        if isinstance(tensor, Tensor) and tensor.shape == (*parameter.shape, 1, 1):
            state[theirs] = tensor[..., 0, 0]  # the oldest attention: linear layers as 1×1 convolutions
        names[ours], shapes[theirs] = theirs, parameter.shape
    check_tensors(path, state, shapes)
    return {ours: state[theirs] for ours, theirs in names.items()}
