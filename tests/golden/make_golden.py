"""Make the golden files beside this script: published DDPMs in miniature, and what diffusers computes with them.

Needs `pip install diffusers`, which neither minisiss nor its other tests do. Made with diffusers 0.42.1, torch 2.14.1:

    python tests/golden/make_golden.py

Each directory holds a model in a layout in which such models are published, and outputs.pt: {"timesteps": [N],
"outputs": [N, C, H, W]}, what it predicts in float32 for one `image` at these timesteps. The options are those of the
published model; the sizes are as small as they let them be.
"""

import math
import re
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DModel

HERE = Path(__file__).parent


def blocks(levels: int, attention: int) -> dict[str, list[str]]:
    down = ["AttnDownBlock2D" if level == attention else "DownBlock2D" for level in range(levels)]
    return {"down_block_types": down, "up_block_types": [name.replace("Down", "Up") for name in reversed(down)]}


# google/ddpm-celebahq-256 and google/ddpm-cifar10-32
GOOGLE = dict(
    in_channels=3, out_channels=3, layers_per_block=2, attention_head_dim=None, downsample_padding=0,
    flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6,
)  # fmt: skip
CELEBAHQ = GOOGLE | blocks(6, 4) | dict(sample_size=64, block_out_channels=(4, 4, 4, 4, 8, 8), norm_num_groups=2)
CIFAR10 = GOOGLE | blocks(4, 1) | dict(sample_size=16, block_out_channels=(4, 8, 8, 8), norm_num_groups=2)
# The MNIST model of the paper: what it does not say is diffusers' default, but for a head's 8 channels, here 4.
MNIST = blocks(3, 1) | dict(
    sample_size=28, in_channels=1, out_channels=1, layers_per_block=2, block_out_channels=(4, 8, 8),
    norm_num_groups=2, attention_head_dim=4,
)  # fmt: skip


def randomize(model: UNet2DModel) -> None:
    """Random weights everywhere, such that every part of the network shows in its output.

    Features are small, for the norms' epsilon to matter; queries and keys are large, for attention to be far from
    uniform; and what comes from below is amplified on the way up, where skips dilute it. Every number is one of
    float16, in which the files are small.
    """
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            values = torch.randn_like(parameter) / 4 + name.endswith("weight")
        else:
            values = torch.randn_like(parameter) / math.sqrt(parameter[0].numel())
            if re.search(r"conv_in|conv[12]\.|time_emb_proj|to_out", name):
                values /= 20
            elif re.search(r"to_q|to_k", name):
                values *= 2
            elif "upsamplers" in name:
                values *= 3
        if name.endswith("bias") and "norm" not in name:
            values /= 10
        parameter.data = values.half().float()


def make(
    name: str, config: dict, timesteps: list[int], unet: str = "", scheduler: str | None = None, old_names: bool = False
) -> None:
    model = UNet2DModel(**config)
    randomize(model)
    folder = HERE / name / unet
    folder.mkdir(parents=True, exist_ok=True)
    model.save_config(folder)
    if scheduler is not None:
        DDPMScheduler().save_config(HERE / name / scheduler)
    # The tensors are views of one: a file with a record for each would be half as large again.
    state = model.state_dict()
    flat = torch.cat([value.flatten() for value in state.values()]).half()
    parts = flat.split([value.numel() for value in state.values()])
    state = {key: part.view_as(value) for (key, value), part in zip(state.items(), parts, strict=True)}
    if old_names:  # as these models were uploaded
        for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
            state = {key.replace(f".{new}.", f".{old}."): value for key, value in state.items()}
    torch.save(state, folder / "diffusion_pytorch_model.bin")

    # What diffusers makes of the files, so that they, too, are held against it.
    model, info = UNet2DModel.from_pretrained(folder, output_loading_info=True, low_cpu_mem_usage=False)
    assert not any(info.values()), info
    images = image(config["in_channels"], config["sample_size"]).expand(len(timesteps), -1, -1, -1)
    timesteps = torch.tensor(timesteps)
    with torch.no_grad():
        outputs = model(images, timesteps).sample
    torch.save({"timesteps": timesteps, "outputs": outputs}, HERE / name / "outputs.pt")
    print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, outputs of standard deviation {outputs.std():.2f}")


def image(channels: int, size: int) -> torch.Tensor:
    """Numbers without a generator, whose stream may change: [1, channels, size, size] in [-2, 2]."""
    return 2 * (torch.arange(channels * size * size) ** 2 % 1009).sin().view(1, channels, size, size)


if __name__ == "__main__":
    make("celebahq", CELEBAHQ, [20, 700], scheduler="", old_names=True)
    make("cifar10", CIFAR10, [0, 500, 999])
    make("mnist", MNIST, [0, 500, 999], unet="unet", scheduler="scheduler")
