"""The idea as a picture: one noisy image serves two losses, and a cluster of points leaves a ring.
Here an image is one pixel: of one channel, a number, or of two, a point in the plane.

    python -m minisiss.study.toy          writes toy.png in 15 seconds; needs matplotlib
"""

import copy
from collections.abc import Callable
from functools import partial

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.distributions import Normal

from minisiss.lab.data import TrainingSet, to_uint8
from minisiss.losses import importance_weights, naive_deletion, siss
from minisiss.sampling import sample
from minisiss.schedule import NoiseSchedule
from minisiss.unlearning import draw_batch, ratio_of_norms, step

SCHEDULE = NoiseSchedule.linear()
CENTRE, WIDTH = torch.tensor([0.2, 0.15]), 0.07  # of the cluster
KEEP, FORGET = "#0072B2", "#D55E00"  # colour-blind readers tell them apart


def denoise(layers: nn.Module, m: Tensor, timesteps: Tensor) -> Tensor:
    """ε_θ = σ m + γ v, where the layers predict v (Salimans and Ho 2022)."""
    gamma, sigma = SCHEDULE.gamma[timesteps][:, None], SCHEDULE.sigma[timesteps][:, None]
    points = m.flatten(1)
    v = layers(torch.cat([8 * points, sigma.log()], dim=1))
    return (sigma * points + gamma * v).view_as(m)


def train(layers: nn.Module, data: TrainingSet, loss: Callable, c: float | Callable, steps: int,
          lr: float, draw_x: str = "rest") -> nn.Module:
    """A copy of a network after steps of a method."""
    layers = copy.deepcopy(layers)
    loss = partial(loss, partial(denoise, layers), schedule=SCHEDULE)
    optimizer = torch.optim.AdamW(layers.parameters(), lr)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = draw_batch(data, 256, SCHEDULE, generator, draw_x)
        step(loss, batch, c, optimizer)
    return layers


def learn_and_forget() -> dict[str, nn.Module]:
    """Networks by title. The rates and ρ were chosen with the seed 101."""
    torch.manual_seed(0)
    angle = 2 * torch.pi * torch.rand(1760)
    circle = torch.stack([angle.cos(), angle.sin()], dim=1)
    ring = 0.75 * circle + 0.05 * torch.randn(1760, 2)
    cluster = CENTRE + WIDTH * torch.randn(240, 2)
    points = torch.cat([ring, cluster])[:, :, None, None]
    data = TrainingSet(to_uint8(points), k=240)
    layers = nn.Sequential(
        nn.Linear(3, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(),
        nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2))
    before = train(layers, data, naive_deletion, 0.0, 2500, lr=1e-3, draw_x="all")
    by_norms = partial(ratio_of_norms, grad_ratio=0.1)
    return {
        "Before": before,
        "The aim: retrained": train(layers, data, naive_deletion, 0.0, 2500, lr=1e-3),
        "Naive deletion": train(before, data, naive_deletion, 0.0, 200, lr=5e-4),
        "SISS": train(before, data, partial(siss, lam=0.5), by_norms, 200, lr=5e-4),
    }


def draw_weights(left: Axes, right: Axes, t: int) -> None:
    """The densities of the noisy images m of two numbers x and a, and the weights of each m."""
    m = torch.linspace(-2.1, 2.1, 400)[:, None]
    x, a = torch.full_like(m, -0.6), torch.full_like(m, 0.6)
    gamma, sigma = SCHEDULE.gamma[[t]], SCHEDULE.sigma[[t]]
    left.plot(m, Normal(gamma * x, sigma).log_prob(m).exp(), color=KEEP, label="q(m|x)")
    left.plot(m, Normal(gamma * a, sigma).log_prob(m).exp(), color=FORGET, label="q(m|a)")
    w_x, w_a = importance_weights(m, x, a, gamma, sigma, lam=0.5)
    _, unbounded = importance_weights(m, x, a, gamma, sigma, lam=0.0)
    right.plot(m, w_x, color=KEEP, label="$w_x$")
    right.plot(m, w_a, color=FORGET, label="$w_a$")
    right.plot(m, unbounded, color=FORGET, linestyle=":", label="$w_a$ at λ = 0")
    left.set(title=f"Densities of m, t = {t}", ylim=(0, 2.2))
    right.set(title=f"Weights of m, t = {t}", ylim=(-0.1, 3.6))
    left.legend(frameon=False)
    right.legend(frameon=False)


def draw_points(axes: Axes, title: str, layers: nn.Module) -> None:
    """What a network samples, the cluster in its own colour."""
    model, generator = partial(denoise, layers), torch.Generator().manual_seed(0)
    points = sample(model, SCHEDULE, (2000, 2, 1, 1), generator=generator).flatten(1)
    inside = (points - CENTRE).norm(dim=1) < 3 * WIDTH
    axes.scatter(*points[~inside].T, s=1, color=KEEP)
    axes.scatter(*points[inside].T, s=1, color=FORGET)
    axes.set(title=title, xlabel=f"{inside.float().mean():.1%} in the cluster")
    axes.set(aspect="equal", xlim=(-1, 1), ylim=(-1, 1), xticks=[], yticks=[])


if __name__ == "__main__":
    figure = Figure(figsize=(12, 6), dpi=100, layout="constrained")
    above, below = figure.subplots(2, 4)
    draw_weights(above[0], above[1], t=60)
    draw_weights(above[2], above[3], t=600)
    for axes, (title, layers) in zip(below, learn_and_forget().items(), strict=True):
        draw_points(axes, title, layers)
    figure.savefig("toy.png")
