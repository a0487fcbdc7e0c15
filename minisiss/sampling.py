"""From noise to images: DDPM (Ho et al. 2020), DDIM (Song et al. 2021a) and DPM-Solver++ (Lu et al.
2022) in one function."""

import torch
from torch import Tensor

from minisiss.schedule import Model, NoiseSchedule


@torch.inference_mode()
def denoise_from(model: Model, schedule: NoiseSchedule, noisy: Tensor, timestep: int, *,
                 steps: int = 50, eta: float = 1.0, order: int = 1,
                 generator: torch.Generator | None = None) -> Tensor:
    """Draw images x_0 given their noisy state m_t at one timestep t = `timestep`.

    ᾱ belongs to one timestep, ᾱ' to the next lower one that is visited (Song et al. 2021a, 12, 16):

        x̂_0 = (x − √(1−ᾱ) ε_θ) / √ᾱ,   clipped to [−1, 1]
        x'  = √ᾱ' x̂_0 + √(1−ᾱ'−s²) ε + s z,   s² = η² · (1−ᾱ')/(1−ᾱ) · (1 − ᾱ/ᾱ'),   z ~ N(0, I)

    where ε = (x − √ᾱ x̂_0)/√(1−ᾱ). eta = 0 is deterministic DDIM. eta = 1 is ancestral DDPM
    sampling: over all T timesteps it is Ho et al.'s algorithm 2 with the posterior's variance β̃_t.

    order = 2, for eta = 0 only, is DPM-Solver++ (2M) (Lu et al. 2022, algorithm 2): it extrapolates
    x̂_0 from the step before to the middle of this step. With λ = ½ log ᾱ/(1−ᾱ) and h = λ' − λ:

        x̂_0 + h/(2 h_before) · (x̂_0 − x̂_0,before)

    The first step has none before it, and the last step, to the clean image, has h = ∞: these two
    steps are DDIM's.

    noisy: [B, C, H, W]; returns [B, C, H, W] in [−1, 1]. Reproducible from `generator`.
    """
    # At most `steps` timesteps, spread evenly from the first towards −1, the clean image.
    spread = torch.linspace(timestep, -1, min(steps, timestep + 1) + 1, dtype=torch.float64)
    timesteps = spread[:-1].round().long().tolist()
    x, x0_before, h_before = noisy, None, None
    for t, t_next in zip(timesteps, [*timesteps[1:], None], strict=True):
        last = t_next is None
        alpha_bar = schedule.alphas_cumprod[t]
        alpha_bar_next = torch.ones_like(alpha_bar) if last else schedule.alphas_cumprod[t_next]
        noise = model(x, torch.full((len(x),), t, device=x.device))
        x0 = (x - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()
        x0 = clipped = x0.clamp(-1, 1)
        h = (alpha_bar_next.logit() - alpha_bar.logit()) / 2
        if order == 2 and x0_before is not None and not last:
            x0 = clipped + h / (2 * h_before) * (clipped - x0_before)
        x0_before, h_before = clipped, h
        noise = (x - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()  # the noise that fits this x0
        variance = (1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)
        std = eta * variance.sqrt()
        x = alpha_bar_next.sqrt() * x0
        x = x + (1 - alpha_bar_next - std**2).clamp(min=0).sqrt() * noise
        if eta > 0 and not last:
            z = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            x = x + std * z
    return x


def sample(model: Model, schedule: NoiseSchedule, shape: tuple[int, int, int, int], *,
           steps: int = 50, eta: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """Draw images of shape [B, C, H, W]: noise from N(0, I), denoised from t = T−1."""
    noise = torch.randn(shape, generator=generator, device=schedule.gamma.device)
    return denoise_from(model, schedule, noise, len(schedule) - 1, steps=steps, eta=eta,
                        generator=generator)


def guided(model: Model, prompt: Tensor | None, guidance: float = 1.0) -> Model:
    """A network with prompts, held at a fixed prompt, as an unconditional network.

        ε = ε(∅) + w · (ε(prompt) − ε(∅)),   in one call          (Ho and Salimans 2022)

    prompt: [1 or B, words] int, or None for the null prompt ∅. w is `guidance`.
    """

    def predict(x: Tensor, timesteps: Tensor) -> Tensor:
        if prompt is None or guidance == 1:
            return model(x, timesteps, prompt)
        prompts = prompt.expand(len(x), -1)
        null = torch.zeros_like(prompts)
        both = model(torch.cat([x, x]), timesteps.repeat(2), torch.cat([null, prompts]))
        without, given = both.chunk(2)
        return without + guidance * (given - without)

    return predict
