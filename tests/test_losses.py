"""The importance weights and the mixture; what the losses add up to is in test_derivations.py."""

import math
from dataclasses import replace

import pytest
import torch

from minisiss import losses
from minisiss.losses import importance_weights, sample_mixture
from minisiss.schedule import NoiseSchedule, broadcast

SCHEDULE = NoiseSchedule.linear()
SCHEDULE64 = NoiseSchedule(*(values.double() for values in vars(SCHEDULE).values()))
LAMBDAS = [0.0, 1e-6, 0.5, 1 - 1e-6, 1.0]
SHAPES = [(1, 28, 28), (3, 256, 256)]


def pictures(shape, dtype, seed=0):
    """Smooth random pictures in [−1, 1] with as much contrast as photographs have: x and a, [4, C, H, W] each."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand(8, shape[0], 7, 7, generator=rng) * 2 - 1
    fine = torch.rand(8, *shape, generator=rng) * 0.2 - 0.1
    images = (torch.nn.functional.interpolate(coarse, shape[1:], mode="bilinear") + fine).clamp(-1, 1)
    return images.to(dtype).split(4)


def noisy(x, timestep, seed=1):
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x.dtype)
    gamma, sigma = (values[torch.full((len(x),), timestep)].to(x.dtype) for values in (SCHEDULE.gamma, SCHEDULE.sigma))
    return broadcast(gamma, x) * x + broadcast(sigma, x) * noise, gamma, sigma


def literal_weights(m, x, a, gamma, sigma, lam):
    """The definition, in float64: a ratio of densities, each divided by the larger one."""
    log_x = -(m - broadcast(gamma, m) * x).square().flatten(1).sum(1) / (2 * sigma**2)
    log_a = -(m - broadcast(gamma, m) * a).square().flatten(1).sum(1) / (2 * sigma**2)
    largest = torch.maximum(log_x, log_a)
    q_x, q_a = (log_x - largest).exp(), (log_a - largest).exp()
    mixture = (1 - lam) * q_x + lam * q_a
    return q_x / mixture, q_a / mixture


@pytest.mark.parametrize("shape", SHAPES, ids=["28", "256"])
@pytest.mark.parametrize("timestep", [0, 300, 999])
@pytest.mark.parametrize("source", ["x", "a"])
@pytest.mark.parametrize("lam", LAMBDAS)
def test_weights_are_finite_bounded_and_sum_to_one(shape, timestep, source, lam):
    x, a = pictures(shape, torch.float64)
    m, gamma, sigma = noisy({"x": x, "a": a}[source], timestep)
    w_x, w_a = importance_weights(m, x, a, gamma, sigma, lam)
    assert w_x.shape == w_a.shape == (4,)
    assert w_x.isfinite().all() and w_a.isfinite().all()
    drawn = lam not in (0.0, 1.0) or source == ("a" if lam else "x")  # can the proposal draw this m at all?
    total = (1 - lam) * w_x + lam * w_a
    assert torch.allclose(total, torch.ones(4, dtype=torch.float64), atol=1e-10) or not drawn
    assert (w_x >= 0).all() and (w_a >= 0).all()
    if lam < 1:
        assert (w_x <= 1 / (1 - lam) * (1 + 1e-12)).all()
    if lam > 0:
        assert (w_a <= 1 / lam * (1 + 1e-12)).all()


@pytest.mark.parametrize("shape", SHAPES, ids=["28", "256"])
@pytest.mark.parametrize("timestep", [0, 300, 999])
@pytest.mark.parametrize("source", ["x", "a"])
@pytest.mark.parametrize("lam", LAMBDAS)
def test_float32_weights_match_float64_ones(shape, timestep, source, lam):
    x, a = pictures(shape, torch.float32)
    m, gamma, sigma = noisy({"x": x, "a": a}[source], timestep)
    single = importance_weights(m, x, a, gamma, sigma, lam)
    double = importance_weights(*(value.double() for value in (m, x, a, gamma, sigma)), lam)
    for w32, w64 in zip(single, double, strict=True):
        assert w32.dtype == torch.float32
        # Absolute up to 1, relative above: a weight can be 1/λ = 1e6, which float32 holds to 0.06.
        assert ((w32 - w64).abs() <= 1e-5 * w64.clamp(min=1)).all()


@pytest.mark.parametrize("lam", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("timestep", [300, 700, 999])
def test_weights_are_the_ratios_of_densities_that_define_them(lam, timestep):
    x, a = pictures((1, 28, 28), torch.float64)
    for source in (x, a):
        m, gamma, sigma = noisy(source, timestep)
        for ours, literal in zip(importance_weights(m, x, a, gamma, sigma, lam), literal_weights(m, x, a, gamma, sigma, lam), strict=True):
            assert torch.allclose(ours, literal, rtol=1e-9, atol=1e-12)


def test_the_literal_formula_is_off_on_faces_where_ours_is_not():
    # Why Δ is not computed as a difference of squared distances.
    x, a = pictures((3, 256, 256), torch.float32)
    m, gamma, sigma = noisy(x, 990)
    exact = importance_weights(*(value.double() for value in (m, x, a, gamma, sigma)), 0.5)[0]
    distance = lambda z: (m - broadcast(gamma, m) * z).square().flatten(1).sum(1) / (2 * sigma**2)  # noqa: E731
    literal = 1 / (0.5 + 0.5 * (distance(x) - distance(a)).exp())
    ours = importance_weights(m, x, a, gamma, sigma, 0.5)[0]
    assert (literal - exact).abs().max() > 1e-3
    assert (ours - exact).abs().max() < 1e-6


def test_equal_images_have_weight_one():
    x, _ = pictures((1, 28, 28), torch.float64)
    for lam in LAMBDAS:
        m, gamma, sigma = noisy(x, 400)
        for weight in importance_weights(m, x, x, gamma, sigma, lam):
            assert torch.allclose(weight, torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("lam", [-0.1, 1.1, float("nan")])
def test_a_lambda_outside_its_range_is_refused(lam):
    x, a = pictures((1, 28, 28), torch.float32)
    with pytest.raises(ValueError, match="lam"):
        importance_weights(x, x, a, torch.ones(4), torch.ones(4), lam)


def test_the_mixture_takes_a_where_pick_is_below_lambda():
    x, a, noise = torch.randn(3, 4, 1, 2, 2)
    pick = torch.tensor([0.0, 0.29, 0.31, 0.99])
    gamma, sigma = torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    m = sample_mixture(x, a, noise, pick, gamma, sigma, 0.3)
    for i, source in enumerate([a, a, x, x]):
        assert torch.allclose(m[i], gamma[i] * source[i] + sigma[i] * noise[i])
    assert torch.allclose(sample_mixture(x, a, noise, pick, gamma, sigma, 0.0), broadcast(gamma, x) * x + broadcast(sigma, x) * noise)
    assert torch.allclose(sample_mixture(x, a, noise, pick, gamma, sigma, 1.0), broadcast(gamma, x) * a + broadcast(sigma, x) * noise)


def test_the_network_runs_only_on_the_images_that_count_in_a_term():
    seen = []
    model = lambda m, t: seen.append(len(m)) or torch.zeros_like(m)  # noqa: E731
    weight = torch.tensor([0.0, 0.5, 1e-9, 2.0])
    term = losses.Term(model, torch.zeros(4, 1, 2, 2), torch.zeros(4, dtype=torch.long), torch.ones(4, 1, 2, 2), weight)
    assert term.counts.tolist() == [False, True, False, True]
    assert term.per_image(term.counts.nonzero()[:, 0]).tolist() == [0.5, 2.0]
    assert seen == [2]


def test_a_term_of_negative_weights_counts_and_small_weights_count_if_all_are_small():
    """A loss of one's own may have either; what is negligible depends on the largest weight of the batch."""
    term = losses.Term(None, None, None, None, torch.tensor([-1.0, 1e-9, -1e-9, 0.0]))
    assert term.counts.tolist() == [True, False, False, False]
    assert replace(term, weight=term.weight * 1e-9).counts.tolist() == [True, False, False, False]
    assert not replace(term, weight=torch.zeros(4)).counts.any()


@pytest.mark.parametrize("shape", [(2,), (1, 2)], ids=["[B, D]", "[B, C, L]"])
@pytest.mark.parametrize("loss", [losses.siss, losses.siss_no_is, losses.naive_deletion, losses.neggrad, losses.erasediff, losses.retrack])
def test_losses_of_points_are_those_of_pictures_of_one_pixel_a_channel(loss, shape):
    rng, as_picture = torch.Generator().manual_seed(0), (2, 1, 1)
    x, a, noise, uniform = torch.randn(4, 64, 2, generator=rng)
    timesteps, pick = torch.randint(1000, (64,), generator=rng), torch.rand(64, generator=rng)
    neighbours = torch.randn(1, 3, 2, generator=rng)
    values = {}
    for form in (shape, as_picture):
        pictures = (value.view(64, *form) for value in (x, a))
        batch = losses.Batch(*pictures, timesteps, noise.view(64, *form), pick, uniform.view(64, *form), 100, 10, "rest",
                             neighbours.view(1, 3, *form))
        settings = {losses.siss: [0.5], losses.retrack: [0.1]}.get(loss, [])
        terms = loss(lambda m, t: 0.5 * m, batch, SCHEDULE, *settings)
        values[form] = [(term.noisy.flatten(1), term.weight, term.per_image()) for term in (terms.keep, terms.forget) if term]
    for one, other in zip(*values.values(), strict=True):
        assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def test_the_worked_example_by_hand():
    """The README's: one pixel, x = 1, a = −1, γ = 0.6, σ = 0.8, m = 0.6, λ = 0.5, so that Δ = −1.125."""
    one = lambda value: torch.tensor([value]).reshape(1, 1, 1, 1)  # noqa: E731
    gamma, sigma = torch.tensor([0.6]), torch.tensor([0.8])
    w_x, w_a = importance_weights(one(0.6), one(1.0), one(-1.0), gamma, sigma, 0.5)
    assert (w_x / w_a).log().item() == pytest.approx(1.125, rel=1e-5)
    assert (round(w_x.item(), 3), round(w_a.item(), 3)) == (1.510, 0.490) and (w_x + w_a).item() == pytest.approx(2)


def spread(seed=0, size=6, count=5, pixels=4, near=1.0):
    """Noisy images around points a, and points near them: m, points [size, count, …], timesteps, float64."""
    rng = torch.Generator().manual_seed(seed)
    a = torch.randn(size, 1, 1, pixels, generator=rng, dtype=torch.float64)
    points = a[:, None] + near * torch.randn(size, count, 1, 1, pixels, generator=rng, dtype=torch.float64)
    timesteps = torch.tensor([0, 50, 200, 400, 700, 999])
    noise = torch.randn(a.shape, generator=rng, dtype=torch.float64)
    return SCHEDULE64.add_noise(a, noise, timesteps), points, timesteps


def slow_ideal_noise(m, points, gamma, sigma):
    """Σ_i w_i v_i as it is written: v_i = (m − γ x_i)/σ, w = softmax_i(−‖v_i‖²/2), an image and a point at a time."""
    out = []
    for image, of_image, g, s in zip(m, points, gamma, sigma, strict=True):
        residuals = [(image - g * point) / s for point in of_image]
        logits = [-(residual.square().sum() / 2).item() for residual in residuals]
        shares = [math.exp(logit - max(logits)) for logit in logits]
        out.append(sum(share / sum(shares) * residual for share, residual in zip(shares, residuals, strict=True)))
    return torch.stack(out)


@pytest.mark.parametrize("near", [1.0, 0.01])
def test_the_ideal_noise_is_the_literal_sum(near):
    m, points, timesteps = spread(near=near)
    gamma, sigma = SCHEDULE64.gamma[timesteps], SCHEDULE64.sigma[timesteps]
    literal = slow_ideal_noise(m, points, gamma, sigma)
    assert (losses.ideal_noise(m, points, gamma, sigma) - literal).abs().max() < 1e-9
    single = losses.ideal_noise(*(values.float() for values in (m, points, gamma, sigma)))
    assert (single - literal).abs().max() < 1e-3 and single.isfinite().all()
    # The same points for all images: a matrix product.
    shared = losses.ideal_noise(m, points[:1], gamma, sigma)
    assert (shared - slow_ideal_noise(m, points[:1].expand_as(points), gamma, sigma)).abs().max() < 1e-9


def test_the_ideal_noise_of_one_point_leads_to_that_point():
    m, points, timesteps = spread(count=1)
    gamma, sigma = (values[timesteps].reshape(-1, 1, 1, 1) for values in (SCHEDULE64.gamma, SCHEDULE64.sigma))
    noise = losses.ideal_noise(m, points, gamma.flatten(), sigma.flatten())
    assert (((m - sigma * noise) / gamma - points[:, 0]).abs() / (sigma / gamma)).max() < 1e-9


def test_the_ideal_noise_is_not_rounded_to_bf16():
    m, points, timesteps = (values.float() if values.is_floating_point() else values for values in spread(near=0.01))
    gamma, sigma = SCHEDULE64.gamma[timesteps].float(), SCHEDULE64.sigma[timesteps].float()
    plain = losses.ideal_noise(m, points, gamma, sigma)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(losses.ideal_noise(m, points, gamma, sigma), plain)


def test_retracks_gradient_is_that_of_the_weighted_errors_to_each_neighbour():
    # The paper's L_unlearn = Σ_i w_i ‖v_i − ε_θ‖² differs from ‖Σ_i w_i v_i − ε_θ‖² by what does not depend on θ.
    m, points, timesteps = spread()
    gamma, sigma = SCHEDULE64.gamma[timesteps], SCHEDULE64.sigma[timesteps]
    prediction = torch.randn(m.shape, dtype=torch.float64, requires_grad=True)
    residuals = (m[:, None] - broadcast(gamma, m)[:, None] * points) / broadcast(sigma, m)[:, None]
    shares = (-residuals.square().sum(dim=(2, 3, 4)) / 2).softmax(dim=1)
    literal = (shares * (residuals - prediction[:, None]).square().sum(dim=(2, 3, 4))).sum()
    ours = (losses.ideal_noise(m, points, gamma, sigma) - prediction).square().sum()
    for g, h in zip(*(torch.autograd.grad(loss, prediction) for loss in (literal, ours)), strict=True):
        assert (g - h).abs().max() < 1e-9


def test_unseen_asks_the_old_model_of_x_and_of_a_with_rows_and_columns_exchanged():
    rng = torch.Generator().manual_seed(0)
    x, a, noise = torch.randn(3, 6, 1, 3, 3, generator=rng)
    batch = losses.Batch(x, a, torch.tensor([0, 100, 300, 500, 700, 999]), noise, torch.rand(6, generator=rng), noise, 9, 3, "rest")
    scale, asked = torch.arange(9.0).view(3, 3).requires_grad_(), []

    def old(m, t):  # another factor for each pixel
        asked.append(len(m))
        return m * scale + t[:, None, None, None]

    ours, theirs = losses.unseen(None, batch, SCHEDULE, 0.3, 25.0, old), losses.siss(None, batch, SCHEDULE, 0.3)
    m, some = theirs.keep.noisy, torch.tensor([1, 4])
    t = batch.timesteps[some, None, None, None]
    assert torch.equal(ours.keep.target[some], m[some] * scale + t)
    assert torch.equal(ours.forget.target[some], m[some] * scale.T + t)
    assert asked == [2, 2]  # only of the images that are asked for
    assert not ours.keep.target[some].requires_grad and not ours.forget.target[some].requires_grad
    assert torch.equal(ours.keep.weight, theirs.keep.weight) and torch.allclose(ours.forget.weight, 25 * theirs.forget.weight)
    assert torch.equal(ours.keep.noisy, m) and ours.keep.noisy is ours.forget.noisy


def test_retracks_terms_weigh_l_unlearn_by_lambda_and_the_kept_loss_by_the_rest():
    _, points, timesteps = spread()
    x, a, noise = (torch.randn(6, 1, 1, 4, dtype=torch.float64) for _ in range(3))
    batch = losses.Batch(x, a, timesteps, noise, torch.zeros(6), noise, 5, 2, "rest", points)
    terms = losses.retrack(None, batch, SCHEDULE64, 0.2)
    assert (terms.keep.weight == 0.8).all() and (terms.forget.weight == 0.2).all()
    assert torch.equal(terms.keep.noisy, SCHEDULE64.add_noise(x, noise, timesteps)) and torch.equal(terms.keep.target, noise)
    assert torch.equal(terms.forget.noisy, SCHEDULE64.add_noise(a, noise, timesteps))
    literal = slow_ideal_noise(terms.forget.noisy, points, SCHEDULE64.gamma[timesteps], SCHEDULE64.sigma[timesteps])
    assert (terms.forget.target - literal).abs().max() < 1e-9
