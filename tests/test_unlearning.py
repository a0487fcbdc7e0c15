"""One step: what it goes along, for each method and rule, and when it refuses to."""

import math
from dataclasses import replace
from functools import partial
from statistics import stdev
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, randomise

from minisiss import unlearning
from minisiss.lab import checkpoint
from minisiss.lab.data import TrainingSet, mnist_with_tshirt
from minisiss.schedule import NoiseSchedule
from minisiss.unet import UNet, UNetConfig

SCHEDULE = NoiseSchedule.linear()
SETTINGS = dict(
    lam=0.3, grad_ratio=0.7, superfactor=1.5, subtract_until=0.5, draw_x="rest",
    nearest=lambda a: torch.stack([a / 2, a - 0.1], dim=1),
    old=lambda m, t: m * torch.linspace(0, 1, m.shape[-1]),
)  # fmt: skip
S = ("progress", "superfactor", "subtract_until", "draw_x")
# Of each method its loss, its rule or number for c, and the settings that these two take.
ROWS = {
    "siss": ("siss", "c_of_superfactor", ("lam",), S),
    "siss_by_norms": ("siss", "ratio_of_norms", ("lam",), ("grad_ratio",)),
    "siss_no_is": ("siss_no_is", "c_of_superfactor", (), S),
    "naive_deletion": ("naive_deletion", 0, (), ()),
    "neggrad": ("neggrad", 1, (), ()),
    "erasediff": ("erasediff", "erasediff_rule", (), ()),
    "retrack": ("retrack", -1, ("nearest",), ()),
    "old_targets": ("old_targets", -1, ("lam", "old"), ()),
}
SMALL = SimpleNamespace(timesteps=torch.zeros(3))  # `step` needs to know no more of a batch


def step_along(g_keep, g_forget, c):
    """What one step with these two mean gradients goes along, and its figures."""
    p, q = theta = [torch.nn.Parameter(torch.zeros(())) for _ in range(2)]
    share = torch.tensor([0.2, 0.5, 2.3])  # of each image in the mean

    def loss(batch):
        return (share * (g[0] * p + g[1] * q) for g in (g_keep, g_forget))

    figures = unlearning.step(loss, SMALL, c, torch.optim.SGD(theta, lr=1.0))
    return [-p.item(), -q.item()], {name: value.item() for name, value in figures.items()}


def test_each_method_has_its_loss_and_its_rule():
    for name, row in ROWS.items():
        method = unlearning.METHODS[name]
        c = method.c.__name__ if callable(method.c) else method.c
        assert (method.loss.__name__, c, method.loss_takes, method.c_takes) == row


@pytest.mark.parametrize("rho, c, moved", [(0.0, 0, (0.3, 0.4)), (0.1, 0.25, (0.3, 0.35)), (2.0, 5, (0.3, -0.6))])
def test_norm_rule_subtracts_a_share_of_kept_norm(rho, c, moved):
    rule = unlearning.METHODS["siss_by_norms"].c_of(SETTINGS | {"grad_ratio": rho})
    along, figures = step_along((0.3, 0.4), (0.0, 0.2), rule)
    assert along == pytest.approx(moved, abs=1e-6)
    assert figures["c"] == pytest.approx(c)
    assert figures["c"] * figures["norm_forget"] == pytest.approx(rho * figures["norm_keep"])
    assert figures["norm_keep"] == pytest.approx(0.5)
    along, _ = step_along((0.3, 0.4), (0.0, 0.0), rule)  # where nothing is to be forgotten
    assert along == pytest.approx((0.3, 0.4))


# ⟨g_keep, g_forget⟩/‖g_forget‖² is 2 where g_forget is 0.2, and −2 where it is −0.2.
@pytest.mark.parametrize("eta, g_forget, moved", [(0.1, 0.2, (0.3, 0.4)), (0.1, 0.0, (0.3, 0.4)), (2.0, 0.2, (0.3, 0.4)), (3.0, 0.2, (0.3, 0.6)), (0.1, -0.2, (0.3, -0.02))])
def test_erasediff_rule_on_both_sides_of_its_switch(eta, g_forget, moved):
    rule = partial(unlearning.erasediff_rule, eta=eta)
    along, _ = step_along((0.3, 0.4), (0.0, g_forget), rule)
    assert along == pytest.approx(moved, abs=1e-6)


@pytest.mark.parametrize("c", [0.5, lambda g_keep, g_forget: 0.5])
def test_added_parameters_have_gradients_of_their_own(c):
    """Autograd gives p and q the same tensor; what changes one must not change it twice."""
    p, q = (torch.nn.Parameter(torch.zeros(())) for _ in range(2))

    def loss(batch):
        keep = (p + q + 3) ** 2 * torch.ones(3)
        return keep, keep / 2

    figures = unlearning.step(loss, SMALL, c, torch.optim.SGD([p, q], lr=1.0))
    assert figures["norm"] == pytest.approx(4.5 * 2**0.5)  # 6 − 0.5 · 3 in each
    assert [p.item(), q.item()] == pytest.approx([-(0.5**0.5)] * 2)  # clipped to 1


def test_gradients_are_clipped_after_they_are_combined():
    along, _ = step_along((30.0, 40.0), (30.0, 39.5), 1.0)
    assert along == pytest.approx((0.0, 0.5), abs=1e-5)  # both are long, and their difference short
    along, figures = step_along((30.0, 40.0), (15.0, 20.0), 1.0)
    assert along == pytest.approx((0.6, 0.8))
    assert figures["norm"] == pytest.approx(25)


@pytest.mark.parametrize("s", [0.0, 5.0])
@pytest.mark.parametrize("draw_x, of_siss", [("all", 1), ("rest", 0)])
def test_superfactor_makes_c_1_plus_s_or_s(draw_x, of_siss, s):
    numbers = dict(siss=of_siss + s, siss_no_is=of_siss + s)
    numbers |= dict(naive_deletion=0, neggrad=1, retrack=-1, old_targets=-1)
    settings = SETTINGS | {"superfactor": s, "draw_x": draw_x}
    assert numbers == {name: unlearning.METHODS[name].c_of(settings) for name in numbers}


@pytest.mark.parametrize("progress, s", [(0.0, 8.0), (0.1, 4.0), (0.2, 0.0), (0.9, 0.0)])
@pytest.mark.parametrize("draw_x, of_siss", [("all", 1), ("rest", 0)])
def test_superfactor_falls_to_0_and_stays(draw_x, of_siss, progress, s):
    settings = SETTINGS | {"superfactor": 8.0, "subtract_until": 0.2, "draw_x": draw_x}
    for name in ("siss", "siss_no_is"):
        c = unlearning.METHODS[name].c_of(settings, progress)
        assert c == pytest.approx(of_siss + s)


@pytest.mark.parametrize("warmup", [0, 4])
def test_the_rate_rises_and_falls_along_a_cosine(warmup):
    rates = [unlearning.learning_rate(step, 12, 3.0, warmup) for step in range(12)]
    cosine = [1.5 + 1.5 * math.cos(math.pi * step / 12) for step in range(12)]
    shares = [0.25, 0.5, 0.75, 1.0] if warmup else [1.0] * 4
    assert rates[:4] == pytest.approx([a * b for a, b in zip(shares, cosine[:4], strict=True)])
    assert rates[4:] == pytest.approx(cosine[4:])
    rates = [unlearning.learning_rate(step, 12, 3.0, end=0.25) for step in (0, 6, 12)]
    assert rates == pytest.approx([3.0, 3.0 * (0.25 + 0.75 / 2), 0.75])


def draw_batch_of(size):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (12, 1, 4, 4), dtype=torch.uint8, generator=generator)
    return unlearning.draw_batch(TrainingSet(images, 3), size, SCHEDULE, generator)


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


@pytest.mark.parametrize("parts", [1, 2, 9])  # 9 parts of 5 images are 5 parts
@pytest.mark.parametrize("name", ROWS)
def test_step_goes_along_keep_minus_c_times_forget(name, parts):
    method, settings = unlearning.METHODS[name], SETTINGS
    model = randomise(UNet(UNetConfig(**TINY | {"image_size": 4})))
    parameters = list(model.parameters())
    loss, batch, c = method.loss_of(model, SCHEDULE, settings), draw_batch_of(5), method.c_of(settings)
    means, gradients = [], []  # of both terms over the batch, each in a pass of its own
    for term in range(2):
        mean = loss(batch)[term].mean() + 0 * parameters[0].sum()  # NegGrad keeps nothing
        means.append(mean.item())
        gradients.append(torch.autograd.grad(mean, parameters, materialize_grads=True))
    number = c(*gradients) if callable(c) else c
    literal = flat(gradients[0]) - number * flat(gradients[1])
    assert literal.norm() > 0.01
    literal = literal / literal.norm().clamp(min=1)
    before = flat(parameters)
    figures = unlearning.step(loss, batch, c, torch.optim.SGD(parameters, lr=1.0), parts)
    of_step = [figures[name].item() for name in ("loss_keep", "loss_forget")]
    assert of_step == pytest.approx(means, rel=1e-5)
    assert (before - flat(parameters) - literal).norm() < 1e-5 * literal.norm()


def test_own_loss_is_a_function_and_a_row():
    def own_loss(model, batch, schedule, share):
        return share * model(batch.x, None).mean((1, 2, 3)), model(batch.a, None).mean((1, 2, 3))

    def own_rule(g_keep, g_forget, height):
        return torch.tensor(height)

    row = unlearning.Method(own_loss, own_rule, ("share",), ("height",))
    settings = {"share": 0.5, "height": 0.2}
    theta, batch = torch.nn.Parameter(torch.zeros(())), draw_batch_of(5)
    loss = row.loss_of(lambda m, t: theta * m, SCHEDULE, settings)
    unlearning.step(loss, batch, row.c_of(settings), torch.optim.SGD([theta], lr=1.0))
    slope = 0.5 * batch.x.mean() - 0.2 * batch.a.mean()
    assert theta.item() == pytest.approx(-slope.item(), rel=1e-4)


BROKEN = {
    "loss_keep is nan": lambda theta: (theta * math.nan, theta),
    "loss_keep is inf": lambda theta: (theta * math.inf, theta),
    "norm(_keep)? is inf": lambda theta: ((theta - 1).sqrt(), theta),  # at 0, with a slope of ∞
    "loss_forget is nan": lambda theta: (theta, theta * math.nan),
}


@pytest.mark.parametrize("c", [0.5, lambda g, h: torch.tensor(0.5)], ids=["number", "rule"])
@pytest.mark.parametrize("words, loss", BROKEN.items())
def test_what_is_not_finite_stops_before_a_step(words, loss, c):
    theta = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(FloatingPointError, match=words):
        unlearning.step(lambda _: loss(theta), SMALL, c, torch.optim.SGD([theta], lr=1.0))
    assert theta.tolist() == [1, 1, 1]


@pytest.mark.parametrize("draw_x, kept", [("all", set(range(10))), ("rest", set(range(8)))])
def test_batch_draws_each_part_from_its_set(draw_x, kept):
    # Pixel values tell the sets apart: 0 … 7 are X∖A, 8 and 9 are A.
    images = torch.arange(10, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2)
    generator = torch.Generator().manual_seed(0)
    batch = unlearning.draw_batch(TrainingSet(images, 2), 400, SCHEDULE, generator, draw_x)
    assert (batch.n, batch.k, batch.x_from) == (10, 2, draw_x)
    x, a = (((z[:, 0, 0, 0] + 1) * 127.5).round().int().tolist() for z in (batch.x, batch.a))
    assert (set(x), set(a)) == (kept, {8, 9})
    assert batch.timesteps.min() < 10
    assert batch.timesteps.max() > 990
    for uniform, shape in ((batch.pick, (400,)), (batch.uniform, batch.x.shape)):
        assert uniform.shape == shape
        assert 0 <= uniform.min() <= uniform.max() < 1
        assert uniform.mean().item() == pytest.approx(0.5, abs=0.05)
    assert batch.noise.mean().item() == pytest.approx(0, abs=0.1)
    assert batch.noise.std().item() == pytest.approx(1, abs=0.1)


def test_a_batch_of_training_needs_nothing_to_forget():
    images = torch.arange(10, dtype=torch.uint8)[:, None, None, None]
    generator = torch.Generator().manual_seed(0)
    batch = unlearning.draw_batch(TrainingSet(images, 0), 4, SCHEDULE, generator, "all")
    assert torch.equal(batch.a, batch.x)


def test_timesteps_of_a_batch_are_spread():
    """One lies in each B-th part of 0 … T−1, in random order, and each alone is uniform."""
    size, generator = 8, torch.Generator().manual_seed(0)
    drawn = torch.stack([unlearning.spread(size, generator, "cpu") for _ in range(4000)])
    assert (drawn.sort(dim=1).values * size).floor().equal(torch.arange(8.0).expand(4000, -1))
    assert drawn.min() >= 0 and drawn.max() < 1
    for place in range(size):  # of the first, and of each other image of a batch
        counts = torch.histc(drawn[:, place].float(), bins=20, min=0, max=1)
        assert ((counts - 200) ** 2 / 200).sum() < 50  # χ² of 19 degrees: 1 in 10,000


def test_lam_of_a_batch_is_made_from_a():
    batch = draw_batch_of(64)
    assert (batch.pick < 0.5).sum() == 32 and (batch.pick < 0.25).sum() == 16
    correlation = torch.corrcoef(torch.stack([batch.pick, batch.timesteps / 1000]))[0, 1]
    assert abs(correlation) < 0.4  # and which ones does not depend on their timesteps


def test_spread_timesteps_make_a_loss_vary_less():
    """The mean loss of SISS over a batch of real digits, by the bundled model."""
    found = checkpoint.load_any("bundled")
    digits = mnist_with_tshirt("bundled", torch.device("cpu"))
    loss = unlearning.METHODS["siss"].loss_of(found.model, found.schedule, {"lam": 0.5})
    means = {"spread": [], "independent": []}
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        batch = unlearning.draw_batch(digits, 32, SCHEDULE, generator)
        drawn = {"spread": (batch.timesteps, batch.pick)}
        independent = torch.randint(1000, (32,), generator=generator)
        drawn["independent"] = independent, torch.rand(32, generator=generator)
        for name, (timesteps, pick) in drawn.items():
            with torch.no_grad():
                keep, _ = loss(replace(batch, timesteps=timesteps, pick=pick))
            means[name].append(keep.mean().item())
    assert stdev(means["spread"]) < stdev(means["independent"])


def test_average_moves_by_one_minus_decay():
    model, average = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    expected = 0.9 * flat(average.parameters()) + 0.1 * flat(model.parameters())
    unlearning.update_average(average, model, 0.9, step=1000)
    torch.testing.assert_close(flat(average.parameters()), expected)


def test_a_short_run_shows_what_it_did():
    """With a constant decay of 0.999, 98% of the average would be the weights from before."""
    model, average = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    average.weight.data.fill_(0.0)
    for step in range(20):
        unlearning.update_average(average, model, 0.999, step)
    assert average.weight.item() > 0.99


@pytest.mark.parametrize("rho", [0.0, 0.1, 0.5, 0.9, 1.0, 2.0])
@pytest.mark.parametrize("worst", [False, True], ids=["any direction", "worst direction"])
def test_kept_loss_falls_at_rho_below_1(rho, worst):
    """The paper's appendix: ‖v‖ ≤ p ‖∇f‖ gives f(x') ≤ f(x) − (1 − p − ε) t ‖∇f‖²."""
    curvature = torch.tensor([3.0, 1.0, 0.2], dtype=torch.float64)  # f(x) = ½ Σ h x², so L = 3
    t = 0.01
    epsilon = 3 * t / 2 + 3 * t * rho + 3 * t * rho**2 / 2
    rule = partial(unlearning.ratio_of_norms, grad_ratio=rho)
    generator = torch.Generator().manual_seed(0)
    points = 0.02 * torch.randn(50, 2, 3, generator=generator, dtype=torch.float64)
    for start, direction in points:
        x = torch.nn.Parameter(start.clone())

        def loss(batch, x=x, direction=direction):
            f = (curvature * x.square()).sum().expand(3) / 2
            return f, f if worst else (direction @ x).expand(3)

        (before, *_), _ = loss(None)
        figures = unlearning.step(loss, SMALL, rule, torch.optim.SGD([x], lr=t))
        assert figures["norm"] < unlearning.MAX_NORM  # so near 0 nothing is clipped
        (after, *_), _ = loss(None)
        descent = t * (curvature * start).square().sum()
        assert after <= before - (1 - rho - epsilon) * descent + 1e-15
        if worst:  # the guarantee ends at ρ = 1
            assert (after < before) == (rho < 1)
