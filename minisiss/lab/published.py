"""Published DDPM weights, in the directories that diffusers' UNet2DModel and DDPMScheduler
write."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minisiss.lab import files
from minisiss.lab.cli import UserError, rank
from minisiss.schedule import NoiseSchedule
from minisiss.unet import UNet, UNetConfig

WEIGHTS = "diffusion_pytorch_model"
# Fields of our UNetConfig: the arguments of diffusers' UNet2DModel.
NAMES = dict(
    image_size="sample_size", image_channels="in_channels", channels="block_out_channels",
    layers_per_block="layers_per_block", head_channels="attention_head_dim",
    norm_groups="norm_num_groups", norm_eps="norm_eps", downsample_padding="downsample_padding",
    flip_sin_to_cos="flip_sin_to_cos", freq_shift="freq_shift")
# The defaults of diffusers where they count; those in ONLY are all that our network does.
DEFAULTS = dict(
    in_channels=3, out_channels=3, block_out_channels=(224, 448, 672, 896), layers_per_block=2,
    attention_head_dim=8, norm_num_groups=32, norm_eps=1e-5, downsample_padding=1,
    flip_sin_to_cos=True, freq_shift=0,
    down_block_types=["DownBlock2D", *3 * ["AttnDownBlock2D"]],
    up_block_types=[*3 * ["AttnUpBlock2D"], "UpBlock2D"])
ONLY = dict(
    center_input_sample=False, time_embedding_type="positional", time_embedding_dim=None,
    mid_block_type="UNetMidBlock2D", mid_block_scale_factor=1, add_attention=True,
    attn_norm_num_groups=None, downsample_type="conv", upsample_type="conv",
    resnet_time_scale_shift="default", act_fn="silu", class_embed_type=None, num_class_embeds=None)
# These do not matter here; the last seven belong to an average of weights.
IGNORED = """
    sample_size dropout num_train_timesteps decay inv_gamma min_decay optimization_step power
    update_after_step use_ema_warmup""".split()
# Arguments of DDPMScheduler: those that make the schedule, and those for which we have one value.
BETAS = dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02)
LINEAR = dict(
    beta_schedule="linear", trained_betas=None, rescale_betas_zero_snr=False,
    prediction_type="epsilon")
# Our names of parameters to those of diffusers, in this order; then to those of old checkpoints.
RENAMES = [
    (r"^time\.0", "time_embedding.linear_1"),
    (r"^time\.2", "time_embedding.linear_2"),
    (r"^(down|up)\.(\d+)\.blocks\.(\d+)\.0", r"\1_blocks.\2.resnets.\3"),
    (r"^(down|up)\.(\d+)\.blocks\.(\d+)\.1", r"\1_blocks.\2.attentions.\3"),
    (r"^(down|up)\.(\d+)\.(down|up)sample", r"\1_blocks.\2.\3samplers.0"),
    (r"^middle\.0", "mid_block.resnets.0"), (r"^middle\.1", "mid_block.attentions.0"),
    (r"^middle\.2", "mid_block.resnets.1"), (r"^norm_out", "conv_norm_out"),
    (r"\.time\.", ".time_emb_proj."), (r"\.skip\.", ".conv_shortcut."),
    (r"\.norm\.", ".group_norm."), (r"\.query\.", ".to_q."), (r"\.key\.", ".to_k."),
    (r"\.value\.", ".to_v."), (r"\.out\.", ".to_out.0."),
]
OLD_RENAMES = [
    (r"\.to_q\.", ".query."), (r"\.to_k\.", ".key."), (r"\.to_v\.", ".value."),
    (r"\.to_out\.0\.", ".proj_attn."),
]


def load(directory: Path) -> tuple[UNet, NoiseSchedule]:
    """Read a published DDPM, such as google/ddpm-celebahq-256, in float32 on the CPU.

    The network is in `directory`, or in its unet_ema/ (averaged weights), or else in its unet/:
    config.json with diffusion_pytorch_model.safetensors or .bin. The schedule is the nearest
    scheduler_config.json; without one it is assumed to be `NoiseSchedule.linear()`, and a line on
    stderr says so. Raises UserError for a model that our network cannot reproduce.
    """
    config = first_file(directory, directory / "unet_ema", directory / "unet", name="config.json")
    if config is None:
        raise UserError(f"{directory}: holds no model: no model.pt, no config.json of diffusers")
    folder = config.parent
    around = [folder, folder / "scheduler"]
    if folder.resolve().name in ("unet", "unet_ema"):  # a part of a pipeline
        around += [folder.resolve().parent, folder.resolve().parent / "scheduler"]
    scheduler = first_file(*around, name="scheduler_config.json")
    weights = weights_file(folder)
    path = config  # what is being read
    try:
        with torch.device("meta"):
            model = UNet(unet_config(read_json(path)))
        schedule = NoiseSchedule.linear()
        if scheduler:
            path = scheduler
            schedule = noise_schedule(read_json(path))
        path = weights
        files.load_weights(model, our_names(files.plain(read_weights(path)), model))
    except Exception as error:  # a damaged file can fail anywhere
        raise UserError(f"{path}: cannot be read: {files.in_short(error)}") from error
    if rank() == 0:
        assumed = "" if scheduler else "; a linear schedule is assumed, none is beside it"
        print(f"note: {folder}: these weights were read{assumed}", file=sys.stderr)
    return model, schedule


def first_file(*folders: Path, name: str) -> Path | None:
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def unet_config(published: dict[str, Any]) -> UNetConfig:
    """The UNetConfig of a config.json. Raises ValueError for what our network does not do."""
    values = DEFAULTS | ONLY | published
    down = values["down_block_types"]
    expected = ONLY | {
        "out_channels": values["in_channels"],
        "down_block_types": [name for name in down if name in ("DownBlock2D", "AttnDownBlock2D")],
        "up_block_types": [name.replace("Down", "Up") for name in reversed(down)]}
    for name, value in values.items():
        if value != expected.get(name, value):
            raise ValueError(f"{name} is {value}; expected {expected[name]}")
        if name not in {*DEFAULTS, *ONLY, *IGNORED} and not name.startswith("_"):
            raise ValueError(f"{name} is no argument of UNet2DModel that is known here")
    if len(down) != len(values["block_out_channels"]):
        raise ValueError(f"down_block_types are {len(down)}, not as many as block_out_channels")
    fields = {ours: values[theirs] for ours, theirs in NAMES.items()}
    fields["channels"] = tuple(fields["channels"])
    levels = [level for level, name in enumerate(down) if name == "AttnDownBlock2D"]
    return UNetConfig(attention_levels=tuple(levels), **fields)


def noise_schedule(published: dict[str, Any]) -> NoiseSchedule:
    """The schedule of a scheduler_config.json. Raises ValueError unless β is linear and predicts
    ε."""
    values = BETAS | LINEAR | {"_class_name": "DDPMScheduler"} | published
    if values["_class_name"] not in ("DDPMScheduler", "DDIMScheduler"):
        raise ValueError(f"the scheduler is a {values['_class_name']}")
    for name, expected in LINEAR.items():
        if values[name] != expected:
            raise ValueError(f"{name} of the scheduler is {values[name]}; expected {expected}")
    timesteps, first, last = (values[name] for name in BETAS)
    if timesteps not in range(1, 100_001):
        raise ValueError(f"num_train_timesteps of the scheduler is {timesteps}")
    return NoiseSchedule.linear(timesteps, first, last)


def weights_file(folder: Path) -> Path:
    """The folder's file of weights: the safe format where it can be read. Raises UserError."""
    safe, pickled = folder / f"{WEIGHTS}.safetensors", folder / f"{WEIGHTS}.bin"
    if safe.is_file() and importlib.util.find_spec("safetensors"):
        return safe
    if pickled.is_file():
        return pickled
    if safe.is_file():
        raise UserError(f'{safe}: to read it, pip install "minisiss[safetensors]"')
    raise UserError(f"{folder}: holds neither {safe.name} nor {pickled.name}")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors in a file of weights."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        files.refuse_pointer(path)
        return load_file(path)
    return dict(files.read_tensors(path))


def our_names(weights: dict[str, Tensor], model: UNet) -> dict[str, Tensor]:
    """The same weights under our names. A name that we do not know stays, and is refused later."""
    found = {}
    for ours, parameter in model.state_dict().items():
        theirs = rename(ours, RENAMES)
        if theirs not in weights:
            theirs = rename(theirs, OLD_RENAMES)
        if theirs not in weights:
            continue
        tensor = weights.pop(theirs)
        if tensor.shape == (*parameter.shape, 1, 1):  # the first attention was 1×1 convolutions
            tensor = tensor[..., 0, 0]
        found[ours] = tensor
    return found | weights


def rename(name: str, table: list[tuple[str, str]]) -> str:
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name
