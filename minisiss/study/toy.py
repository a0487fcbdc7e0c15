"""The idea as a picture: one noisy image serves two losses, and a cluster of points leaves a ring.

    python -m minisiss.study.toy --out toy.png          20 seconds on two CPU cores; needs
    matplotlib

An image is one pixel here: of one channel, a number, or of two, a point in the plane. The losses,
the weights, the steps and the sampler are the package's own.
"""

import copy

import torch
from matplotlib.figure import Figure, SubFigure
from torch import Tensor, nn
from torch.distributions import Normal

from minisiss.lab.cli import Parser, number, run
from minisiss.lab.data import TrainingSet, nearest_kept, to_uint8
from minisiss.lab.precision import adamw
from minisiss.losses import importance_weights
from minisiss.sampling import sample
from minisiss.schedule import NoiseSchedule
from minisiss.unlearning import METHODS, draw_batch, step

SCHEDULE = NoiseSchedule.linear()
CENTRE, WIDTH = torch.tensor([0.2, 0.15]), 0.07  # of the cluster
KEEP, FORGET, MIXTURE = "#0072B2", "#D55E00", "#333333"  # colour-blind readers tell them apart
LEVELS = {60: "Low noise: m counts in one loss", 600: "High noise: m counts in both losses"}
# The rates and ρ were chosen on the seeds 101 and 102.
UNLEARN = {
    "Naive deletion: some are left": dict(method="naive_deletion", lr=3e-3),
    "NegGrad: the ring gets thin": dict(method="neggrad", steps=60, lr=5e-4),
    "SISS: only the ring is left": dict(method="siss", grad_ratio=0.2),
    "ReTrack: the same": dict(method="retrack", lr=3e-3, retrack_weight=0.01),
}


class Denoiser(nn.Module):
    """ε_θ: a small network on waves of random lengths, scaled as in Karras et al. (2022, table
    1)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("waves", torch.randn(3, 32) * torch.tensor([[2.0], [2.0], [0.5]]))
        hidden = [nn.Linear(67, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU()]
        self.layers = nn.Sequential(*hidden, nn.Linear(96, 2))

    def forward(self, m: Tensor, timesteps: Tensor) -> Tensor:
        gamma, sigma = SCHEDULE.gamma[timesteps][:, None], SCHEDULE.sigma[timesteps][:, None]
        z, noise, scale = m.flatten(1) / gamma, sigma / gamma, 0.5  # scale: about the points' own
        share = scale / (noise**2 + scale**2).sqrt()
        features = torch.cat([z * share / scale, noise.log()], dim=1)
        waves = features @ self.waves
        out = self.layers(torch.cat([features, waves.sin(), waves.cos()], dim=1))
        return ((z - share * (share * z + noise * out)) / noise).view_as(m)


def train(model: nn.Module, data: TrainingSet, generator: torch.Generator, method: str = "siss",
          draw_x: str = "rest", steps: int = 200, lr: float = 1e-3, **numbers: float) -> nn.Module:
    """A copy of a model, after steps of a method at a rate that falls to 0."""
    model, row = copy.deepcopy(model), METHODS[method]
    settings = dict(lam=0.5, superfactor=None, nearest=nearest_kept(data, 10)) | numbers
    loss, c = row.loss_of(model, SCHEDULE, settings), row.c_of(settings)
    optimizer = adamw(model, lr)
    for taken in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - taken / steps)
        step(loss, draw_batch(data, 256, SCHEDULE, generator, draw_x), c, optimizer)
    return model


def learn_and_forget(seed: int) -> dict[str, nn.Module]:
    """By title models of a ring with a cluster inside, of the ring alone, and after each method."""
    generator, n, k = torch.manual_seed(seed), 2000, 240
    angle, radius = 2 * torch.pi * torch.rand(n - k), 0.75 + 0.05 * torch.randn(n - k)
    ring = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
    points = torch.cat([ring, CENTRE + WIDTH * torch.randn(k, 2)])
    data, new = TrainingSet(to_uint8(points)[..., None, None], k), Denoiser()
    both = train(new, data, generator, "naive_deletion", "all", 1000, 5e-3)
    aim = train(new, data, generator, "naive_deletion", "rest", 1000, 5e-3)
    models = {"Before: ring and cluster": both, "The aim: retrained without it": aim}
    for title, settings in UNLEARN.items():
        models[title] = train(both, data, generator, **settings)
    return models


def draw_weights(figure: SubFigure) -> None:
    """The noisy images m of the numbers x = −0.6 and a = 0.6, and how much each m counts for
    them."""
    figure.suptitle("1  One noisy image m serves two losses, and no weight exceeds 2")
    m = torch.linspace(-2.1, 2.1, 400)[:, None]
    x, a = torch.full_like(m, -0.6), torch.full_like(m, 0.6)
    axes = figure.subplots(2, 2, sharex=True, sharey="row")
    for (over, under), (t, title) in zip(axes.T, LEVELS.items(), strict=True):
        gamma, sigma = SCHEDULE.gamma[t].expand(len(m)), SCHEDULE.sigma[t].expand(len(m))
        weights = importance_weights(m, x, a, gamma, sigma, lam=0.5)
        _, unbounded = importance_weights(m, x, a, gamma, sigma, lam=0.0)
        for name, image, w, colour in zip("xa", (x, a), weights, (KEEP, FORGET), strict=True):
            density = Normal(gamma[0] * image, sigma[0]).log_prob(m).exp()[:, 0]
            over.fill_between(m[:, 0], density, color=colour, alpha=0.35, label=f"q(m|{name})")
            under.plot(m, w, color=colour, label=f"$w_{name}$")
        under.plot(m, unbounded, color=FORGET, ls=":", label="$w_a$ at λ = 0")
        under.axhline(2, color=MIXTURE, lw=1, ls="--", label="1/λ = 2")
        over.set(title=title, yticks=[])
        under.set(xlabel=f"m at t = {t}", ylim=(-0.1, 3.6))
    axes[0, 1].legend(frameon=False)
    axes[1, 1].legend(frameon=False, ncols=2)


def draw_points(figure: SubFigure, models: dict[str, nn.Module], seed: int) -> None:
    """What each model samples, the cluster in its own colour."""
    figure.suptitle("2  Forget the cluster, keep the ring")
    for axis, (title, model) in zip(figure.subplots(2, 3).flat, models.items(), strict=True):
        generator = torch.Generator().manual_seed(seed)
        points = sample(model, SCHEDULE, (2000, 2, 1, 1), generator=generator).flatten(1)
        inside = (points - CENTRE).norm(dim=1) < 3 * WIDTH
        axis.scatter(*points[~inside].T, s=3, color=KEEP)
        axis.scatter(*points[inside].T, s=3, color=FORGET)
        words = f"{inside.float().mean():.1%} in the cluster"
        axis.set(title=title, xlabel=words, xlim=(-1, 1), ylim=(-1, 1), xticks=[], yticks=[])
        axis.set_aspect("equal")


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--out", default="toy.png", help="the picture to write")
    parser.add_argument("--seed", type=number(int, 0), default=0)
    args = parser.parse_args()
    figure = Figure(figsize=(9, 10), dpi=110, layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[4, 6])
    draw_weights(above)
    draw_points(below, learn_and_forget(args.seed), args.seed)
    figure.savefig(args.out)
    print(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    run(main)
