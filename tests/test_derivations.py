"""The paper's claims about its losses, each proven through the code that runs.

In one dimension the expectations over x, a, the mixture's choice and the noise are finite sums of Gaussian integrals.
Gauss–Hermite quadrature evaluates those to rounding in float64, so "equal in expectation" is tested as equal.
Change a sign or a factor in losses.py, and one of these tests says which claim broke.
"""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from conftest import randomise

from minisiss import losses
from minisiss.data.training_set import TrainingSet
from minisiss.losses import Batch
from minisiss.schedule import NoiseSchedule
from minisiss.unet import UNet, UNetConfig
from minisiss.unlearning import draw_batch

SINGLE = NoiseSchedule.linear()
SCHEDULE = NoiseSchedule(*(values.double() for values in vars(SINGLE).values()))
KEEP, FORGET = [-0.9, -0.4, 0.7], [0.1, 0.45]  # X∖A and A: one-pixel images
X = KEEP + FORGET
N, K = len(X), len(FORGET)
FORMS = [X, KEEP]  # x ~ X, the paper's main text; x ~ X∖A, its appendix A.1
TIMESTEPS = [300, 600, 999]
# 100 nodes integrate polynomials up to degree 199 against the Gaussian exactly. The weights are no polynomials, but
# smooth: a logistic function of the noise with slope r = γ_t |x − a|/σ_t < 1.4 here, whose nearest pole is π/r away.
NODES, NODE_WEIGHTS = np.polynomial.hermite_e.hermegauss(100)
NODE_WEIGHTS = NODE_WEIGHTS / NODE_WEIGHTS.sum()


class Network(torch.nn.Module):
    """An arbitrary non-linear ε_θ(m, t) of one pixel, in float64."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.nn.Parameter(torch.randn(shape, generator=rng, dtype=torch.float64))  # noqa: E731
        self.input, self.time, self.bias, self.output = draw(8), draw(8), draw(8), draw(8)

    def forward(self, m, timesteps):
        hidden = torch.sin(m * self.input * 0.7 + timesteps.reshape(-1, 1, 1, 1) / 1000 * self.time + self.bias)
        return (hidden * self.output).sum(dim=-1, keepdim=True)


def everything(timestep: int, lam: float, x_from: list[float]) -> tuple[Batch, torch.Tensor]:
    """All that can be drawn at a timestep, as one batch, and the probability of each of its images."""
    rows = list(itertools.product(x_from, FORGET, [(0.0, lam), (1.0, 1 - lam)], zip(NODES, NODE_WEIGHTS, strict=True)))
    x, a, pick, noise = (torch.tensor(values, dtype=torch.float64) for values in zip(*((x, a, p, z) for x, a, (p, _), (z, _) in rows), strict=True))
    probability = torch.tensor([p * w for _, _, (_, p), (_, w) in rows], dtype=torch.float64) / len(x_from) / K
    image = lambda values: values.reshape(-1, 1, 1, 1)  # noqa: E731
    timesteps = torch.full((len(rows),), timestep)
    return Batch(image(x), image(a), timesteps, image(noise), pick, image(pick), N, K, "all" if x_from is X else "rest"), probability


def expectation(loss, model, timestep: int, x_from: list[float], lam: float = 0.5, s: float = 0.0) -> torch.Tensor:
    """E[keep − c · forget] of a loss at one timestep, at the c of a superfactor s; differentiable."""
    batch, probability = everything(timestep, lam, x_from)
    terms = loss(model, batch, SCHEDULE)
    keep = (probability * terms.keep.per_image()).sum() if terms.keep else 0.0
    forget = (probability * terms.forget.per_image()).sum() if terms.forget else 0.0
    return keep - (terms.c_of_deletion + s) * forget


def siss(model, timestep, lam, x_from=X, s=0.0):
    return expectation(partial(losses.siss, lam=lam), model, timestep, x_from, lam, s)


def naive_deletion(model, timestep, on=KEEP):
    """L_S for the set S = `on`."""
    return expectation(losses.naive_deletion, model, timestep, on)


def integral(model, timestep, on):
    """L_S again, from its definition and without losses.py."""
    gamma, sigma = SCHEDULE.gamma[timestep], SCHEDULE.sigma[timestep]
    z, weights = torch.from_numpy(NODES), torch.from_numpy(NODE_WEIGHTS)
    total = 0.0
    for x in on:
        prediction = model((gamma * x + sigma * z).reshape(-1, 1, 1, 1), torch.full((len(z),), timestep)).flatten()
        total += (weights * (z - prediction).square()).sum() / len(on)
    return total


@pytest.mark.parametrize("timestep", TIMESTEPS)
def test_naive_deletion_is_the_loss_on_the_kept_set_and_neggrad_minus_the_loss_on_the_forget_set(timestep):
    model = Network()
    assert abs(naive_deletion(model, timestep) - integral(model, timestep, KEEP)) < 1e-10
    assert abs(expectation(losses.neggrad, model, timestep, X, s=1.0) + integral(model, timestep, FORGET)) < 1e-10


@pytest.mark.parametrize("timestep", TIMESTEPS)
def test_subtraction_identity(timestep):
    # L_{X∖A} = n/(n−k) L_X − k/(n−k) L_A: what SISS (No IS) computes at s = 0.
    model = Network()
    by_sets = N / (N - K) * integral(model, timestep, X) - K / (N - K) * integral(model, timestep, FORGET)
    assert abs(by_sets - integral(model, timestep, KEEP)) < 1e-10
    for x_from in FORMS:
        assert abs(expectation(losses.siss_no_is, model, timestep, x_from) - integral(model, timestep, KEEP)) < 1e-10


# At λ = 0 and 1 a weight is an unbounded exponential e^(r z) instead of a logistic function. The integrand then peaks at
# z = ±2r, still well inside the nodes' ±14 (r < 1.4), and loses a digit to the weights' size.
LAMBDAS = [(0.1, 1e-10), (0.5, 1e-10), (0.9, 1e-10), (0.0, 1e-9), (1.0, 1e-9)]


@pytest.mark.parametrize("timestep", TIMESTEPS)
@pytest.mark.parametrize("lam, tolerance", LAMBDAS)
@pytest.mark.parametrize("x_from", FORMS, ids=["X", "rest"])
def test_siss_at_s_0_is_naive_deletion_for_every_lambda(x_from, lam, tolerance, timestep):
    for seed in range(3):
        model = Network(seed)
        assert abs(siss(model, timestep, lam, x_from) - naive_deletion(model, timestep)) < tolerance


def subtracted(model, timestep, s):
    """L_{X∖A} − s · k/(n−k) · L_A."""
    return integral(model, timestep, KEEP) - s * K / (N - K) * integral(model, timestep, FORGET)


@pytest.mark.parametrize("timestep", TIMESTEPS)
@pytest.mark.parametrize("lam, tolerance", LAMBDAS)
@pytest.mark.parametrize("s", [0.5, 9.0])
@pytest.mark.parametrize("x_from", FORMS, ids=["X", "rest"])
def test_the_superfactor_subtracts_the_forget_sets_loss_s_times(x_from, s, lam, tolerance, timestep):
    for seed in range(3):
        model = Network(seed)
        difference = siss(model, timestep, lam, x_from, s) - subtracted(model, timestep, s)
        assert abs(difference) < (1 + s if tolerance > 1e-10 else 1) * tolerance


@pytest.mark.parametrize("lam, tolerance", LAMBDAS)
@pytest.mark.parametrize("s", [0.0, 9.0])
@pytest.mark.parametrize("x_from", FORMS, ids=["X", "rest"])
def test_so_does_its_gradient_in_every_parameter(x_from, s, lam, tolerance):
    model = Network()
    for timestep in TIMESTEPS:
        ours = torch.autograd.grad(siss(model, timestep, lam, x_from, s), list(model.parameters()))
        theirs = torch.autograd.grad(subtracted(model, timestep, s), list(model.parameters()))
        for g, h in zip(ours, theirs, strict=True):
            assert h.abs().max() > 1e-3
            assert (g - h).abs().max() < (1 + s if tolerance > 1e-10 else 1) * tolerance


class Guess(torch.nn.Module):
    """ε_θ(m, t) = (m − γ_t p)/σ_t, as if every picture were p: its error on a picture a is γ²/σ² · (a − p)², at every m.

    So min(error, τ) is the same for all m made from a, and quadrature stays exact.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = torch.nn.Parameter(torch.tensor(p, dtype=torch.float64))

    def forward(self, m, timesteps):
        gamma, sigma = (values[timesteps].reshape(-1, 1, 1, 1) for values in (SCHEDULE.gamma, SCHEDULE.sigma))
        return (m - gamma * self.p) / sigma


def ceiling_at(timestep: int, tau: float) -> torch.Tensor:
    """τ at one timestep, and what would be wrong elsewhere."""
    ceiling = torch.full((1000,), -1.0, dtype=torch.float64)
    ceiling[timestep] = tau
    return ceiling


def below(model, timestep, tau, x_from, s, lam=0.5):
    """The loss under a ceiling τ, by quadrature: of SISS, and without a λ of SISS (No IS)."""
    loss = losses.siss_no_is if lam is None else partial(losses.siss, lam=lam)
    return expectation(lambda *batch: loss(*batch).below(ceiling_at(timestep, tau)), model, timestep, x_from, lam or 0.5, s)


@pytest.mark.parametrize("timestep", TIMESTEPS)
@pytest.mark.parametrize("s", [0.0, 9.0])
def test_under_a_ceiling_siss_subtracts_the_mean_of_what_is_below_it(s, timestep):
    # With x ~ X∖A: L_{X∖A} − s · k/(n−k) · E[min(err, τ)]. τ lies between the errors on the two forgotten pictures.
    scale = (SCHEDULE.gamma[timestep] / SCHEDULE.sigma[timestep]) ** 2
    model = Guess(0.3)
    errors = [scale * (a - model.p) ** 2 for a in FORGET]
    tau = (sum(errors) / 2).item()
    assert min(errors) < 0.9 * tau and 1.1 * tau < max(errors)
    capped = sum(error.clamp(max=tau) for error in errors) / K
    kept, forgotten = integral(model, timestep, KEEP), integral(model, timestep, FORGET)
    for lam in (0.1, 0.5, None):
        ours = below(model, timestep, tau, KEEP, s, lam)
        assert abs(ours - (kept - s * K / (N - K) * capped)) < 1e-10
        expected = torch.autograd.grad(kept - s * K / (N - K) * capped, model.p, retain_graph=True)
        assert abs(torch.autograd.grad(ours, model.p)[0] - expected[0]) < 1e-10
        # With x ~ X, L_A itself is in the kept term, and draws back what is above the ceiling, even at s = 0.
        from_all = kept + K / (N - K) * (forgotten - (1 + s) * capped)
        assert abs(below(model, timestep, tau, X, s, lam) - from_all) < 1e-10
        assert abs(from_all - (kept - s * K / (N - K) * capped)) > 1e-8  # a hundred times what the equalities allow


@pytest.mark.parametrize("x_from", FORMS, ids=["X", "rest"])
def test_below_the_ceiling_it_is_siss(x_from):
    model = Network()
    for timestep in TIMESTEPS:
        assert torch.equal(below(model, timestep, 1e6, x_from, 9.0), siss(model, timestep, 0.5, x_from, 9.0))


@pytest.mark.parametrize("timestep", TIMESTEPS)
def test_above_the_ceiling_only_the_kept_set_has_a_gradient(timestep):
    model = Network()
    ours, kept = below(model, timestep, 0.0, KEEP, 9.0), integral(model, timestep, KEEP)
    assert abs(ours - kept) < 1e-10
    for g, h in zip(*(torch.autograd.grad(loss, list(model.parameters())) for loss in (ours, kept)), strict=True):
        assert (g - h).abs().max() < 1e-10


@pytest.mark.parametrize("x_from", FORMS, ids=["X", "rest"])
def test_a_ceiling_bounds_the_loss_from_below_where_siss_diverges(x_from):
    tau, s, timestep = 0.7, 9.0, 300
    values = [siss(Guess(p), timestep, 0.5, x_from, s).item() for p in (0.0, 1e2, 1e4)]
    assert values[0] > values[1] > values[2] and values[2] < -1e6
    for p in (0.0, 0.3, 1.0, -3.0, 1e2, 1e4):
        assert below(Guess(p), timestep, tau, x_from, s) >= -(1 + s) * K / (N - K) * tau


@pytest.mark.parametrize("timestep", TIMESTEPS)
def test_unseen_learns_what_the_old_model_says_of_the_kept_set_and_s_times_of_the_forget_set(timestep):
    model, old, s = Network(), Network(seed=1), 25.0

    def told(on):
        """E ‖ε_old − ε_θ‖² over m_t of a set: one pixel is its own transpose."""
        gamma, sigma, z = SCHEDULE.gamma[timestep], SCHEDULE.sigma[timestep], torch.from_numpy(NODES)
        t = torch.full((len(z),), timestep)
        said = [[net((gamma * x + sigma * z).reshape(-1, 1, 1, 1), t).flatten() for net in (old, model)] for x in on]
        return sum((torch.from_numpy(NODE_WEIGHTS) * (teacher - student).square()).sum() for teacher, student in said) / len(on)

    for lam, tolerance in LAMBDAS:
        loss = partial(losses.unseen, lam=lam, unseen_weight=s, old=old)
        ours = expectation(loss, model, timestep, KEEP, lam, s=-1.0)  # keep + forget
        assert abs(ours - (told(KEEP) + s * K / (N - K) * told(FORGET))) < tolerance


def test_erasediff_pulls_the_prediction_on_the_forget_set_to_the_uniform_noise():
    batch, _ = everything(500, 0.5, KEEP)
    model = Network()
    terms = losses.erasediff(model, batch, SCHEDULE)
    gamma, sigma = SCHEDULE.gamma[500], SCHEDULE.sigma[500]
    assert torch.equal(terms.forget.noisy, gamma * batch.a + sigma * batch.noise)
    assert torch.equal(terms.forget.target, batch.uniform)
    assert torch.equal(terms.keep.noisy, gamma * batch.x + sigma * batch.noise)
    assert torch.equal(terms.keep.target, batch.noise)


def standard_deviation(lam: float) -> float:
    """Of the per-image SISS loss with x ~ X at s = 0, over all that is drawn at several timesteps, by quadrature."""
    model, first, second = Network(), 0.0, 0.0
    timesteps = [150, *TIMESTEPS]
    for timestep in timesteps:
        batch, probability = everything(timestep, lam, X)
        with torch.no_grad():
            terms = losses.siss(model, batch, SCHEDULE, lam)
            value = terms.keep.per_image() - terms.forget.per_image()
        first += (probability * value).sum().item() / len(timesteps)
        second += (probability * value**2).sum().item() / len(timesteps)
    return math.sqrt(second - first**2)


def test_a_mixture_has_less_variance_than_either_of_its_components():
    # The reason for a defensive mixture: at λ = 0 and 1 one weight is unbounded.
    deviations = {lam: standard_deviation(lam) for lam in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)}
    best = min(deviations, key=deviations.get)
    assert 0 < best < 1
    assert deviations[best] < 0.5 * min(deviations[0.0], deviations[1.0])
    assert deviations[0.5] < 0.5 * min(deviations[0.0], deviations[1.0])


def test_siss_agrees_with_naive_deletion_on_a_unet_by_monte_carlo():
    # The real path: uint8 images, draw_batch, a U-Net. 16 pixels, so that images overlap at most timesteps.
    model = randomise(UNet(UNetConfig(image_size=4, channels=(4,), layers_per_block=1, attention_levels=(), norm_groups=2)))
    images = torch.randint(60, 196, (5, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    data = TrainingSet(images, k=2)
    for lam in (0.3, 0.7):
        rng = torch.Generator().manual_seed(0)
        drawn, rest = (draw_batch(data, 12_000, SINGLE, rng, draw_x) for draw_x in ("all", "rest"))
        with torch.no_grad():
            naive = losses.naive_deletion(model, rest, SINGLE).keep.per_image()
            both = [losses.siss(model, batch, SINGLE, lam) for batch in (drawn, rest)]
            forms = [terms.keep.per_image() - terms.c_of_deletion * terms.forget.per_image() for terms in both]
        for ours in forms:
            standard_error = math.sqrt((ours.var() + naive.var()) / len(ours))
            assert abs(ours.mean() - naive.mean()) < 4 * standard_error
            # Precise enough to notice a factor n/(n−k) = 5/3, or weights of the wrong term.
            assert standard_error < 0.02 * naive.mean()
