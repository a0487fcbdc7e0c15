import itertools
import math

import pytest
import torch
from torch import Tensor

from minisiss.metrics.likelihood import ERROR, NODES, STAGES, bits_per_dimension, log_density, rk45
from minisiss.schedule import NoiseSchedule
from minisiss.unet import UNet, UNetConfig, timestep_embedding

SCHEDULE = NoiseSchedule.linear()


# --- the solver


def test_rk45_coefficients_meet_the_conditions_up_to_order_3():
    c = torch.tensor((0, *NODES), dtype=torch.float64)
    weights = torch.tensor((*STAGES[-1], 0), dtype=torch.float64)
    lower = weights - torch.tensor(ERROR, dtype=torch.float64)
    for node, row in zip(NODES, STAGES, strict=True):
        assert sum(row) == pytest.approx(node)
    for b in (weights, lower):
        for power in range(4):
            assert (b * c**power).sum().item() == pytest.approx(1 / (power + 1))
    assert (weights * c**4).sum().item() == pytest.approx(1 / 5)  # order 5 …
    assert abs((lower * c**4).sum().item() - 1 / 5) > 1e-4  # … against order 4


@pytest.mark.parametrize(("tolerance", "most_calls"), [(1e-4, 150), (1e-8, 800)])
def test_rk45_follows_an_oscillator(tolerance, most_calls):
    calls = []

    def oscillator(t: float, y: Tensor) -> Tensor:
        calls.append(t)
        return torch.stack([y[1], -y[0]])

    y = rk45(oscillator, torch.tensor([0.0, 1.0], dtype=torch.float64), 0.0, 10.0, tolerance, tolerance)
    assert y.tolist() == pytest.approx([math.sin(10), math.cos(10)], abs=30 * tolerance)
    assert len(calls) < most_calls and max(calls) == 10.0


def test_rk45_passes_the_time_to_f():
    y = rk45(lambda t, y: math.cos(t) * y, torch.ones(1, dtype=torch.float64), 1.0, 4.0, 1e-9, 1e-9)
    assert y.item() == pytest.approx(math.exp(math.sin(4) - math.sin(1)), abs=1e-7)


def test_rk45_takes_smaller_steps_where_the_solution_is_fast():
    """dy/dt = −y/t from 10⁻⁴, the stiffness of the probability flow near the image: y = y_0 t_0/t."""
    y = rk45(lambda t, y: -y / t, torch.ones(1, dtype=torch.float64), 1e-4, 1.0, 1e-8, 1e-12)
    assert y.item() == pytest.approx(1e-4, rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rk45_stops_where_f_is_not_finite(bad):
    with pytest.raises(ArithmeticError, match="past t = 0"):
        rk45(lambda t, y: torch.full_like(y, bad if t > 0.5 else 1.0), torch.zeros(2), 0.0, 1.0, 1e-5, 1e-5)


def test_rk45_gives_up_on_what_takes_too_many_steps():
    with pytest.raises(ArithmeticError, match="past t = 0.0"):
        rk45(lambda t, y: torch.cos(1e6 * torch.tensor([t])), torch.zeros(1), 0.0, 1.0, 1e-9, 1e-9)


# --- the likelihood, on Gaussian data N(μ, S), where every m_t is Gaussian and the flow is known


def log_alpha(timesteps: Tensor) -> Tensor:
    """log ᾱ at real timesteps: straight lines between the schedule's values."""
    known = torch.log1p(-SCHEDULE.betas.double()).cumsum(0)
    below = timesteps.floor().long().clamp(max=len(SCHEDULE) - 2)
    return torch.lerp(known[below], known[below + 1], timesteps - below)


def gaussian_model(mean: Tensor, cov: Tensor, seen: list[float] | None = None):
    """ε*(m, τ) = σ (ᾱ S + σ² I)⁻¹ (m − γ μ), with real τ."""

    def model(x: Tensor, timesteps: Tensor) -> Tensor:
        if seen is not None:
            seen.extend(timesteps.tolist())
        alpha = log_alpha(timesteps).exp()[0]
        noisy_cov = alpha * cov + (1 - alpha) * torch.eye(len(cov), dtype=cov.dtype)
        residual = x.flatten(1) - alpha.sqrt() * mean
        return ((1 - alpha).sqrt() * torch.linalg.solve(noisy_cov, residual.T).T).reshape(x.shape)

    return model


def gaussian_log_density(x: Tensor, mean: Tensor, cov: Tensor) -> Tensor:
    return torch.distributions.MultivariateNormal(mean, cov).log_prob(x.flatten(1))


def flow_log_density(x: Tensor, mean: Tensor, cov: Tensor) -> Tensor:
    """What the flow that ends in N(0, I) makes of x: it takes m − γ μ to (S_T S_0⁻¹)^½ (m − γ μ), S_t = ᾱ S + σ² I."""
    values, vectors = torch.linalg.eigh(cov)
    start, end = log_alpha(torch.tensor([0.0, len(SCHEDULE) - 1], dtype=torch.float64)).exp()
    stretch = ((end * values + 1 - end) / (start * values + 1 - start)).sqrt()
    moved = (x.flatten(1) - start.sqrt() * mean) @ vectors * stretch @ vectors.T + end.sqrt() * mean
    return gaussian_log_density(moved, torch.zeros_like(mean), torch.eye(len(mean), dtype=mean.dtype)) + stretch.log().sum()


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bits(log_p: Tensor, d: int) -> Tensor:
    return -log_p / (d * math.log(2))


@pytest.mark.parametrize("std", [[0.5] * 6, [0.05, 0.1, 0.3, 0.5, 1.0, 2.0]], ids=["isotropic", "diagonal"])
@pytest.mark.parametrize(("scale", "within"), [(0.0, 5e-4), (0.5, 5e-3)], ids=["centred", "off centre"])
def test_log_density_of_gaussian_data_with_a_diagonal_covariance(std, scale, within):
    """The Jacobian is diagonal, so that a single probe of ±1 gives its trace exactly."""
    mean, cov = scale * draw(6, seed=0), torch.tensor(std, dtype=torch.float64).square().diag()
    x = (mean + draw(5, 6, seed=1) @ cov.sqrt()).reshape(5, 1, 2, 3)
    seen: list[float] = []
    log_p = log_density(gaussian_model(mean, cov, seen), SCHEDULE, x, draw(5, 1, 2, 3, seed=2).sign())
    assert (bits(log_p, 6) - bits(flow_log_density(x, mean, cov), 6)).abs().max() < 5e-4
    # The data's own density, at the noise of t = 0. The flow's prior is N(0, I), off by the γ_{T−1} μ that is left of μ.
    noisy_cov = SCHEDULE.gamma[0].double() ** 2 * cov + SCHEDULE.sigma[0].double() ** 2 * torch.eye(6)
    exact = gaussian_log_density(x, SCHEDULE.gamma[0] * mean, noisy_cov)
    assert (bits(log_p, 6) - bits(exact, 6)).abs().max() < within
    assert min(seen) == 0 and max(seen) == 999 and any(tau % 1 for tau in seen)


def test_log_density_averages_its_probes_to_the_exact_trace():
    root = draw(4, 4, seed=3)
    mean, cov = 0.3 * draw(4, seed=4), root @ root.T / 4
    probes = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=4)), dtype=torch.float64).reshape(16, 1, 2, 2)
    x = (mean + draw(1, 4, seed=5) @ root.T / 2).reshape(1, 1, 2, 2)
    log_p = log_density(gaussian_model(mean, cov), SCHEDULE, x.expand(16, -1, -1, -1), probes, tolerance=1e-6)
    assert log_p.std() > 0.1  # one probe is a guess, all 2^4 are the trace
    assert log_p.mean().item() == pytest.approx(flow_log_density(x, mean, cov).item(), abs=1e-4)


def test_log_density_treats_each_image_of_a_batch_alone():
    mean, cov = torch.zeros(4, dtype=torch.float64), 0.2 * torch.eye(4, dtype=torch.float64)
    model, x = gaussian_model(mean, cov), draw(3, 1, 2, 2, seed=6)
    probes = torch.ones_like(x)
    together = log_density(model, SCHEDULE, x, probes, tolerance=1e-7)
    alone = torch.cat([log_density(model, SCHEDULE, x[i : i + 1], probes[i : i + 1], tolerance=1e-7) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_bits_per_dimension_adds_7_to_the_density_on_minus_1_to_1():
    mean, cov = torch.full((4,), 0.1, dtype=torch.float64), 0.04 * torch.eye(4, dtype=torch.float64)
    image = draw(1, 1, 2, 2, seed=7) * 0.2 + 0.1
    bpd, error = bits_per_dimension(gaussian_model(mean, cov), SCHEDULE, image, probes=2)
    assert bpd == pytest.approx(bits(flow_log_density(image, mean, cov), 4).item() + 7, abs=1e-3)
    assert error < 1e-9  # every probe is exact here


def test_bits_per_dimension_reports_the_spread_of_its_probes():
    root = draw(4, 4, seed=3)
    mean, cov = torch.zeros(4, dtype=torch.float64), root @ root.T / 4
    model, image = gaussian_model(mean, cov), draw(1, 1, 2, 2, seed=8)
    exact = bits(flow_log_density(image, mean, cov), 4).item() + 7
    bpd, error = bits_per_dimension(model, SCHEDULE, image, probes=64)
    few, few_error = bits_per_dimension(model, SCHEDULE, image, probes=8)
    assert 0 < error < 0.7 * few_error
    assert abs(bpd - exact) < 3 * error and abs(few - exact) < 3 * few_error
    assert bits_per_dimension(model, SCHEDULE, image, probes=8) == (few, few_error)
    assert bits_per_dimension(model, SCHEDULE, image, probes=8, seed=1) != (few, few_error)


def test_bits_per_dimension_needs_two_probes():
    with pytest.raises(ValueError, match="got 1"):
        bits_per_dimension(lambda x, t: x, SCHEDULE, torch.zeros(1, 1, 2, 2), probes=1)


def test_bits_per_dimension_of_an_untrained_network_that_predicts_no_noise():
    """Then dm/du = −m/2 in closed form: the U-Net in float32, at real timesteps, through its gradient."""
    model = UNet(UNetConfig(image_size=4, channels=(8,), layers_per_block=1, attention_levels=(), norm_groups=4))
    image, d = draw(1, 1, 4, 4, seed=9).float().clamp(-1, 1), 16
    span = -math.log(SCHEDULE.alphas_cumprod[-1] / SCHEDULE.alphas_cumprod[0])
    log_p = -0.5 * (math.exp(-span) * image.square().sum().item() + d * math.log(2 * math.pi)) - 0.5 * d * span
    bpd, error = bits_per_dimension(model, SCHEDULE, image, probes=2)
    assert bpd == pytest.approx(-log_p / (d * math.log(2)) + 7, abs=1e-3)
    assert error == 0


def test_the_time_embedding_does_not_round_real_timesteps():
    embedding = timestep_embedding(torch.tensor([10.5], dtype=torch.float64), 4, flip_sin_to_cos=False, freq_shift=0)
    sines, cosines = [math.sin(10.5), math.sin(0.105)], [math.cos(10.5), math.cos(0.105)]
    assert embedding[0].tolist() == pytest.approx(sines + cosines, abs=1e-6)
