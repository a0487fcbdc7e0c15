"""The importance weights, and the form of every loss. Their sums are in test_derivations.py."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from test_unlearning import SETTINGS

from minisiss import losses, unlearning
from minisiss.schedule import NoiseSchedule, broadcast

SCHEDULE = NoiseSchedule.linear()
LAMBDAS = [0.0, 1e-6, 0.5, 1 - 1e-6, 1.0]
DIGITS, FACES = (1, 28, 28), (3, 256, 256)


def draw(shape, timestep, source="x", dtype=torch.float64):
    """m, x, a, γ, σ of smooth pictures with the contrast of photographs; m is made of `source`."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(8, shape[0], 7, 7, generator=generator) * 2 - 1
    fine = torch.rand(8, *shape, generator=generator) * 0.2 - 0.1
    images = F.interpolate(coarse, shape[1:], mode="bilinear") + fine
    x, a = images.clamp(-1, 1).to(dtype).split(4)
    noise = torch.randn(x.shape, generator=generator).to(dtype)
    gamma, sigma = (v[timestep].to(dtype).expand(4) for v in (SCHEDULE.gamma, SCHEDULE.sigma))
    clean = {"x": x, "a": a}[source]
    return broadcast(gamma, x) * clean + broadcast(sigma, x) * noise, x, a, gamma, sigma


def distances(m, x, a, gamma, sigma):
    """−log q(m|x) and −log q(m|a), up to a constant: ‖m − γx‖²/2σ² and ‖m − γa‖²/2σ²."""
    residuals = (m - broadcast(gamma, m) * image for image in (x, a))
    return [r.square().flatten(1).sum(dim=1) / (2 * sigma**2) for r in residuals]


CASES = list(product([DIGITS, FACES], [0, 300, 999], ["x", "a"]))


@pytest.mark.parametrize("shape, timestep, source", CASES)
def test_weights_are_finite_bounded_and_sum_to_one(shape, timestep, source):
    arguments = draw(shape, timestep, source)
    for lam in LAMBDAS:
        w_x, w_a = losses.importance_weights(*arguments, lam)
        assert ((1 - lam) * w_x + lam * w_a - 1).abs().max() < 1e-10
        # At λ = 0 and 1 one of the weights has no bound, but stays finite.
        for weight, share in ((w_x, 1 - lam), (w_a, lam)):
            assert 0 <= weight.min() <= weight.max() < 1e18
            assert (weight * share <= 1 + 1e-12).all()


@pytest.mark.parametrize("shape, timestep, source", CASES)
def test_float32_weights_match_float64_ones(shape, timestep, source):
    arguments = draw(shape, timestep, source, torch.float32)
    in_float64 = [value.double() for value in arguments]
    for lam in LAMBDAS:
        single = losses.importance_weights(*arguments, lam)
        double = losses.importance_weights(*in_float64, lam)
        for w32, w64 in zip(single, double, strict=True):
            assert w32.dtype == torch.float32
            # Relative above 1: a weight can be 1/λ = 1e6, which float32 holds to 0.06.
            assert ((w32 - w64).abs() <= 1e-5 * w64.clamp(min=1)).all()


@pytest.mark.parametrize("source", ["x", "a"])
@pytest.mark.parametrize("timestep", [300, 700, 999])
@pytest.mark.parametrize("lam", [0.1, 0.5, 0.9])
def test_weights_are_ratios_of_densities(lam, timestep, source):
    arguments = draw(DIGITS, timestep, source)
    to_x, to_a = distances(*arguments)
    nearest = torch.minimum(to_x, to_a)  # both densities are divided by the larger one
    q_x, q_a = (nearest - to_x).exp(), (nearest - to_a).exp()
    mixture = (1 - lam) * q_x + lam * q_a
    w_x, w_a = losses.importance_weights(*arguments, lam)
    torch.testing.assert_close(w_x, q_x / mixture, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(w_a, q_a / mixture, rtol=1e-9, atol=1e-12)


def test_literal_formula_is_off_on_faces():
    arguments = draw(FACES, 990, dtype=torch.float32)
    exact, _ = losses.importance_weights(*(value.double() for value in arguments), 0.5)
    to_x, to_a = distances(*arguments)
    literal = 1 / (0.5 + 0.5 * (to_x - to_a).exp())
    ours, _ = losses.importance_weights(*arguments, 0.5)
    assert (literal - exact).abs().max() > 1e-3
    assert (ours - exact).abs().max() < 1e-6


def test_worked_example_by_hand():
    # One pixel: x = 1, a = −1, γ = 0.6, σ = 0.8, m = 0.6, λ = 0.5.
    x, a, m = torch.tensor([1.0, -1.0, 0.6]).view(3, 1, 1, 1, 1)
    gamma, sigma = torch.tensor([0.6]), torch.tensor([0.8])
    w_x, w_a = losses.importance_weights(m, x, a, gamma, sigma, 0.5)
    assert (w_a / w_x).log().item() == pytest.approx(-1.125, rel=1e-5)  # Δ
    assert w_x.item() == pytest.approx(1.510, abs=5e-4)
    assert w_a.item() == pytest.approx(0.490, abs=5e-4)
    assert (w_x + w_a).item() / 2 == pytest.approx(1)


@pytest.mark.parametrize("lam", [-0.1, 1.1, float("nan")])
def test_lambda_outside_its_range_is_refused(lam):
    with pytest.raises(ValueError, match="lam must lie in"):
        losses.importance_weights(*draw(DIGITS, 300), lam)


def test_mixture_takes_a_where_pick_is_below_lambda():
    x, a, noise = torch.randn(3, 4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    pick = torch.tensor([0.0, 0.29, 0.31, 0.99])
    gamma, sigma = torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    for lam, sources in ((0.3, [a, a, x, x]), (0.0, [x] * 4), (1.0, [a] * 4)):
        m = losses.sample_mixture(x, a, noise, pick, gamma, sigma, lam)
        for i, source in enumerate(sources):
            torch.testing.assert_close(m[i], gamma[i] * source[i] + sigma[i] * noise[i])


def test_squared_error_is_a_mean_over_pixels():
    target, prediction = torch.tensor([[[1.0, 5.0], [2.0, 2.0]], [[0.0, 2.0], [2.0, 2.0]]])
    assert losses.squared_error(target, prediction).tolist() == [5.0, 0.0]


def loss_of(name, model, shape):
    """A method's loss on a batch of images of two numbers, in any shape."""
    generator = torch.Generator().manual_seed(0)
    x, a, noise, uniform = torch.randn(4, 16, *shape, generator=generator)
    timesteps = torch.randint(1000, (16,), generator=generator)
    pick = torch.rand(16, generator=generator)
    batch = losses.Batch(x, a, timesteps, noise, pick, uniform, n=100, k=10, x_from="rest")
    return unlearning.METHODS[name].loss_of(model, SCHEDULE, SETTINGS)(batch)


CALLS = dict(siss=1, siss_no_is=2, naive_deletion=1, neggrad=1, erasediff=2, retrack=2, old_targets=1)


# `old_targets` exchanges rows and columns, which points do not have.
@pytest.mark.parametrize("name", [name for name in CALLS if name != "old_targets"])
@pytest.mark.parametrize("shape", [(2,), (1, 2)], ids=["[B, D]", "[B, C, L]"])
def test_losses_of_points_are_those_of_pictures(name, shape):
    values = loss_of(name, lambda m, t: 0.5 * m, shape)
    as_pictures = loss_of(name, lambda m, t: 0.5 * m, (2, 1, 1))
    for value, as_picture in zip(values, as_pictures, strict=True):
        assert value.shape == (16,)
        assert torch.equal(value, as_picture)


@pytest.mark.parametrize("name, calls", CALLS.items())
def test_siss_calls_network_once_and_no_is_twice(name, calls):
    sizes = []

    def model(m, t):
        sizes.append(len(m))
        return 0.5 * m

    loss_of(name, model, (2, 1, 1))
    assert sizes == [16] * calls  # each call has the batch's own size
