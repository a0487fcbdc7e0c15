"""From noise to images: DDPM (Ho et al. 2020), DDIM (Song et al. 2021a) and DPM-Solver++ (Lu et al. 2022)."""

import torch
from torch import Tensor

from minisiss.schedule import Model, NoiseSchedule


def guided(model: Model, prompt: Tensor | None, guidance: float = 1.0) -> Model:
    """A conditional network at a fixed prompt, [1 or B, words] int, is an unconditional one. w is `guidance`:

        ε = ε(∅) + w · (ε(prompt) − ε(∅)),   in one call; ∅ is the null prompt       (Ho and Salimans 2022)
    """

    def predict(x: Tensor, timesteps: Tensor) -> Tensor:
        if guidance in (0, 1):  # one of the two alone
            return model(x, timesteps, prompt if guidance else None)
        prompts = prompt.expand(len(x), -1)
        both = torch.cat([torch.zeros_like(prompts), prompts])
        without, given = model(torch.cat([x, x]), timesteps.repeat(2), both).chunk(2)
        return without + guidance * (given - without)

    return predict


def timestep_sequence(first: int, steps: int) -> list[int]:
    """At most `steps` timesteps spread evenly from `first` towards −1, which stands for the clean image."""
    spread = torch.linspace(first, -1, min(steps, first + 1) + 1, dtype=torch.float64)
    return spread[:-1].round().long().tolist()


@torch.inference_mode()
def denoise_from(model: Model, schedule: NoiseSchedule, noisy: Tensor, timestep: int, *, steps: int = 50,
                 eta: float = 1.0, order: int = 1, clip: bool = True,
                 generator: torch.Generator | None = None) -> Tensor:
    """Draw images x_0 given their noisy state m_t at one timestep t = `timestep`.

    With ᾱ and ᾱ' at one timestep and at the next lower one that is visited (Song et al. 2021a, 12 and 16):

        x̂_0 = (x − √(1−ᾱ) ε_θ) / √ᾱ                              (clipped to [−1, 1] if `clip`)
        x'  = √ᾱ' x̂_0 + √(1−ᾱ'−s²) ε + s z,   s² = η² · (1−ᾱ')/(1−ᾱ) · (1 − ᾱ/ᾱ'),   z ~ N(0, I)

    where ε = (x − √ᾱ x̂_0)/√(1−ᾱ), which is ε_θ if x̂_0 was neither clipped nor, see below, extrapolated.
    eta = 0 is deterministic DDIM. eta = 1 is ancestral DDPM sampling: over all T timesteps exactly Ho et
    al.'s algorithm 2 with the posterior's variance β̃_t.

    order = 2, for eta = 0 only, is DPM-Solver++ (2M) (Lu et al. 2022, algorithm 2): it extrapolates x̂_0 to
    the middle of the step, from the step before. With λ = ½ log ᾱ/(1−ᾱ) and h = λ' − λ it has for x̂_0:

        x̂_0 + h/(2 h_before) · (x̂_0 − x̂_0,before)

    But the first step has none before, and the last one, to the clean image, has h = ∞: those are DDIM's.

    noisy: [B, C, H, W]; returns [B, C, H, W], in [−1, 1] when clipped. Reproducible from `generator`.
    Raises ValueError for order = 2 with eta > 0.
    """
    if order == 2 and eta > 0:
        raise ValueError(f"order 2 is for eta = 0, got eta {eta}")
    x, x0_before, h_before = noisy, None, None
    times = timestep_sequence(timestep, steps)
    for t, following in zip(times, [*times[1:], None], strict=True):
        alpha_bar = schedule.alphas_cumprod[t]
        last = following is None
        alpha_bar_next = torch.ones_like(alpha_bar) if last else schedule.alphas_cumprod[following]
        noise = model(x, torch.full((len(x),), t, device=x.device))
        predicted = (x - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()
        x0 = predicted = predicted.clamp(-1, 1) if clip else predicted
        h = (alpha_bar_next.logit() - alpha_bar.logit()) / 2
        if order == 2 and x0_before is not None and not last:
            x0 = predicted + h / (2 * h_before) * (predicted - x0_before)
        x0_before, h_before = predicted, h
        noise = (x - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()  # which agrees with this x0
        std = eta * ((1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)).sqrt()
        x = alpha_bar_next.sqrt() * x0 + (1 - alpha_bar_next - std**2).clamp(min=0).sqrt() * noise
        if eta > 0 and not last:
            x = x + std * torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return x


def sample(model: Model, schedule: NoiseSchedule, shape: tuple[int, int, int, int], *, steps: int = 50,
           eta: float = 1.0, order: int = 1, clip: bool = True,
           generator: torch.Generator | None = None) -> Tensor:
    """Draw images of the given shape [B, C, H, W] from the model: noise from N(0, I), denoised from t =
    T−1, see `denoise_from`."""
    noise = torch.randn(shape, generator=generator, device=schedule.gamma.device)
    last = len(schedule) - 1
    return denoise_from(model, schedule, noise, last, steps=steps, eta=eta, order=order, clip=clip,
                        generator=generator)
