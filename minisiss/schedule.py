"""The forward process q(m_t | x) = N(γ_t x, σ_t² I) of DDPM (Ho et al. 2020). Nothing here is learned."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Model = Callable[[Tensor, Tensor], Tensor]  # ε_θ: (x: [B, C, H, W], timesteps: [B]) -> noise: [B, C, H, W]


def broadcast(values: Tensor, images: Tensor) -> Tensor:
    """Shape one number an image, [B], so that it multiplies images: [B, 1, 1, 1] for [B, C, H, W].

    Images may have any number of dimensions, so that losses work on points, [B, D], as well.
    """
    return values.view(-1, *[1] * (images.ndim - 1))


@dataclass(frozen=True)
class NoiseSchedule:
    """β_t and what follows from it, for t = 0 … T−1, each a float32 tensor of shape [T]."""

    betas: Tensor
    alphas_cumprod: Tensor  # ᾱ_t = Π_{s ≤ t} (1 − β_s)
    gamma: Tensor  # γ_t = √ᾱ_t, what is left of the image
    sigma: Tensor  # σ_t = √(1 − ᾱ_t), the standard deviation of the noise

    @classmethod
    def linear(
        cls, timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> "NoiseSchedule":
        """T = `timesteps`, and β_t rising linearly from start to end (Ho et al. 2020, section 4)."""
        if timesteps < 1 or not 0 < beta_start <= beta_end < 1:
            found = f"{timesteps}, {beta_start}, {beta_end}"
            raise ValueError(f"need timesteps ≥ 1 and 0 < beta_start ≤ beta_end < 1, got {found}")
        return cls.from_betas(torch.linspace(beta_start, beta_end, timesteps, dtype=torch.float64))

    @classmethod
    def from_betas(cls, betas: Tensor) -> "NoiseSchedule":
        """The schedule of any β: [T], each in (0, 1). Computed in float64: 1 − ᾱ_t cancels at small t.

        Raises ValueError where nothing is left of the image: no sampling leads back from there.
        """
        betas = betas.double()
        alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        if not alphas_cumprod.float().min() > 0:
            raise ValueError("the last timesteps leave nothing of the image: ᾱ is 0 in float32")
        values = betas, alphas_cumprod, alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
        return cls(*(value.float() for value in values))

    def __len__(self) -> int:
        """T, the number of timesteps."""
        return len(self.betas)

    def to(self, device: torch.device | str) -> "NoiseSchedule":
        return NoiseSchedule(*(value.to(device) for value in vars(self).values()))

    def add_noise(self, x: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """m_t = γ_t x + σ_t noise, with x, noise: [B, …] and timesteps: [B] int."""
        return broadcast(self.gamma[timesteps], x) * x + broadcast(self.sigma[timesteps], x) * noise
