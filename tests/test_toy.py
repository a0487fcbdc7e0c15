"""Where the losses lead: a network on points of the plane, whose ideal denoisers are known."""

from functools import partial

import pytest
import torch
from torch import nn

from minisiss import beyond, losses, unlearning
from minisiss.schedule import NoiseSchedule
from minisiss.unet import zero

SCHEDULE = NoiseSchedule.linear()
KEEP = torch.tensor([[-0.8, -0.5], [-0.7, 0.6], [0.3, -0.8], [0.9, 0.7]])
FORGET = torch.tensor([[0.2, 0.2], [-0.1, 0.4]])
POINTS = {"all": torch.cat([KEEP, FORGET]), "rest": KEEP}


def draw(draw_x, size, generator):
    """A batch of points, at timesteps at which neighbouring points overlap."""
    x = POINTS[draw_x][torch.randint(len(POINTS[draw_x]), (size,), generator=generator)]
    a = FORGET[torch.randint(len(FORGET), (size,), generator=generator)]
    noise = torch.randn(size, 2, generator=generator)
    timesteps = torch.randint(100, 600, (size,), generator=generator)
    pick = torch.rand(size, generator=generator)
    return losses.Batch(x, a, timesteps, noise, pick, noise, n=6, k=2, x_from=draw_x)


def ideal(points, m, timesteps):
    """ε*_S(m, t) = Σ_x softmax_x(−‖m − γ_t x‖²/2σ_t²) (m − γ_t x)/σ_t, which minimises L_S."""
    gamma, sigma = (v[timesteps][:, None, None] for v in (SCHEDULE.gamma, SCHEDULE.sigma))
    v = (m[:, None] - gamma * points) / sigma
    w = (-v.square().sum(dim=2, keepdim=True) / 2).softmax(dim=1)
    return (w * v).sum(dim=1)


def test_retrack_of_all_points_aims_at_the_ideal():
    batch = draw("rest", 200, torch.Generator().manual_seed(0))
    options = {"weight": 1.0, "nearest": lambda a: KEEP.expand(200, -1, -1)}
    _, error = beyond.retrack(partial(ideal, KEEP), batch, SCHEDULE, **options)
    assert error.max() < 1e-8
    _, error = beyond.retrack(partial(ideal, POINTS["all"]), batch, SCHEDULE, **options)
    assert error.max() > 1e-2


class Network(nn.Module):
    """The ideal denoiser of X, and a change of it that is learnt and starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        hidden = [nn.Linear(5, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU()]
        self.change = nn.Sequential(*hidden, zero(nn.Linear(64, 2)))

    def forward(self, m, timesteps):
        gamma, sigma = (v[timesteps][:, None] for v in (SCHEDULE.gamma, SCHEDULE.sigma))
        change = self.change(torch.cat([m, gamma, sigma, sigma.log()], dim=1))
        return ideal(POINTS["all"], m, timesteps) + change


@torch.no_grad()
def distance(model, points):
    """E ‖ε_θ − ε*_S‖² over the noisy kept points."""
    batch = draw("rest", 4000, torch.Generator().manual_seed(99))
    x_t = SCHEDULE.add_noise(batch.x, batch.noise, batch.timesteps), batch.timesteps
    return losses.squared_error(ideal(points, *x_t), model(*x_t)).mean().item()


# ρ must fit k/n. In the paper k/n is 1/100, and at ρ = 0.1 first c > 1: the step subtracts more
# than deletion does. Here k/n is 1/3, so that c > 1 takes a ρ near 1.
RULES = {"s = 0": 1.0, "by norms": partial(unlearning.ratio_of_norms, grad_ratio=0.9)}


@pytest.mark.parametrize("c", RULES.values(), ids=RULES)
@pytest.mark.parametrize("seed", [0, 1])
def test_siss_leads_towards_the_ideal_of_kept_points(seed, c):
    torch.manual_seed(seed)
    model, generator = Network(), torch.Generator().manual_seed(seed)
    start = distance(model, KEEP)
    assert distance(model, POINTS["all"]) == 0
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 500)
    for _ in range(500):
        loss = partial(losses.siss, model, schedule=SCHEDULE, lam=0.5)
        unlearning.step(loss, draw("all", 256, generator), c, optimizer)
        falling.step()
    assert distance(model, KEEP) < 0.5 * start
    assert distance(model, KEEP) < 0.75 * distance(model, POINTS["all"])
