"""How likely a model finds an image, by the probability-flow ODE of its diffusion.

Song et al. 2021b, "Score-Based Generative Modeling through Stochastic Differential Equations", section 4.3.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from minisiss.schedule import Model, NoiseSchedule

# Dormand and Prince 1980: the nodes c, the stages' weights a (the last row is the step of order 5), and that
# step's difference from the one of order 4, the estimate of the error.
NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1)
STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
ERROR = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
MOST_STEPS = 500  # a trained model takes about 30, one that unlearning has wrecked could take any number


def rk45(f: Callable[[float, Tensor], Tensor], y: Tensor, t0: float, t1: float, rtol: float,
         atol: float) -> Tensor:
    """Solve dy/dt = f(t, y) from t0 to t1 ≥ t0 by the adaptive Runge–Kutta method of Dormand and Prince.

    The estimated error of a step, over atol + rtol · |y|, stays below 1 in its root mean square over all of y
    (Hairer, Nørsett and Wanner, "Solving Ordinary Differential Equations I", section II.4). Raises
    ArithmeticError after `MOST_STEPS` steps, and when the step shrinks to nothing, as where f is not finite.
    """

    def combine(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
        return h * sum(weight * slope for weight, slope in zip(weights, slopes, strict=True))

    def size(value: Tensor, *states: Tensor) -> float:
        scale = atol + rtol * torch.stack(states).abs().amax(dim=0)
        return (value / scale).square().mean().sqrt().item()

    t, k1 = t0, f(t0, y)
    h = 0.01 * size(y, y) / max(size(k1, y), 1e-10) or t1 - t0  # a first step that moves y by about 1%
    for _ in range(MOST_STEPS):
        left = t1 - t
        if left <= 0:
            return y
        h = min(h, left)
        if not t + h > t:
            break
        k = [k1]
        for c, a in zip(NODES, STAGES, strict=True):
            y_next = y + combine(a, k)
            k.append(f(t + c * h, y_next))
        error = size(combine(ERROR, k), y, y_next)
        if error <= 1:
            t, y, k1 = t1 if h == left else t + h, y_next, k[-1]  # the last slope is the next step's first
        h *= min(10.0, max(0.2, 0.9 * max(error, 1e-10) ** -0.2))  # 0.2 too where the error is NaN
    raise ArithmeticError(f"the ODE could not be solved past t = {t:g}")


def log_density(model: Model, schedule: NoiseSchedule, x: Tensor, probes: Tensor, *,
                tolerance: float = 1e-4) -> Tensor:
    """Estimate log p(x) in nats under the model: [B], unbiased over probes of mean 0 and covariance I.

    The VP process dm = −½ β(t) m dt + √β(t) dw is, in the time u = ∫ β dt = −log ᾱ, the same for every β, and
    its probability-flow ODE with the score −ε_θ/σ is (Song et al. 2021b, eqs. 11 and 13)

        dm/du = −½ (m − ε_θ(m, τ(u)) / σ(u)),   σ(u) = √(1 − e^−u)

        log p(x) = log N(m(u_T−1); 0, I) + ∫ ∇·(dm/du) du,   m(u_0) = x                        (eq. 39)

    with the divergence estimated as vᵀ J v for a probe v (Hutchinson 1990; eq. 40). Between the T values of u
    that a DDPM knows, log ᾱ is linear in the timestep, which becomes a real number, τ. u runs no further than
    was trained: p is the density of images with the noise of t = 0, σ_0 = √β_0 (a grey level and a quarter).

    x, probes: [B, C, H, W]; `model` must accept real timesteps and be differentiable in x, in float32. The
    default tolerance is worth 1e-3 bits per dimension. Raises ArithmeticError if it cannot be solved.
    """
    u = -torch.log1p(-schedule.betas.cpu().double()).cumsum(0).numpy()
    d = x[0].numel()

    def ode(time: float, state: Tensor) -> Tensor:
        sigma = math.sqrt(-math.expm1(-time))
        tau = np.interp(time, u, range(len(u)))
        m = state[:, :d].reshape(x.shape).requires_grad_()
        with torch.enable_grad():
            noise = model(m, torch.full((len(m),), tau, dtype=m.dtype, device=m.device))
            (product,) = torch.autograd.grad(noise, m, probes)  # vᵀ ∂ε_θ/∂m
        trace = (product * probes).flatten(1).sum(dim=1, keepdim=True)
        return torch.cat([-0.5 * (m - noise / sigma).detach().flatten(1), -0.5 * (d - trace / sigma)], dim=1)

    state = torch.cat([x.flatten(1), x.new_zeros(len(x), 1)], dim=1)
    state = rk45(ode, state, u[0].item(), u[-1].item(), rtol=tolerance, atol=tolerance)
    log_prior = -0.5 * (state[:, :d].square() + math.log(2 * math.pi)).sum(dim=1)
    return log_prior + state[:, d]


def bits_per_dimension(model: Model, schedule: NoiseSchedule, image: Tensor, *, probes: int = 8,
                       seed: int = 0) -> tuple[float, float]:
    """Negative log-likelihood of one image in bits per dimension, and the standard error of its probes.

        −log2 p(x) / d + 7        with d = C·H·W

    The 7 turns the density on [−1, 1] into that of 8-bit pixels: 256 levels in a range of 2 make a level 2^−7
    wide (as in Song et al.'s published code). The image is taken as it is, without dequantization.

    image: [1, C, H, W] in [−1, 1]. The probes, of ±1, are a function of the seed. Raises ValueError for fewer
    than 2 probes, and ArithmeticError as `log_density`.
    """
    if probes < 2:
        raise ValueError(f"a standard error needs at least 2 probes, got {probes}")
    generator = torch.Generator(image.device).manual_seed(seed)
    shape = (probes, *image.shape[1:])
    signs = torch.randint(2, shape, generator=generator, device=image.device).to(image.dtype) * 2 - 1
    log_p = log_density(model, schedule, image.expand(shape), signs)
    bits = -log_p / (math.log(2) * image[0].numel()) + 7
    return bits.mean().item(), bits.std().item() / math.sqrt(probes)
