"""ReTrack's target, and the loss with targets of the model before."""

import math

import pytest
import torch

from minisiss import beyond, losses
from minisiss.losses import squared_error
from minisiss.schedule import NoiseSchedule

SINGLE = NoiseSchedule.linear()
SCHEDULE = NoiseSchedule(*(values.double() for values in vars(SINGLE).values()))
TIMESTEPS = torch.tensor([0, 50, 200, 400, 700, 999])


def draw(near=1.0, count=5):
    """A batch in float64, and `count` points around each a: [6, count, 1, 3, 3]."""
    generator = torch.Generator().manual_seed(0)
    options = {"generator": generator, "dtype": torch.float64}
    x, a, noise, uniform = torch.randn(4, 6, 1, 3, 3, **options)
    points = a[:, None] + near * torch.randn(6, count, 1, 3, 3, **options)
    pick = torch.rand(6, **options)
    batch = losses.Batch(x, a, TIMESTEPS, noise, pick, uniform, n=9, k=3, x_from="rest")
    return batch, points


def literal_ideal_noise(m, points):
    """Σ_i w_i v_i as the docstring has it, an image and a point at a time."""
    sums = []
    for image, its_points, t in zip(m, points, TIMESTEPS, strict=True):
        v = [(image - SCHEDULE.gamma[t] * point) / SCHEDULE.sigma[t] for point in its_points]
        logits = [-v_i.square().sum().item() / 2 for v_i in v]
        shares = [math.exp(logit - max(logits)) for logit in logits]
        sums.append(sum(w * v_i for w, v_i in zip(shares, v, strict=True)) / sum(shares))
    return torch.stack(sums)


@pytest.mark.parametrize("near", [1.0, 0.01])
def test_ideal_noise_is_the_literal_sum(near):
    batch, points = draw(near)
    m = SCHEDULE.add_noise(batch.a, batch.noise, TIMESTEPS)
    literal = literal_ideal_noise(m, points)
    assert (beyond.ideal_noise(m, points, TIMESTEPS, SCHEDULE) - literal).abs().max() < 1e-9
    single = beyond.ideal_noise(m.float(), points.float(), TIMESTEPS, SINGLE)
    assert (single - literal).abs().max() < 1e-3


def test_ideal_noise_of_one_point_leads_to_it():
    batch, points = draw(count=1)
    m = SCHEDULE.add_noise(batch.a, batch.noise, TIMESTEPS)
    noise = beyond.ideal_noise(m, points, TIMESTEPS, SCHEDULE)
    torch.testing.assert_close(SCHEDULE.add_noise(points[:, 0], noise, TIMESTEPS), m)


def test_retrack_has_the_gradient_of_its_paper():
    batch, points = draw()
    theta = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    x_t = SCHEDULE.add_noise(batch.x, batch.noise, TIMESTEPS)
    a_t = SCHEDULE.add_noise(batch.a, batch.noise, TIMESTEPS)
    # It asks for what is near a, not near its noisy image.
    options = {"weight": 0.2, "nearest": lambda a: points + (a - batch.a)[:, None]}
    keep, forget = beyond.retrack(lambda m, t: theta * m, batch, SCHEDULE, **options)
    torch.testing.assert_close(keep, 0.8 * squared_error(batch.noise, theta * x_t))
    target = literal_ideal_noise(a_t, points)
    torch.testing.assert_close(forget, 0.2 * squared_error(target, theta * a_t))
    # The paper's L_unlearn is Σ_i w_i ‖v_i − ε_θ‖². It differs by a number without θ.
    v = torch.stack([SCHEDULE.noise_between(x, a_t, TIMESTEPS) for x in points.unbind(1)])
    w = (-v.square().flatten(2).sum(dim=2) / 2).softmax(dim=0)
    literal = (w * (v - theta * a_t).square().flatten(2).mean(dim=2)).sum()
    assert abs(literal - forget.sum() / 0.2) > 0.1
    ours, theirs = (torch.autograd.grad(loss, theta)[0] for loss in (forget.sum(), 0.2 * literal))
    torch.testing.assert_close(ours, theirs)


def test_old_targets_are_of_m_and_m_transposed():
    batch, _ = draw()
    scale = torch.arange(9.0, dtype=torch.float64).view(3, 3).requires_grad_()
    t = TIMESTEPS[:, None, None, None]
    gamma, sigma = SCHEDULE.gamma[TIMESTEPS], SCHEDULE.sigma[TIMESTEPS]
    m = losses.sample_mixture(batch.x, batch.a, batch.noise, batch.pick, gamma, sigma, 0.3)
    w_x, w_a = losses.importance_weights(m, batch.x, batch.a, gamma, sigma, 0.3)

    def old(m, t):  # another factor for each pixel, so that it matters which pixel is where
        return m * scale + t[:, None, None, None]

    keep, forget = beyond.old_targets(lambda m, t: 0.3 * m, batch, SCHEDULE, 0.3, old, 25.0)
    of_x, of_a = m * scale + t, m * scale.T + t
    torch.testing.assert_close(keep, (w_x * squared_error(of_x, 0.3 * m)).detach())
    w_a = 25 * 3 / (9 - 3) * w_a
    torch.testing.assert_close(forget, (w_a * squared_error(of_a, 0.3 * m)).detach())
    # Only the old model has a parameter here, and no gradient flows into it.
    assert not keep.requires_grad
    assert not forget.requires_grad
