"""The losses: SISS first, then the four methods that the paper compares it with.

X is the training set (n images), A ⊂ X the forget set (k images). A loss draws nothing at random
and takes no step. It calls the model on a batch and returns `keep` and `forget`, one number per
image; `unlearning.step` goes down the gradient of keep − c · forget.

SISS: "Data Unlearning in Diffusion Models", Alberti et al., ICLR 2025.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from minisiss.schedule import Model, NoiseSchedule, broadcast


def siss(model: Model, batch: "Batch", schedule: NoiseSchedule,
         lam: float) -> tuple[Tensor, Tensor]:
    """SISS, the paper's loss: one noisy image m_t, one network call, two weighted errors.

        x ~ X:    E[ n/(n−k) · w_x ‖ε_x − ε_θ(m_t)‖² − (1+s) · k/(n−k) · w_a ‖ε_a − ε_θ(m_t)‖² ]
        x ~ X∖A:  E[           w_x ‖ε_x − ε_θ(m_t)‖² −    s  · k/(n−k) · w_a ‖ε_a − ε_θ(m_t)‖² ]

    m_t is a noisy image of a with probability λ, else of x. ε_x = (m_t − γ_t x)/σ_t and ε_a are the
    noises that lead to m_t from x and from a; the weights w_x and w_a correct for the choice. The
    first form is the paper's main text, the second its appendix A.1. Both are
    L_{X∖A} − s · k/(n−k) · L_A, for every λ and every network.

    Returns keep and forget, [B] each. keep is the term before the minus sign. forget is the term
    after it, without the factor (1+s) or s, which is c of `unlearning.step`.
    """
    x, a, t = batch.x, batch.a, batch.timesteps
    gamma, sigma = schedule.gamma[t], schedule.sigma[t]
    m = sample_mixture(x, a, batch.noise, batch.pick, gamma, sigma, lam)
    w_x, w_a = importance_weights(m, x, a, gamma, sigma, lam)
    epsilon_x = schedule.noise_between(x, m, t)
    epsilon_a = schedule.noise_between(a, m, t)

    prediction = model(m, t)  # the one network call
    keep = batch.keep_prefactor * w_x * squared_error(epsilon_x, prediction)
    forget = batch.forget_prefactor * w_a * squared_error(epsilon_a, prediction)
    return keep, forget


def sample_mixture(x: Tensor, a: Tensor, noise: Tensor, pick: Tensor, gamma: Tensor,
                   sigma: Tensor, lam: float) -> Tensor:
    """m_t ~ q_λ = (1−λ) q(·|x) + λ q(·|a): the noisy image of a where pick < λ, else of x.

    x, a, noise, m_t: [B, C, H, W]; pick (uniform in [0, 1)), gamma, sigma: [B].
    """
    chosen = torch.where(broadcast(pick < lam, x), a, x)
    return broadcast(gamma, x) * chosen + broadcast(sigma, x) * noise


MAX_DELTA = 40.0  # e^−40 counts for nothing, and float32 holds e^40


def importance_weights(m: Tensor, x: Tensor, a: Tensor, gamma: Tensor, sigma: Tensor,
                       lam: float) -> tuple[Tensor, Tensor]:
    """w_x = q(m|x)/q_λ(m|x, a) and w_a = q(m|a)/q_λ(m|x, a), so (1−λ) w_x + λ w_a = 1.

        w_x = 1/((1−λ) + λ e^Δ),   w_a = 1/((1−λ) e^−Δ + λ),   Δ = log q(m|a) − log q(m|x)

    Δ is a difference of two squared distances, ‖m − γx‖²/2σ² − ‖m − γa‖²/2σ². Both are large and
    nearly equal, and float32 would lose their difference. Algebra removes their common part:
    Δ = γ/σ² · ⟨x − a, γ (x + a)/2 − m⟩. It is cut at ±40, which matters at λ = 0 and 1 only.

    m, x, a: [B, C, H, W]; gamma, sigma, w_x, w_a: [B]. Raises ValueError unless 0 ≤ λ ≤ 1.
    """
    if not 0 <= lam <= 1:
        raise ValueError(f"lam must lie in [0, 1], got {lam}")
    middle = broadcast(gamma, x) * (x + a) / 2
    delta = gamma / sigma**2 * ((x - a) * (middle - m)).flatten(1).sum(dim=1)
    delta = delta.clamp(-MAX_DELTA, MAX_DELTA)
    w_x = 1 / ((1 - lam) + lam * delta.exp())
    w_a = 1 / ((1 - lam) * (-delta).exp() + lam)
    return w_x, w_a


def squared_error(target: Tensor, prediction: Tensor) -> Tensor:
    """‖target − prediction‖² per image, [B]: a mean over pixels, the same for every image size."""
    return (target - prediction).pow(2).flatten(1).mean(dim=1)


@dataclass(frozen=True)
class Batch:
    """Everything that is random in one step. The same batch always gives the same loss.

    x, a, noise, uniform: [B, C, H, W], images in [−1, 1]; timesteps: [B] int; pick: [B].
    """

    x: Tensor  # from X or from X∖A, see x_from
    a: Tensor  # from A
    timesteps: Tensor  # uniform in 0 … T−1
    noise: Tensor  # from N(0, I)
    pick: Tensor  # from U(0, 1): is the noisy image made from x or from a?
    uniform: Tensor  # from U(0, 1): the target of EraseDiff
    n: int  # |X|
    k: int  # |A|
    x_from: str  # "all": x ~ X; "rest": x ~ X∖A

    @property
    def keep_prefactor(self) -> float:
        """n/(n−k) with x ~ X, and 1 with x ~ X∖A."""
        return self.n / (self.n - self.k) if self.x_from == "all" else 1.0

    @property
    def forget_prefactor(self) -> float:
        """k/(n−k) in both forms."""
        return self.k / (self.n - self.k)


def epsilon_matching(model: Model, x: Tensor, timesteps: Tensor, noise: Tensor,
                     schedule: NoiseSchedule) -> Tensor:
    """L_S = E ‖noise − ε_θ(m_t)‖² with m_t = γ_t x + σ_t noise, x from S (Ho et al. 2020, eq. 14).

    Returns [B]. With S = X this is the loss of training.
    """
    return squared_error(noise, model(schedule.add_noise(x, noise, timesteps), timesteps))


def naive_deletion(model: Model, batch: Batch, schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
    """L_{X∖A}: go on training without the forget set. Needs x ~ X∖A; nothing is subtracted."""
    keep = epsilon_matching(model, batch.x, batch.timesteps, batch.noise, schedule)
    return keep, torch.zeros_like(keep)


def neggrad(model: Model, batch: Batch, schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
    """−L_A: gradient ascent on the forget set, at c = 1. Nothing is kept."""
    forget = epsilon_matching(model, batch.a, batch.timesteps, batch.noise, schedule)
    return torch.zeros_like(forget), forget


def siss_no_is(model: Model, batch: Batch, schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
    """SISS without importance sampling: two noisy images, two network calls."""
    keep = epsilon_matching(model, batch.x, batch.timesteps, batch.noise, schedule)
    forget = epsilon_matching(model, batch.a, batch.timesteps, batch.noise, schedule)
    return batch.keep_prefactor * keep, batch.forget_prefactor * forget


def erasediff(model: Model, batch: Batch, schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
    """EraseDiff (Wu et al. 2024): keep L_{X∖A}, and pull ε_θ(a_t, t) to noise u ~ U(0, 1).

    Both terms go down, by a rule of its own: see `unlearning.erasediff_rule`. Needs x ~ X∖A.
    """
    keep = epsilon_matching(model, batch.x, batch.timesteps, batch.noise, schedule)
    a_t = schedule.add_noise(batch.a, batch.noise, batch.timesteps)
    forget = squared_error(batch.uniform, model(a_t, batch.timesteps))
    return keep, forget
