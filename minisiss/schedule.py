"""The forward process q(m_t | x) = N(γ_t x, σ_t² I) of DDPM (Ho et al. 2020)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# The network ε_θ: (noisy images [B, C, H, W], timesteps [B]) -> the noise in them [B, C, H, W].
# A network with prompts takes a third argument; `sampling.guided` makes it a network of two.
Model = Callable[[Tensor, Tensor], Tensor]


def broadcast(values: Tensor, images: Tensor) -> Tensor:
    """Shape one number per image, [B], so that it multiplies images: [B, 1, 1, 1] for [B, C, H, W],
    or [B, 1] for points [B, D]."""
    return values.view(-1, *[1] * (images.ndim - 1))


@dataclass(frozen=True)
class NoiseSchedule:
    """β_t and what follows from it, for t = 0 … T−1: float32 tensors of shape [T]."""

    betas: Tensor
    alphas_cumprod: Tensor  # ᾱ_t = Π_{s ≤ t} (1 − β_s)
    gamma: Tensor  # γ_t = √ᾱ_t, the share of the image
    sigma: Tensor  # σ_t = √(1 − ᾱ_t), the standard deviation of the noise

    @classmethod
    def linear(cls, timesteps: int = 1000, beta_start: float = 1e-4,
               beta_end: float = 0.02) -> "NoiseSchedule":
        """T = `timesteps`, and β_t rises linearly from start to end (Ho et al. 2020, section 4)."""
        return cls.from_betas(torch.linspace(beta_start, beta_end, timesteps, dtype=torch.float64))

    @classmethod
    def from_betas(cls, betas: Tensor) -> "NoiseSchedule":
        """The schedule of any β: [T]. Raises ValueError unless all lie between 0 and 1, and γ stays
        above 0."""
        betas = betas.float()
        # In float64, because 1 − ᾱ_t loses its digits at small t.
        alphas_cumprod = torch.cumprod(1 - betas.double(), dim=0)
        fits = betas.ndim == 1 and len(betas) and betas.min() > 0 and betas.max() < 1
        if not fits or alphas_cumprod[-1].float() == 0:  # 0 would leave nothing of the image
            raise ValueError("the betas of a schedule lie between 0 and 1, and ᾱ is above 0")
        gamma, sigma = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
        return cls(betas, alphas_cumprod.float(), gamma.float(), sigma.float())

    def __len__(self) -> int:
        """T, the number of timesteps."""
        return len(self.betas)

    def to(self, device: torch.device | str) -> "NoiseSchedule":
        """The same schedule on another device."""
        return NoiseSchedule(*(value.to(device) for value in vars(self).values()))

    def add_noise(self, x: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """m_t = γ_t x + σ_t noise, with x, noise: [B, …] and timesteps: [B] int."""
        gamma, sigma = self.gamma[timesteps], self.sigma[timesteps]
        return broadcast(gamma, x) * x + broadcast(sigma, x) * noise

    def noise_between(self, x: Tensor, m: Tensor, timesteps: Tensor) -> Tensor:
        """ε_x = (m_t − γ_t x)/σ_t, the noise that leads from x to m_t: `add_noise` inverted."""
        gamma, sigma = self.gamma[timesteps], self.sigma[timesteps]
        return (m - broadcast(gamma, x) * x) / broadcast(sigma, x)
