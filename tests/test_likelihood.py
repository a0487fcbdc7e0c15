"""The likelihood of an image, held against Gaussians, whose noisy images are Gaussian too."""

import itertools
import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from minisiss.lab.metrics import bits_per_dimension, log_density
from minisiss.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule.linear(beta_end=0.025)  # so that little is left of the image at T−1
TIMES = (SCHEDULE.sigma.double() / SCHEDULE.gamma.double()).log()  # ℓ_t


def normal(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def noisy(mean, cov, time):
    """Mean and covariance of images of N(μ, S) with the noise of a time ℓ: σ² = sigmoid(2ℓ)."""
    variance = torch.sigmoid(2 * time)
    cov = (1 - variance) * cov + variance * torch.eye(len(cov), dtype=cov.dtype)
    return (1 - variance).sqrt() * mean, cov


def denoiser(mean, cov):
    """ε*(m, τ) = σ (γ² S + σ² I)⁻¹ (m − γ μ) of data N(μ, S), at real timesteps τ."""

    def model(m, timesteps):
        below = timesteps[0].floor().long().clamp(max=len(TIMES) - 2)
        time = torch.lerp(TIMES[below], TIMES[below + 1], timesteps[0] - below)
        noisy_mean, noisy_cov = noisy(mean, cov, time)
        rest = m.flatten(1) - noisy_mean
        return (torch.sigmoid(2 * time).sqrt() * torch.linalg.solve(noisy_cov, rest.T).T).view_as(m)

    return model


def density(x, mean, cov):
    """log p(x) of images with the noise of t = 0."""
    return MultivariateNormal(*noisy(mean, cov, TIMES[0])).log_prob(x.flatten(1))


def bits(log_p, dimensions):
    return -log_p / (dimensions * math.log(2))


@pytest.fixture(params=[[0.5] * 6, [0.05, 0.1, 0.3, 0.5, 1.0, 2.0]], ids=["isotropic", "diagonal"])
def case(request):
    """Mean, covariance, five images, and probes: exact ones, as the Jacobian is diagonal."""
    mean, cov = torch.zeros(6).double(), torch.tensor(request.param).double().square().diag()
    x = (normal(5, 6, seed=1) @ cov.sqrt()).view(5, 1, 2, 3)
    return mean, cov, x, normal(5, 1, 2, 3, seed=2).sign()


def test_log_density_is_that_of_gaussian_data(case):
    mean, cov, x, probes = case
    found = log_density(denoiser(mean, cov), SCHEDULE, x, probes)
    assert bits(found - density(x, mean, cov), 6).abs().max() < 1e-4


def test_half_the_step_has_a_sixteenth_error(case):
    mean, cov, x, probes = case
    errors = []
    for steps in (10, 20, 40):
        found = log_density(denoiser(mean, cov), SCHEDULE, x, probes, steps)
        errors.append(bits(found - density(x, mean, cov), 6).abs().max().item())
    for error, error_of_half in itertools.pairwise(errors):
        assert error > 10 * error_of_half  # order 4: 16 times; order 3: 8 times


def test_the_mean_over_probes_is_the_exact_trace():
    root = normal(4, 4, seed=3)
    mean, cov = 0.3 * normal(4, seed=4), root @ root.T / 4
    signs = list(itertools.product([-1.0, 1.0], repeat=4))  # all probes of ±1
    probes = torch.tensor(signs, dtype=torch.float64).view(16, 1, 2, 2)
    x = (mean + normal(1, 4, seed=5) @ root.T / 2).view(1, 1, 2, 2)
    found = log_density(denoiser(mean, cov), SCHEDULE, x.expand(16, -1, -1, -1), probes)
    assert found.std() > 0.1
    assert found.mean().item() == pytest.approx(density(x, mean, cov).item(), abs=1e-3)


def test_bits_per_dimension_add_7_to_density():
    mean, cov = torch.full((4,), 0.1).double(), 0.04 * torch.eye(4).double()
    image = 0.1 + 0.2 * normal(1, 1, 2, 2, seed=7)
    found = bits_per_dimension(denoiser(mean, cov), SCHEDULE, image, probes=2)
    assert found == pytest.approx(bits(density(image, mean, cov), 4).item() + 7, abs=1e-4)
