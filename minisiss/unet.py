"""The noise predictor ε_θ(x_t, t): the U-Net of DDPM (Ho et al. 2020)."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True)
class UNetConfig:
    """All that fixes the shape of a `UNet`. The later fields are where published DDPMs differ.
    Raises ValueError for values that make no network."""

    image_size: int = 28  # pixels of a side
    image_channels: int = 1  # 1: grey, 3: colour
    channels: tuple[int, ...] = (64, 128, 256)  # per level, of half the resolution each
    layers_per_block: int = 2  # residual blocks per level; one more on the way up
    attention_levels: tuple[int, ...] = (1,)  # with self-attention; the first level is 0
    head_channels: int | None = None  # channels per attention head; None: a single head
    norm_groups: int = 32  # groups of GroupNorm
    norm_eps: float = 1e-6  # ε of GroupNorm
    downsample_padding: int = 1  # 1: on all sides; 0: below and to the right (Ho et al.)
    flip_sin_to_cos: bool = False  # time embedding: False: [sin, cos]; True: [cos, sin]
    freq_shift: int = 1  # time embedding: frequencies 10000^(−i / (half − freq_shift))
    vocabulary: int = 0  # words of prompts, with the null word; 0: no prompts

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""
        return self.image_channels, self.image_size, self.image_size

    def __post_init__(self) -> None:
        last = len(self.channels) - 1
        attention_levels = {*self.attention_levels, last}  # the middle has the last
        head = self.head_channels or 1
        fits = (
            min(self.image_size, self.norm_groups, head) > 0
            and 1 <= self.layers_per_block <= 16
            and self.image_size % 2**last == 0
            and attention_levels <= set(range(last + 1))
            and all(self.channels[level] % head == 0 for level in attention_levels)
            and self.channels[0] % 2 == 0
            and {self.downsample_padding, self.freq_shift} <= {0, 1}
        )
        if not fits:
            raise ValueError(f"these values make no network: {self}")


def timestep_embedding(timesteps: Tensor, config: UNetConfig) -> Tensor:
    """Sinusoids of the timestep, [B] -> [B, channels[0]] (Vaswani et al. 2017, section 3.5)."""
    half = config.channels[0] // 2
    place = torch.arange(half, device=timesteps.device)
    frequencies = torch.exp(-math.log(10000) * place / (half - config.freq_shift))
    angles = timesteps[:, None].float() * frequencies
    if config.flip_sin_to_cos:
        return torch.cat([angles.cos(), angles.sin()], dim=1)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class ResidualBlock(nn.Module):
    """GroupNorm–SiLU–conv twice, the time embedding added in between, and a skip around it all."""

    def __init__(self, in_channels: int, channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(config.norm_groups, in_channels, config.norm_eps)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.time = nn.Linear(4 * config.channels[0], channels)
        self.norm2 = nn.GroupNorm(config.norm_groups, channels, config.norm_eps)
        self.conv2 = zero(nn.Conv2d(channels, channels, 3, padding=1))
        self.skip = nn.Identity()
        if in_channels != channels:
            self.skip = nn.Conv2d(in_channels, channels, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time(F.silu(time))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.skip(x) + h


class Attention(nn.Module):
    """Self-attention over the pixels, with a skip around it."""

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.heads = channels // (config.head_channels or channels)
        self.norm = nn.GroupNorm(config.norm_groups, channels, config.norm_eps)
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.out = zero(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        def split(pixels: Tensor) -> Tensor:
            return rearrange(pixels, "b n (heads d) -> b heads n d", heads=self.heads)

        pixels = rearrange(self.norm(x), "b c h w -> b (h w) c")
        q, k, v = split(self.query(pixels)), split(self.key(pixels)), split(self.value(pixels))
        h = F.scaled_dot_product_attention(q, k, v)
        h = self.out(rearrange(h, "b heads n d -> b n (heads d)"))
        return x + rearrange(h, "b (h w) c -> b c h w", h=x.shape[2])


class Downsample(nn.Module):
    """Halve the resolution by a convolution of stride 2."""

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.padding = config.downsample_padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=self.padding)

    def forward(self, x: Tensor) -> Tensor:
        if not self.padding:
            x = F.pad(x, (0, 1, 0, 1))
        return self.conv(x)


class Upsample(nn.Module):
    """Double the resolution by repeating pixels, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class UNet(nn.Module):
    """ε_θ: predicts the noise in a noisy image.

    Called as `model(x, timesteps, prompt) -> noise` with x, noise: [B, C, H, W], timesteps: [B] int
    and prompt: None, or, with a vocabulary, [B or 1, words] int.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        channels, last = config.channels, len(config.channels) - 1
        time_channels = 4 * channels[0]

        def make_block(in_channels: int, level: int) -> nn.ModuleList:
            residual = ResidualBlock(in_channels, channels[level], config)
            attention = nn.Identity()
            if level in config.attention_levels:
                attention = Attention(channels[level], config)
            return nn.ModuleList([residual, attention])

        def make_mlp(in_channels: int) -> list[nn.Module]:
            hidden = nn.Linear(in_channels, time_channels)
            return [hidden, nn.SiLU(), nn.Linear(time_channels, time_channels)]

        self.time = nn.Sequential(*make_mlp(channels[0]))
        self.prompt = None
        if config.vocabulary:  # an MLP of the sum of the words; the null word is 0
            words = nn.EmbeddingBag(config.vocabulary, time_channels, mode="sum", padding_idx=0)
            nn.init.normal_(words.weight, std=0.2)  # training hardly moves larger ones
            self.prompt = nn.Sequential(words, *make_mlp(time_channels))
        self.conv_in = nn.Conv2d(config.image_channels, channels[0], 3, padding=1)

        # Down: the output of every block and of every downsampling is a skip for the way up.
        self.down = nn.ModuleList()
        width = channels[0]
        for level in range(last + 1):
            blocks = nn.ModuleList()
            for _ in range(config.layers_per_block):
                blocks.append(make_block(width, level))
                width = channels[level]
            halve = Downsample(width, config) if level < last else nn.Identity()
            self.down.append(nn.ModuleDict({"blocks": blocks, "downsample": halve}))

        self.middle = nn.ModuleList([
            ResidualBlock(width, width, config),
            Attention(width, config),
            ResidualBlock(width, width, config),
        ])

        # Up: one block more per level than on the way down, for the skip that came into the level.
        self.up = nn.ModuleList()
        for level in reversed(range(last + 1)):
            skips = [channels[level]] * config.layers_per_block
            skips.append(channels[max(level - 1, 0)])
            blocks = nn.ModuleList()
            for skip in skips:
                blocks.append(make_block(width + skip, level))
                width = channels[level]
            double = Upsample(width) if level > 0 else nn.Identity()
            self.up.append(nn.ModuleDict({"blocks": blocks, "upsample": double}))

        self.norm_out = nn.GroupNorm(config.norm_groups, width, config.norm_eps)
        self.conv_out = zero(nn.Conv2d(width, config.image_channels, 3, padding=1))

    def forward(self, x: Tensor, timesteps: Tensor, prompt: Tensor | None = None) -> Tensor:
        time = timestep_embedding(timesteps, self.config)
        time = self.time(time.to(self.conv_in.weight.dtype))
        if self.prompt is not None and prompt is None:
            prompt = timesteps.new_zeros(1, 1, dtype=torch.long)
        if prompt is not None:
            time = time + self.prompt(prompt)

        h = self.conv_in(x)
        skips = [h]
        for level in self.down:
            for residual, attention in level["blocks"]:
                h = attention(residual(h, time))
                skips.append(h)
            if isinstance(level["downsample"], Downsample):
                h = level["downsample"](h)
                skips.append(h)

        first, attention, second = self.middle
        h = second(attention(first(h, time)), time)

        for level in self.up:
            for residual, attention in level["blocks"]:
                h = attention(residual(torch.cat([h, skips.pop()], dim=1), time))
            h = level["upsample"](h)

        return self.conv_out(F.silu(self.norm_out(h)))


def zero(layer: nn.Module) -> nn.Module:
    """Start a layer at zero: then residual branches begin as the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
