"""The paper's claims about its losses, each shown through the code that runs.

In one dimension the expectations over x, a, the mixture's choice and the noise are finite sums of
Gaussian integrals. Gauss–Hermite quadrature computes these to rounding in float64, so "equal in
expectation" is tested as equal. Change a sign or a factor in losses.py, and a test fails.
"""

import math
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from conftest import TINY, randomise

from minisiss import losses, unlearning
from minisiss.lab.data import TrainingSet
from minisiss.schedule import NoiseSchedule
from minisiss.unet import UNet, UNetConfig

SINGLE = NoiseSchedule.linear()
SCHEDULE = NoiseSchedule(*(values.double() for values in vars(SINGLE).values()))
KEEP, FORGET = [-0.9, -0.4, 0.7], [0.1, 0.45]  # X∖A and A: images of one pixel
X = KEEP + FORGET
N, K = len(X), len(FORGET)
FORMS = {"rest": KEEP, "all": X}  # x ~ X∖A, the paper's appendix A.1; x ~ X, its main text
TIMESTEPS = [300, 600, 999]
# 100 nodes integrate polynomials up to degree 199 against a Gaussian exactly. The weights are no
# polynomials, but smooth: a logistic function of the noise with slope r = γ_t |x − a|/σ_t < 1.4
# here, and its nearest pole is π/r away.
NODES, NODE_WEIGHTS = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(100))
NODE_WEIGHTS = NODE_WEIGHTS / NODE_WEIGHTS.sum()
# At λ = 0 and 1 a weight is an unbounded exponential e^(r z). The integrand then peaks at z = ±2r,
# well inside the nodes' ±14, and loses a digit to the size of the weights.
LAMBDAS = [(0.0, 1e-9), (1.0, 1e-9), (0.1, 1e-10), (0.9, 1e-10), (0.5, 1e-10)]


class Network(torch.nn.Module):
    """An arbitrary non-linear ε_θ(m, t) of one pixel, in float64."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(4, 8, generator=generator, dtype=torch.float64)
        self.input, self.time, self.bias, self.output = map(torch.nn.Parameter, values)

    def forward(self, m, timesteps):
        time = timesteps.view(-1, 1, 1, 1) / 1000
        hidden = torch.sin(m * self.input * 0.7 + time * self.time + self.bias)
        return (hidden * self.output).sum(dim=-1, keepdim=True)


def everything(timestep, draw_x, lam):
    """All that can be drawn at a timestep as one batch, and the probability of each image."""
    values = [FORMS[draw_x], FORGET, [0.0, 1.0], range(len(NODES))]
    rows = torch.cartesian_prod(*(torch.tensor(v, dtype=torch.float64) for v in values))
    x, a, pick, node = rows.T
    noise, weight = NODES[node.long()], NODE_WEIGHTS[node.long()]
    x, a, noise, uniform = torch.stack([x, a, noise, pick]).view(4, -1, 1, 1, 1)
    timesteps = torch.full((len(rows),), timestep)
    batch = losses.Batch(x, a, timesteps, noise, pick, uniform, N, K, draw_x)
    # The noisy image is made from a where pick = 0, and from x where pick = 1.
    of_pick = lam * (1 - pick) + (1 - lam) * pick
    return batch, of_pick * weight / len(FORMS[draw_x]) / K


def expectation(name, model, timestep, draw_x="rest", lam=0.5, s=0.0, **settings):
    """E[keep − c · forget] of a method at one timestep, with the c of a superfactor s."""
    settings |= {"lam": lam, "draw_x": draw_x, "superfactor": s, "subtract_until": 0.5}
    method = unlearning.METHODS[name]
    batch, probability = everything(timestep, draw_x, lam)
    keep, forget = method.loss_of(model, SCHEDULE, settings)(batch)
    return (probability * (keep - method.c_of(settings) * forget)).sum()


def integral(model, timestep, images, old=None):
    """L_S of S = `images`, from its definition and without losses.py; the target may be `old`'s."""
    x, noise = torch.cartesian_prod(torch.tensor(images, dtype=torch.float64), NODES).T
    m = (SCHEDULE.gamma[timestep] * x + SCHEDULE.sigma[timestep] * noise).view(-1, 1, 1, 1)
    timesteps = torch.full((len(m),), timestep)
    target = old(m, timesteps) if old else noise.view_as(m)
    error = (target - model(m, timesteps)).square().view(len(images), -1)
    return (error @ NODE_WEIGHTS).mean()


@pytest.mark.parametrize("timestep", TIMESTEPS)
def test_naive_deletion_and_neggrad_are_losses_on_sets(timestep):
    model = Network()
    kept, forgotten = (integral(model, timestep, images) for images in (KEEP, FORGET))
    assert abs(expectation("naive_deletion", model, timestep) - kept) < 1e-10
    assert abs(expectation("neggrad", model, timestep) + forgotten) < 1e-10


@pytest.mark.parametrize("timestep", TIMESTEPS)
def test_subtraction_identity(timestep):
    # L_{X∖A} = n/(n−k) L_X − k/(n−k) L_A
    model = Network()
    kept, forgotten, both = (integral(model, timestep, images) for images in (KEEP, FORGET, X))
    assert abs(N / (N - K) * both - K / (N - K) * forgotten - kept) < 1e-10


@pytest.mark.parametrize("timestep", TIMESTEPS)
@pytest.mark.parametrize("lam, tolerance", LAMBDAS)
@pytest.mark.parametrize("draw_x", FORMS)
def test_siss_at_s_0_is_naive_deletion(draw_x, lam, tolerance, timestep):
    for seed in range(3):
        model = Network(seed)
        naive = expectation("naive_deletion", model, timestep)
        assert abs(expectation("siss", model, timestep, draw_x, lam) - naive) < tolerance


@pytest.mark.parametrize("s", [0.0, 0.5, 9.0])
@pytest.mark.parametrize("name, lam, tolerance", [("siss", *row) for row in LAMBDAS] + [("siss_no_is", 0.5, 1e-10)])
@pytest.mark.parametrize("draw_x", FORMS)
def test_superfactor_subtracts_the_forget_loss_s_times(draw_x, name, lam, tolerance, s):
    """And its gradient in every parameter; SISS without importance sampling does so too."""
    tolerance *= 1 + s if tolerance > 1e-10 else 1
    for timestep, seed in product(TIMESTEPS, range(3)):
        model = Network(seed)
        ours = expectation(name, model, timestep, draw_x, lam, s)
        kept, forgotten = (integral(model, timestep, images) for images in (KEEP, FORGET))
        theirs = kept - s * K / (N - K) * forgotten
        assert abs(ours - theirs) < tolerance
        gradients = (torch.autograd.grad(loss, [*model.parameters()]) for loss in (ours, theirs))
        for g, h in zip(*gradients, strict=True):
            assert h.abs().max() > 1e-3
            assert (g - h).abs().max() < tolerance


def test_erasediff_pulls_the_forget_set_to_uniform_noise():
    batch, _ = everything(500, "rest", 0.5)
    model = Network()
    keep, forget = losses.erasediff(model, batch, SCHEDULE)
    x_t, a_t = (SCHEDULE.add_noise(v, batch.noise, batch.timesteps) for v in (batch.x, batch.a))
    of_x, of_a = model(x_t, batch.timesteps), model(a_t, batch.timesteps)
    torch.testing.assert_close(keep, (batch.noise - of_x).square().flatten())
    torch.testing.assert_close(forget, (batch.uniform - of_a).square().flatten())


@pytest.mark.parametrize("lam, tolerance", LAMBDAS)
def test_old_targets_have_the_expectation_they_claim(lam, tolerance):
    # One pixel is its own transpose.
    model, old, s = Network(), Network(seed=1), 3.0
    settings = {"lam": lam, "old": old}
    for timestep in TIMESTEPS:
        ours = expectation("old_targets", model, timestep, **settings)
        kept, forgotten = (integral(model, timestep, part, old) for part in (KEEP, FORGET))
        assert abs(ours - (kept + s * K / (N - K) * forgotten)) < tolerance


@torch.no_grad()
def standard_deviation(lam):
    """Of SISS's loss of an image, x ~ X and s = 0, over all that is drawn at four timesteps."""
    first = second = 0
    for timestep in (150, 300, 600, 999):
        batch, probability = everything(timestep, "all", lam)
        keep, forget = losses.siss(Network(), batch, SCHEDULE, lam)
        first += (probability * (keep - forget)).sum() / 4
        second += (probability * (keep - forget) ** 2).sum() / 4
    return (second - first**2).sqrt()


def test_mixture_has_less_variance_than_its_components():
    # The reason for a mixture: at λ = 0 and 1 one of the weights has no bound.
    assert standard_deviation(0.5) < 0.5 * min(standard_deviation(0.0), standard_deviation(1.0))


@torch.no_grad()
def test_monte_carlo_agrees_on_a_unet():
    # The real path: uint8 images, draw_batch, a U-Net. 16 pixels, so that noisy images overlap.
    config = TINY | {"image_size": 4, "channels": (4,), "norm_groups": 2}
    model = randomise(UNet(UNetConfig(**config)))
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(60, 196, (5, 1, 4, 4), dtype=torch.uint8, generator=generator)
    for lam in (0.3, 0.7):
        generator = torch.Generator().manual_seed(0)
        draw = partial(unlearning.draw_batch, TrainingSet(images, 2), 12_000, SINGLE, generator)
        rest, drawn = draw("rest"), draw("all")
        naive, _ = losses.naive_deletion(model, rest, SINGLE)
        for batch, c in ((rest, 0), (drawn, 1)):
            keep, forget = losses.siss(model, batch, SINGLE, lam)
            ours = keep - c * forget
            standard_error = math.sqrt((ours.var() + naive.var()) / len(ours))
            assert abs(ours.mean() - naive.mean()) < 4 * standard_error
            # Precise enough to notice a factor n/(n−k) = 5/3, or weights of the wrong term.
            assert standard_error < 0.02 * naive.mean()
