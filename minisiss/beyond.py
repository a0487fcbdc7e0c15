"""Two losses that are not in the paper, in the same form as in `losses`: ReTrack (Shi et al.,
AISTATS 2026), and `old_targets`, which is this project's own."""

from collections.abc import Callable

import torch
from torch import Tensor

from minisiss.losses import Batch, epsilon_matching, importance_weights, sample_mixture
from minisiss.losses import squared_error
from minisiss.schedule import Model, NoiseSchedule


def retrack(model: Model, batch: Batch, schedule: NoiseSchedule,
            nearest: Callable[[Tensor], Tensor],
            weight: float = 0.005) -> tuple[Tensor, Tensor]:
    """ReTrack: (1−λ) L_{X∖A}, and λ times a pull of A's noisy images towards kept images near a.

    λ is `weight`. nearest: a [B, C, H, W] -> its K nearest kept images [B, K, C, H, W].
    Both terms go down, at c = −1. Needs x ~ X∖A.
    """
    keep = epsilon_matching(model, batch.x, batch.timesteps, batch.noise, schedule)
    a_t = schedule.add_noise(batch.a, batch.noise, batch.timesteps)
    target = ideal_noise(a_t, nearest(batch.a), batch.timesteps, schedule)
    forget = squared_error(target, model(a_t, batch.timesteps))
    return (1 - weight) * keep, weight * forget


def ideal_noise(m: Tensor, points: Tensor, timesteps: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The noise that a model would predict in m if the images x_i were all that it knew:

        Σ_i w_i v_i,   v_i = (m − γ x_i)/σ,   w = softmax_i(−‖v_i‖²/2)

    This is the minimiser of L_S for S = {x_i}. As in `importance_weights`, only differences are
    computed: −‖v_i‖²/2 + ‖v_0‖²/2 = γ/σ² · ⟨x_i − x_0, m − γ (x_i + x_0)/2⟩.

    m: [B, C, H, W]; points: [B, K, C, H, W]; timesteps: [B]. Returns [B, C, H, W].
    """
    x = points.flatten(2)  # [B, K, pixels]
    gamma = schedule.gamma[timesteps].view(-1, 1, 1)
    sigma = schedule.sigma[timesteps].view(-1, 1, 1)
    first = x[:, :1]
    middle = gamma * (x + first) / 2
    inner = ((x - first) * (m.flatten(1)[:, None] - middle)).sum(dim=2, keepdim=True)
    w = (gamma / sigma**2 * inner).softmax(dim=1)
    mean = (w * x).sum(dim=1)  # Σ_i w_i x_i, and so Σ_i w_i v_i = (m − γ · mean)/σ
    return schedule.noise_between(mean.view_as(m), m, timesteps)


def old_targets(model: Model, batch: Batch, schedule: NoiseSchedule, lam: float, old: Model,
                weight: float = 3.0) -> tuple[Tensor, Tensor]:
    """SISS's noisy images and weights; the targets come from `old`, the model before unlearning.

        keep:    w_x ‖ε_old(m_t) − ε_θ(m_t)‖²
        forget:  s · k/(n−k) · w_a ‖ε_old(m_tᵀ)ᵀ − ε_θ(m_t)‖²,   s is `weight`

    The old model knows A. So it is asked about mᵀ, where rows and columns are exchanged: that
    shows a picture like a that it never saw. For every λ and every network

        E[keep + forget] = E_{X∖A} ‖ε_old(m_t) − ε_θ(m_t)‖²
                           + s · k/(n−k) · E_A ‖ε_old(m_tᵀ)ᵀ − ε_θ(m_t)‖²

    Both terms go down, at c = −1. Needs x ~ X∖A and square images.
    """
    x, a, t = batch.x, batch.a, batch.timesteps
    gamma, sigma = schedule.gamma[t], schedule.sigma[t]
    m = sample_mixture(x, a, batch.noise, batch.pick, gamma, sigma, lam)
    w_x, w_a = importance_weights(m, x, a, gamma, sigma, lam)
    with torch.no_grad():
        target_of_x = old(m, t)
        target_of_a = old(m.mT, t).mT

    prediction = model(m, t)
    keep = w_x * squared_error(target_of_x, prediction)
    forget = batch.forget_prefactor * w_a * squared_error(target_of_a, prediction)
    return keep, weight * forget
