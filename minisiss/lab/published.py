"""Published DDPMs, in the directories that diffusers' UNet2DModel and DDPMScheduler write."""

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

# Arguments of UNet2DModel, and the fields of our UNetConfig that have their values.
FIELDS = dict(
    sample_size="image_size", in_channels="image_channels",
    block_out_channels="channels", layers_per_block="layers_per_block",
    attention_head_dim="head_channels", norm_num_groups="norm_groups",
    norm_eps="norm_eps", downsample_padding="downsample_padding",
    flip_sin_to_cos="flip_sin_to_cos", freq_shift="freq_shift")
# Arguments for which our network has one value.
FIXED = dict(
    center_input_sample=False, time_embedding_type="positional", time_embedding_dim=None,
    mid_block_type="UNetMidBlock2D", mid_block_scale_factor=1, add_attention=True,
    attn_norm_num_groups=None, downsample_type="conv", upsample_type="conv", act_fn="silu",
    resnet_time_scale_shift="default", class_embed_type=None, num_class_embeds=None)
# These do not change what the network predicts; the last seven are of an average of weights.
IGNORED = """
    dropout num_train_timesteps decay inv_gamma min_decay optimization_step power update_after_step
    use_ema_warmup""".split()
# Arguments of DDPMScheduler for which our schedule has one value.
FIXED_SCHEDULE = dict(
    beta_schedule="linear", trained_betas=None, rescale_betas_zero_snr=False,
    prediction_type="epsilon")
# Parts of diffusers' names of parameters, and what they are in our names. Old names come last.
RENAMES = {
    r"time_embedding\.linear_1": "time.0", r"time_embedding\.linear_2": "time.2",
    r"_blocks\.(\d+)\.resnets\.(\d+)": r".\1.blocks.\2.0",
    r"_blocks\.(\d+)\.attentions\.(\d+)": r".\1.blocks.\2.1",
    r"_blocks\.(\d+)\.(down|up)samplers\.0": r".\1.\2sample",
    r"mid_block\.resnets\.0": "middle.0", r"mid_block\.resnets\.1": "middle.2",
    r"mid_block\.attentions\.0": "middle.1", "conv_norm_out": "norm_out",
    "time_emb_proj": "time", "conv_shortcut": "skip", "group_norm": "norm",
    "to_q": "query", "to_k": "key", "to_v": "value",
    r"to_out\.0": "out", "proj_attn": "out",
}


def load(directory: Path) -> tuple[UNet, NoiseSchedule]:
    """Read a published DDPM in float32 on the CPU: the network in `directory`, its unet_ema/
    (averaged weights) or its unet/, and the nearest scheduler_config.json. Raises UserError."""
    config = first_file("config.json", directory, directory / "unet_ema", directory / "unet")
    if config is None:
        raise UserError(f"{directory}: holds no model: no model.pt, no config.json of diffusers")
    folder = pipeline = config.parent
    if folder.resolve().name in ("unet", "unet_ema"):
        pipeline = folder.resolve().parent
    with files.reading(config), torch.device("meta"):
        model = UNet(unet_config(json.loads(config.read_bytes())))

    scheduler = first_file("scheduler_config.json", folder, pipeline, pipeline / "scheduler")
    if scheduler:
        with files.reading(scheduler):
            schedule = noise_schedule(json.loads(scheduler.read_bytes()))
    else:
        schedule = NoiseSchedule.linear()
        if rank() == 0:
            print(f"note: {folder}: has no schedule; a linear one is assumed", file=sys.stderr)

    weights = folder / "diffusion_pytorch_model.bin"
    if not weights.is_file():
        weights = weights.with_suffix(".safetensors")
    with files.reading(weights):
        files.load_weights(model, read_weights(weights))
    return model, schedule


def first_file(name: str, *folders: Path) -> Path | None:
    """The file of this name in the first of the folders that has one."""
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def unet_config(published: dict[str, Any]) -> UNetConfig:
    """The UNetConfig of a config.json. Raises ValueError for what our network does not do."""
    blocks = ("DownBlock2D", "AttnDownBlock2D")
    down = [name for name in published["down_block_types"] if name in blocks]
    fixed = FIXED | dict(
        down_block_types=down,
        up_block_types=[name.replace("Down", "Up") for name in reversed(down)],
        out_channels=published["in_channels"])
    for name, value in published.items():
        ignored = name in FIELDS or name in IGNORED or name.startswith("_")
        same = name in fixed and value == fixed[name]
        if not ignored and not same:
            raise ValueError(f"{name} = {value} is not supported")
    attention_levels = [level for level, name in enumerate(down) if name == "AttnDownBlock2D"]
    fields = {ours: published[theirs] for theirs, ours in FIELDS.items()}
    fields["channels"] = tuple(fields["channels"])
    return UNetConfig(attention_levels=tuple(attention_levels), **fields)


def noise_schedule(published: dict[str, Any]) -> NoiseSchedule:
    """The schedule of a scheduler_config.json. Raises ValueError for what ours does not do."""
    for name, value in FIXED_SCHEDULE.items():
        if published.get(name, value) != value:
            raise ValueError(f"{name} = {published[name]} is not supported")
    return NoiseSchedule.linear(
        published["num_train_timesteps"], published["beta_start"], published["beta_end"])


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors in a file, under our names. A name that is not ours is refused later."""
    if path.suffix == ".bin":
        weights = files.read_tensors(path)
    else:
        from safetensors.torch import load_file  # an optional extra

        weights = load_file(path)
    renamed = {}
    for name, tensor in weights.items():
        for theirs, ours in RENAMES.items():
            name = re.sub(theirs, ours, name)
        if re.search(r"\.(query|key|value|out)\.weight$", name):
            tensor = tensor.flatten(1)  # in old files attention is made of 1×1 convolutions
        if name in renamed:
            raise ValueError(f"{name} is there twice")
        renamed[name] = tensor
    return renamed
