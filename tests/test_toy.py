"""Where the losses lead: a small network on points in the plane, whose ideal denoiser is known in closed form."""

from dataclasses import replace

import pytest
import torch

from minisiss import losses, unlearning
from minisiss.losses import Batch
from minisiss.schedule import NoiseSchedule
from minisiss.unlearning import METHODS, Settings

SCHEDULE = NoiseSchedule.linear()
KEEP = torch.tensor([[-0.8, -0.5], [-0.7, 0.6], [0.3, -0.8], [0.9, 0.7]])
FORGET = torch.tensor([[0.2, 0.2], [-0.1, 0.4]])
X = torch.cat([KEEP, FORGET])


def ideal(points, m, timesteps):
    """ε*_S(m, t) = Σ_x softmax(−‖m − γ_t x‖²/2σ_t²) (m − γ_t x)/σ_t: the minimiser of L_S."""
    gamma, sigma = (values[timesteps][:, None, None] for values in (SCHEDULE.gamma, SCHEDULE.sigma))
    residual = (m.flatten(1)[:, None] - gamma * points) / sigma
    share = (-residual.square().sum(-1, keepdim=True) / 2).softmax(dim=1)
    return (share * residual).sum(dim=1).reshape(m.shape)


class MLP(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(5, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64), torch.nn.SiLU(), torch.nn.Linear(64, 2)
        )

    def forward(self, m, timesteps):
        gamma, sigma = SCHEDULE.gamma[timesteps][:, None], SCHEDULE.sigma[timesteps][:, None]
        points = m.flatten(1)
        return (points + self.layers(torch.cat([points, gamma, sigma, sigma.log()], dim=1))).reshape(m.shape)


def test_retrack_with_all_of_the_kept_set_aims_at_its_ideal_denoiser():
    batch = replace(draw(KEEP, 200, torch.Generator().manual_seed(0)), neighbours=KEEP.reshape(1, -1, 1, 1, 2))
    target, a_t = (getattr(losses.retrack(None, batch, SCHEDULE, 0.5).forget, name) for name in ("target", "noisy"))
    assert (target - ideal(KEEP, a_t, batch.timesteps)).abs().max() < 1e-4
    assert (target - ideal(X, a_t, batch.timesteps)).abs().max() > 0.1


def draw(points, size, rng):
    """Timesteps at which neighbouring points overlap, and points as images of 1×2 pixels."""
    image = lambda which: which[torch.randint(len(which), (size,), generator=rng)].reshape(-1, 1, 1, 2)  # noqa: E731
    noise, uniform = torch.randn(size, 1, 1, 2, generator=rng), torch.rand(size, 1, 1, 2, generator=rng)
    timesteps = torch.randint(100, 600, (size,), generator=rng)
    return Batch(image(points), image(FORGET), timesteps, noise, torch.rand(size, generator=rng), uniform, len(X), len(FORGET), "all" if points is X else "rest")


def distance(model, points, seed=99):
    """E ‖ε_θ − ε*_S‖² over the noisy kept points: where both sets have something to say."""
    batch = draw(KEEP, 4000, torch.Generator().manual_seed(seed))
    m = SCHEDULE.add_noise(batch.x, batch.noise, batch.timesteps)
    with torch.no_grad():
        return losses.squared_error(model(m, batch.timesteps), ideal(points, m, batch.timesteps)).mean().item()


@pytest.fixture(scope="module", params=[0, 1, 2])
def trained(request):
    torch.manual_seed(request.param)
    model, rng = MLP(), torch.Generator().manual_seed(request.param)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600)
    for _ in range(600):
        batch = draw(X, 256, rng)
        m = SCHEDULE.add_noise(batch.x, batch.noise, batch.timesteps)
        optimizer.zero_grad()
        losses.squared_error(model(m, batch.timesteps), ideal(X, m, batch.timesteps)).mean().backward()
        optimizer.step()
        schedule.step()
    return request.param, model


# The gradient-norm rule's ρ must fit k/n. In the paper k/n is 1/100 and ρ = 0.1 at first subtracts several times what
# deletion would (c > 1); here k/n is 1/3 and the two gradients are about equally long, so that it takes ρ near 1 to get c > 1.
@pytest.mark.parametrize("settings", [Settings(superfactor=0.0), Settings(grad_ratio=0.9)], ids=["s=0", "norm rule"])
def test_siss_leads_from_the_ideal_denoiser_of_all_to_that_of_the_kept_set(trained, settings):
    seed, original = trained
    model = MLP()
    model.load_state_dict(original.state_dict())
    assert distance(model, X) < 0.5 * distance(model, KEEP)  # it starts as the denoiser of X
    optimizer, rng = torch.optim.Adam(model.parameters(), lr=4e-3), torch.Generator().manual_seed(100 + seed)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600)
    for _ in range(600):
        terms = losses.siss(model, draw(X, 256, rng), SCHEDULE, lam=0.5)
        unlearning.step(METHODS["siss"], terms, optimizer, settings)
        schedule.step()
    assert distance(model, KEEP) < 0.75 * distance(model, X)
