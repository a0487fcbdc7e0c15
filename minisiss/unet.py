"""The noise predictor ε_θ(x_t, t): the U-Net of DDPM (Ho et al. 2020)."""

import math
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

MOST_LEVELS = 13  # 4096 pixels can be halved 12 times


@dataclass(frozen=True)
class UNetConfig:
    """Everything that fixes the shape of a `UNet`; the later fields are where published DDPMs differ.

    Of each field: its type, the least and the most it may be, as configs come in files that anyone may have
    made, and its meaning. Raises ValueError for invalid values, and for those that do not fit together.
    """

    image_size: Annotated[int, 1, 4096, "pixels of a side"] = 28
    image_channels: Annotated[int, 1, 4096, "1: grey, 3: colour"] = 1
    channels: Annotated[tuple[int, ...], 1, 4096, "channels of levels, each half as fine"] = (64, 128, 256)
    layers_per_block: Annotated[int, 1, 16, "residual blocks a level on the way down, one more going up"] = 2
    attention_levels: Annotated[tuple[int, ...], 0, 12, "levels with self-attention, the first is 0"] = (1,)
    head_channels: Annotated[int | None, 1, 4096, "channels of an attention head; by default one head"] = None
    norm_groups: Annotated[int, 1, 4096, "groups of GroupNorm"] = 32
    norm_eps: Annotated[float, 1e-12, 1.0, "ε of GroupNorm"] = 1e-6
    downsample_padding: Annotated[int, 0, 1, "1: symmetric; 0: below and to the right (Ho et al.)"] = 1
    flip_sin_to_cos: Annotated[bool, 0, 1, "time embedding: 0: [sin, cos]; 1: [cos, sin]"] = False
    freq_shift: Annotated[int, 0, 1, "time embedding: frequencies 10000^(−i / (half − freq_shift))"] = 1
    vocabulary: Annotated[int, 0, 4096, "words of prompts, with the null word, 0; 0: no prompts"] = 0

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the pictures."""
        return self.image_channels, self.image_size, self.image_size

    def __post_init__(self) -> None:
        for name, value in list(vars(self).items()):
            if wanted := expected(name, value):
                raise ValueError(f"{name} must be {wanted}, got {str(value)[:80]}")
            if isinstance(value, list):  # JSON has lists and no tuples
                object.__setattr__(self, name, tuple(value))
        channels, last = self.channels, len(self.channels) - 1
        if last < 0 or channels[0] % 2:  # the first is the time embedding's width
            raise ValueError(f"channels must be at least one, and the first even, got {channels}")
        if channels[0] == 2 * self.freq_shift:
            raise ValueError(f"channels must begin with 4 or more if freq_shift is 1, got {channels}")
        if any(c % self.norm_groups for c in channels):
            raise ValueError(f"channels {channels} must be divisible by norm_groups {self.norm_groups}")
        if any(level > last for level in self.attention_levels):
            raise ValueError(f"attention_levels {self.attention_levels} must lie in 0 … {last}")
        if any(channels[level] % (self.head_channels or 1) for level in (*self.attention_levels, last)):
            raise ValueError(f"head_channels {self.head_channels} must divide channels with attention")
        if self.image_size % 2**last:
            raise ValueError(f"image_size {self.image_size} must be divisible by 2^{last}, the levels")


def expected(name: str, value: Any) -> str | None:
    """What a field of `UNetConfig` should be, in words; None where this value will do."""
    kind, low, high, _ = get_args(get_type_hints(UNetConfig, include_extras=True)[name])
    several, optional = get_origin(kind) is tuple, type(None) in get_args(kind)
    if several and not (isinstance(value, (list, tuple)) and len(value) <= MOST_LEVELS):
        return f"a list, of at most {MOST_LEVELS}"
    types = (bool, int) if kind is bool else (type(low),)  # True is no number of channels, 3.0 none of blocks
    values = value if several else [value]
    if (optional and value is None) or all(type(one) in types and low <= one <= high for one in values):
        return None
    number = "a number" if kind is float else "a list of integers" if several else "an integer"
    words = f"{low} or {high}" if high == 1 and kind is not float else f"{number} from {low} to {high}"
    return f"null or {words}" if optional else words


def timestep_embedding(timesteps: Tensor, dim: int, flip_sin_to_cos: bool, freq_shift: int) -> Tensor:
    """Sinusoids of the timestep, [B] -> [B, dim] (Vaswani et al. 2017, section 3.5; dim is even)."""
    half = dim // 2
    exponents = -math.log(10000) * torch.arange(half, device=timesteps.device) / (half - freq_shift)
    angles = timesteps[:, None].float() * torch.exp(exponents)
    parts = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return torch.cat(parts, dim=1)


class ResidualBlock(nn.Module):
    """GroupNorm–SiLU–conv twice, with the time embedding added in between, and a skip around it all."""

    def __init__(self, in_channels: int, out_channels: int, time_channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(config.norm_groups, in_channels, config.norm_eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(time_channels, out_channels)
        self.norm2 = nn.GroupNorm(config.norm_groups, out_channels, config.norm_eps)
        self.conv2 = zero(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

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
        self.query, self.key, self.value = (nn.Linear(channels, channels) for _ in range(3))
        self.out = zero(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        pixels = rearrange(self.norm(x), "b c h w -> b (h w) c")
        projected = (project(pixels) for project in (self.query, self.key, self.value))
        q, k, v = (rearrange(p, "b n (heads d) -> b heads n d", heads=self.heads) for p in projected)
        h = rearrange(attend(q, k, v), "b heads n d -> b n (heads d)")
        return x + rearrange(self.out(h), "b (h w) c -> b c h w", h=x.shape[2])


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v, [B, heads, N, d] each."""
    if torch.is_grad_enabled() and q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] <= 256:
        # On a CPU torch's fused kernel gains nothing from bf16, and its backward pass takes twice as long.
        # But this keeps [B, heads, N, N] for the backward pass: not for larger pictures.
        return (q / math.sqrt(q.shape[-1]) @ k.mT).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Downsample(nn.Module):
    """Halve the resolution by a convolution of stride 2."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.padding else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the resolution by repeating pixels, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class UNet(nn.Module):
    """ε_θ: predicts the noise in a noisy image.

    Called as `model(x, timesteps) -> noise` with x, noise: [B, C, H, W] and timesteps: [B] int. With a
    vocabulary also as `model(x, timesteps, prompt)`, [B or 1, words] int; None is the null prompt. Without
    one a prompt raises ValueError.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_activations = False  # recompute the blocks in the backward pass
        channels, levels = config.channels, range(len(config.channels))
        time_channels = 4 * channels[0]

        def make_block(in_channels: int, level: int) -> nn.ModuleList:
            residual = ResidualBlock(in_channels, channels[level], time_channels, config)
            attends = level in config.attention_levels
            return nn.ModuleList([residual, Attention(channels[level], config) if attends else nn.Identity()])

        self.time = nn.Sequential(
            nn.Linear(channels[0], time_channels), nn.SiLU(), nn.Linear(time_channels, time_channels))
        self.prompt = None
        if config.vocabulary:  # an MLP of the sum of a prompt's words; the null word adds nothing to it
            words = nn.EmbeddingBag(config.vocabulary, time_channels, mode="sum", padding_idx=0)
            nn.init.normal_(words.weight, std=0.2)  # from larger ones training hardly moves them
            mlp = nn.Linear(time_channels, time_channels), nn.SiLU(), nn.Linear(time_channels, time_channels)
            self.prompt = nn.Sequential(words, *mlp)
        self.conv_in = nn.Conv2d(config.image_channels, channels[0], 3, padding=1)

        # Down: every block's output, and every level's halved one, is kept for a block on the way up.
        self.down = nn.ModuleList()
        skips = [width := channels[0]]
        for level in levels:
            blocks = nn.ModuleList()
            for _ in range(config.layers_per_block):
                blocks.append(make_block(width, level))
                skips.append(width := channels[level])
            last = level == levels[-1]
            if not last:
                skips.append(width)
            halve = nn.Identity() if last else Downsample(width, config.downsample_padding)
            self.down.append(nn.ModuleDict({"blocks": blocks, "downsample": halve}))

        self.middle = nn.ModuleList([
            ResidualBlock(width, width, time_channels, config),
            Attention(width, config),
            ResidualBlock(width, width, time_channels, config),
        ])

        # Up: one block more per level than on the way down, for the level's incoming skip.
        self.up = nn.ModuleList()
        for level in reversed(levels):
            blocks = nn.ModuleList()
            for _ in range(config.layers_per_block + 1):
                blocks.append(make_block(width + skips.pop(), level))
                width = channels[level]
            double = Upsample(width) if level > 0 else nn.Identity()
            self.up.append(nn.ModuleDict({"blocks": blocks, "upsample": double}))

        self.norm_out = nn.GroupNorm(config.norm_groups, width, config.norm_eps)
        self.conv_out = zero(nn.Conv2d(width, config.image_channels, 3, padding=1))

    def forward(self, x: Tensor, timesteps: Tensor, prompt: Tensor | None = None) -> Tensor:
        config = self.config
        time = timestep_embedding(timesteps, config.channels[0], config.flip_sin_to_cos, config.freq_shift)
        time = self.time(time.to(self.conv_in.weight.dtype))
        if self.prompt is not None:
            time = time + self.prompt(timesteps.new_zeros(1, 1) if prompt is None else prompt)
        elif prompt is not None:
            raise ValueError("this network has no vocabulary, and so takes no prompt")

        def run_block(residual: ResidualBlock, attention: nn.Module, h: Tensor) -> Tensor:
            if self.checkpoint_activations and torch.is_grad_enabled():
                return checkpoint(lambda h, time: attention(residual(h, time)), h, time, use_reentrant=False)
            return attention(residual(h, time))

        h = self.conv_in(x)
        skips = [h]
        for level in self.down:
            for residual, attention in level["blocks"]:
                h = run_block(residual, attention, h)
                skips.append(h)
            if isinstance(level["downsample"], Downsample):
                h = level["downsample"](h)
                skips.append(h)

        first, attention, second = self.middle
        h = run_block(first, attention, h)
        h = run_block(second, nn.Identity(), h)

        for level in self.up:
            for residual, attention in level["blocks"]:
                h = run_block(residual, attention, torch.cat([h, skips.pop()], dim=1))
            h = level["upsample"](h)

        return self.conv_out(F.silu(self.norm_out(h)))


def zero(layer: nn.Module) -> nn.Module:
    """Start a residual branch at zero: the untrained network is near the identity (Ho et al. 2020)."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
