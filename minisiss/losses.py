"""The losses of data unlearning, as pure functions of (model, batch, schedule, …).

Notation: X is the training set (n images), A ⊂ X the forget set (k images), m_t a noisy image at timestep t,
q(m_t|x) = N(γ_t x, σ_t² I). All are sums of terms weight · ‖target − ε_θ(noisy image, t)‖², so a loss here
says which noisy images, targets and weights; `Term` holds these. Not here: how the terms' gradients are
combined (`unlearning.step`), and where x and a come from (`unlearning.draw_batch`). Papers: SISS is Alberti
et al. (ICLR 2025); EraseDiff is Wu et al. (2024); ReTrack is Shi et al. (AISTATS 2026); ε-matching is Ho et
al. (2020).
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minisiss.schedule import Model, NoiseSchedule, broadcast

# An image whose weight in a term is below this share of the batch's largest is left out of the term's pass.
NEGLIGIBLE = 1e-8
# Weights saturate at e^40. Only λ = 0 or 1 gets there (else a weight is at most 1/λ or 1/(1−λ)), for an m_t
# that its proposal never draws; sums and squares of weights stay finite in float32 there too.
MAX_LOG_WEIGHT = 40.0


@dataclass(frozen=True)
class Batch:
    """Everything random in one step, so that a loss is a function: the same batch gives the same loss.

    x, a, noise, uniform: [B, C, H, W]; timesteps: [B] int; pick: [B].
    """

    x: Tensor  # from where `x_from` says
    a: Tensor  # from A
    timesteps: Tensor
    noise: Tensor  # from N(0, I)
    pick: Tensor  # from U(0, 1): decides which component of the mixture an image comes from
    uniform: Tensor  # from U(0, 1): EraseDiff's target
    n: int  # |X|
    k: int  # |A|
    x_from: str = "all"  # "all": x ~ X; "rest": x ~ X∖A
    neighbours: Tensor | None = None  # kept pictures near each a, for ReTrack: [1 or B, K, C, H, W]

    @property
    def prefactors(self) -> tuple[float, float, float]:
        """Of the kept term, of the forget term, and the c at which keep − c · forget is naive deletion.

            x ~ X:    n/(n−k) · keep − (1+s) · k/(n−k) · forget    (the paper's main text)
            x ~ X∖A:            keep −    s  · k/(n−k) · forget    (its appendix A.1)

        Both are L_{X∖A} − s · k/(n−k) · L_A, where `keep` and `forget` are means over x and over a.
        """
        n, k = self.n, self.k
        return (n / (n - k), k / (n - k), 1.0) if self.x_from == "all" else (1.0, k / (n - k), 0.0)


@dataclass(frozen=True)
class Teacher:
    """A target that another network predicts, without a gradient, for those images that it is asked for."""

    model: Model
    noisy: Tensor
    timesteps: Tensor

    def __getitem__(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model(self.noisy[images], self.timesteps[images])


@dataclass(frozen=True)
class Term:
    """weight · min(‖target − ε_θ(noisy, t)‖², ceiling) of each image; `per_image` runs the network.

    noisy, target: [B, C, H, W]; timesteps, weight, ceiling: [B]. The weights do not depend on the network.
    Which images are above the ceiling does: those have no gradient any more.
    """

    model: Model
    noisy: Tensor
    timesteps: Tensor
    target: Tensor | Teacher
    weight: Tensor
    ceiling: Tensor | None = None

    @property
    def counts(self) -> Tensor:
        """Which images count, those whose weight is not negligible: [B] bool."""
        size = self.weight.abs()
        return size > NEGLIGIBLE * size.max()

    def per_image(self, images: Tensor | None = None) -> Tensor:
        """The loss of the images at these indices (by default all): [number of indices]."""
        if images is None:
            images = torch.arange(len(self.weight), device=self.weight.device)
        return self.weighted_error(self.model(self.noisy[images], self.timesteps[images]), images)

    def weighted_error(self, prediction: Tensor, images: Tensor) -> Tensor:
        """The loss of these images, given the network's prediction for them."""
        error = squared_error(prediction, self.target[images])
        if self.ceiling is not None:
            error = error.clamp(max=self.ceiling[images])
        return self.weight[images] * error


@dataclass(frozen=True)
class Difference:
    """keep − c · forget, for two terms of the same noisy images: one pass through the network serves both.

    Raises ValueError for terms of different ones.
    """

    keep: Term
    forget: Term
    c: float

    def __post_init__(self) -> None:
        if self.keep.noisy is not self.forget.noisy:
            raise ValueError("one pass for two terms needs them to share their noisy images")

    @property
    def counts(self) -> Tensor:
        """Which images count in either term: [B] bool."""
        return self.keep.counts | self.forget.counts

    def per_image(self, images: Tensor) -> Tensor:
        """The difference of the losses of the images at these indices: [number of indices]."""
        prediction = self.keep.model(self.keep.noisy[images], self.keep.timesteps[images])
        loss = torch.zeros_like(self.keep.weight[images])
        for term, factor in ((self.keep, 1.0), (self.forget, -self.c)):
            counts = term.counts[images].nonzero()[:, 0]  # a teacher is asked for no others
            error = factor * term.weighted_error(prediction[counts], images[counts])
            loss = loss.index_add(0, counts, error.to(loss.dtype))
        return loss


@dataclass(frozen=True)
class Terms:
    """What a loss returns, for the method's rule to combine; either term may be absent."""

    keep: Term | None = None
    forget: Term | None = None
    c_of_deletion: float = 0.0  # keep − c · forget is naive deletion at this c: see `Batch.prefactors`

    @property
    def share_images(self) -> bool:
        """Whether both terms are of the same noisy images."""
        return self.keep is not None and self.forget is not None and self.keep.noisy is self.forget.noisy

    def below(self, ceiling: Tensor) -> "Terms":
        """The same, but an image counts in the forget term only while its error is below the ceiling τ: [T].

        Then E[forget] is k/(n−k) · E[min(‖ε_a − ε_θ‖², τ_t)], so that keep − c · forget is bounded from
        below, unlike L_{X∖A} − s · k/(n−k) · L_A. Below τ nothing changes. Not in the paper.
        """
        return replace(self, forget=replace(self.forget, ceiling=ceiling[self.forget.timesteps]))


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """‖target − prediction‖² of each image, as the mean over its pixels so that image sizes compare: [B]."""
    return (target - prediction).pow(2).flatten(1).mean(dim=1)


def epsilon_matching(model: Model, x: Tensor, timesteps: Tensor, noise: Tensor, schedule: NoiseSchedule,
                     weight: float = 1.0) -> Term:
    """L_S = E ‖noise − ε_θ(m_t, t)‖² with m_t = γ_t x + σ_t noise, x from S (Ho et al. 2020, eq. 14)."""
    weights = torch.full((len(x),), weight, dtype=x.dtype, device=x.device)
    return Term(model, schedule.add_noise(x, noise, timesteps), timesteps, noise, weights)


def naive_deletion(model: Model, batch: Batch, schedule: NoiseSchedule) -> Terms:
    """L_{X∖A}: go on training without the forget set. Needs batch.x from X∖A."""
    return Terms(keep=epsilon_matching(model, batch.x, batch.timesteps, batch.noise, schedule))


def neggrad(model: Model, batch: Batch, schedule: NoiseSchedule) -> Terms:
    """−L_A: gradient ascent on the forget set."""
    return Terms(forget=epsilon_matching(model, batch.a, batch.timesteps, batch.noise, schedule))


def siss(model: Model, batch: Batch, schedule: NoiseSchedule, lam: float) -> Terms:
    """SISS, the paper's loss, from one noisy image m_t ~ q_λ. With x ~ X, and in brackets with x ~ X∖A:

        keep:    n/(n−k) [1] · w_x ‖ε_x − ε_θ(m_t, t)‖²,   ε_x = (m_t − γ_t x)/σ_t
        forget:  k/(n−k)     · w_a ‖ε_a − ε_θ(m_t, t)‖²,   ε_a = (m_t − γ_t a)/σ_t

    E[keep − c · forget] is L_{X∖A} at c = 1 [0], for every λ and network; c = 1 + s [s] subtracts more.
    """
    x, a = batch.x, batch.a
    of_keep, of_forget, c = batch.prefactors
    gamma, sigma = schedule.gamma[batch.timesteps], schedule.sigma[batch.timesteps]
    m = sample_mixture(x, a, batch.noise, batch.pick, gamma, sigma, lam)
    w_x, w_a = importance_weights(m, x, a, gamma, sigma, lam)
    epsilon_x = (m - broadcast(gamma, m) * x) / broadcast(sigma, m)
    epsilon_a = (m - broadcast(gamma, m) * a) / broadcast(sigma, m)
    keep = Term(model, m, batch.timesteps, epsilon_x, of_keep * w_x)
    return Terms(keep, Term(model, m, batch.timesteps, epsilon_a, of_forget * w_a), c)


def siss_no_is(model: Model, batch: Batch, schedule: NoiseSchedule) -> Terms:
    """SISS without importance sampling: both terms with the same prefactors, each at its own noisy image."""
    of_keep, of_forget, c = batch.prefactors
    keep = epsilon_matching(model, batch.x, batch.timesteps, batch.noise, schedule, of_keep)
    forget = epsilon_matching(model, batch.a, batch.timesteps, batch.noise, schedule, of_forget)
    return Terms(keep, forget, c)


def erasediff(model: Model, batch: Batch, schedule: NoiseSchedule) -> Terms:
    """EraseDiff: keep L_{X∖A}; pull the prediction on A to noise, ‖u − ε_θ(a_t, t)‖² with u ~ U(0, 1).

    The forget term is descended on too, by a rule of its own: see `unlearning.erasediff_rule`.
    """
    keep = epsilon_matching(model, batch.x, batch.timesteps, batch.noise, schedule)
    a_t = schedule.add_noise(batch.a, batch.noise, batch.timesteps)
    return Terms(keep, forget=Term(model, a_t, batch.timesteps, batch.uniform, torch.ones_like(keep.weight)))


def retrack(model: Model, batch: Batch, schedule: NoiseSchedule, retrack_weight: float) -> Terms:
    """ReTrack: (1−λ) L_{X∖A}, and λ times a pull of A's noisy images towards kept pictures near a.

    λ is `retrack_weight`; E[keep + forget] is descended on. Needs batch.x from X∖A, and batch.neighbours.
    """
    keep = epsilon_matching(model, batch.x, batch.timesteps, batch.noise, schedule, 1 - retrack_weight)
    forget = epsilon_matching(model, batch.a, batch.timesteps, batch.noise, schedule, retrack_weight)
    gamma, sigma = schedule.gamma[batch.timesteps], schedule.sigma[batch.timesteps]
    return Terms(keep, replace(forget, target=ideal_noise(forget.noisy, batch.neighbours, gamma, sigma)))


def unseen(model: Model, batch: Batch, schedule: NoiseSchedule, lam: float, unseen_weight: float,
           old: Model) -> Terms:
    """SISS with an aim (not in the paper): its noisy images and weights, but the targets are what a teacher
    says, the `old` model, the one before unlearning. On A it is asked for a picture alike that it never saw,
    A's own with rows and columns exchanged, m^T. With x ~ X∖A:

        keep:    w_x ‖ε_old(m_t, t) − ε_θ(m_t, t)‖²
        forget:  s · k/(n−k) · w_a ‖ε_old(m_t^T, t)^T − ε_θ(m_t, t)‖²

    E[keep + forget] = E_{X∖A} ‖ε_old(m_t) − ε_θ(m_t)‖² + s · k/(n−k) · E_A ‖ε_old(m_t^T)^T − ε_θ(m_t)‖², for
    every λ and network, is descended on. So the kept target is no longer the noise, but what the old model
    predicts. s is `unseen_weight`. Needs batch.x from X∖A.
    """
    terms = siss(model, batch, schedule, lam)
    m, t, weight = terms.keep.noisy, batch.timesteps, unseen_weight * terms.forget.weight
    of_x, of_a = Teacher(old, m, t), Teacher(lambda m, t: old(m.mT, t).mT, m, t)
    return Terms(replace(terms.keep, target=of_x), replace(terms.forget, target=of_a, weight=weight))


def ideal_noise(m: Tensor, points: Tensor, gamma: Tensor, sigma: Tensor) -> Tensor:
    """The noise that a model which knew only these points x_i would predict in m: Σ_i w_i v_i with

        v_i = (m − γ x_i)/σ,   w = softmax_i(−‖v_i‖²/2)

    It is the minimiser of L_S for the set S of the points. As for `importance_weights`, what ‖v_i‖² and
    ‖v_0‖² have in common cancels on paper: w = softmax_i(γ/σ² · ⟨x_i − x_0, (m − γ x_0) − γ (x_i − x_0)/2⟩).

    m: [B, C, H, W]; gamma, sigma: [B]; points: [B, K, C, H, W], those of each image, or [1, K, C, H, W], the
    same for all, where this is a matrix product. Returns [B, C, H, W].
    """
    sets = len(points)
    first, gamma, sigma = points[:, :1].flatten(2), gamma.view(sets, -1, 1), sigma.view(sets, -1, 1)
    from_first = points.flatten(2) - first  # [sets, K, CHW]
    rest = m.flatten(1).view(sets, -1, first.shape[-1]) - gamma * first  # [sets, images of each set, CHW]
    autocast = torch.amp.is_autocast_available(m.device.type)  # not on every device in every torch
    with torch.autocast(m.device.type, enabled=False) if autocast else nullcontext():
        # bf16 cannot tell near points apart.
        inner = rest @ from_first.mT - gamma / 2 * from_first.square().sum(dim=-1)[:, None]
        nearest = (gamma / sigma**2 * inner).softmax(dim=-1) @ from_first
    return ((rest - gamma * nearest) / sigma).view_as(m)


def sample_mixture(x: Tensor, a: Tensor, noise: Tensor, pick: Tensor, gamma: Tensor, sigma: Tensor,
                   lam: float) -> Tensor:
    """m_t ~ q_λ = (1−λ) q(·|x) + λ q(·|a): m_t = γ_t · (x, or a where pick < λ) + σ_t · noise.

    One noise tensor and one timestep serve both. x, a, noise: [B, C, H, W]; pick, gamma, sigma: [B].
    """
    chosen = torch.where(broadcast(pick < lam, x), a, x)
    return broadcast(gamma, x) * chosen + broadcast(sigma, x) * noise


def importance_weights(m: Tensor, x: Tensor, a: Tensor, gamma: Tensor, sigma: Tensor,
                       lam: float) -> tuple[Tensor, Tensor]:
    """w_x = q(m|x)/q_λ(m|x,a) and w_a = q(m|a)/q_λ(m|x,a), so that (1−λ) w_x + λ w_a = 1.

    With Δ = log q(m|a) − log q(m|x) = ‖m − γx‖²/2σ² − ‖m − γa‖²/2σ²:

        w_x = 1/((1−λ) + λ e^Δ),   w_a = 1/((1−λ) e^−Δ + λ)

    The two squared distances are large and nearly equal; their common part cancels on paper, not in float32:
    Δ = γ/σ² · ⟨x − a, γ (x + a)/2 − m⟩. The exponentials stay in log space, finite for every m and λ.

    m, x, a: [B, C, H, W]; gamma, sigma, w_x, w_a: [B]. Raises ValueError unless 0 ≤ λ ≤ 1.
    """
    if not 0 <= lam <= 1:
        raise ValueError(f"lam must lie in [0, 1], got {lam}")
    middle = broadcast(gamma, x) * ((x + a) / 2)
    delta = gamma / sigma**2 * ((x - a) * (middle - m)).flatten(1).sum(dim=1)
    log_1_minus_lam = torch.full_like(delta, math.log1p(-lam) if lam < 1 else -math.inf)
    log_lam = torch.full_like(delta, math.log(lam) if lam > 0 else -math.inf)
    log_w_x = -torch.logaddexp(log_1_minus_lam, log_lam + delta)
    log_w_a = -torch.logaddexp(log_1_minus_lam - delta, log_lam)
    return log_w_x.clamp(max=MAX_LOG_WEIGHT).exp(), log_w_a.clamp(max=MAX_LOG_WEIGHT).exp()
