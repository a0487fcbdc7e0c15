"""The idea as a picture: one noisy image serves two losses, and a cluster of points leaves a ring.

    python -m minisiss.study.toy --out toy.png              20 seconds on two CPU cores; needs matplotlib

An image is one pixel here: of one channel, a number, or of two, a point in the plane. Losses, weights, steps
and sampler are the package's own. `unseen` is missing: one pixel has no rows and columns to exchange.
Not here: `toy_figure`, which draws, and shows the weights and the variance of the loss on the way.
"""

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from minisiss import unlearning
from minisiss.data.neighbours import nearest_kept
from minisiss.data.training_set import TrainingSet, to_float, to_uint8
from minisiss.errors import UserError
from minisiss.machine.command_line import Parser, filename, run, seed
from minisiss.machine.device import adamw
from minisiss.metrics.forgetting import denoising_loss
from minisiss.metrics.quality import energy_distance
from minisiss.sampling import sample
from minisiss.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule.linear()
CENTRE, WIDTH = torch.tensor([0.2, 0.15]), 0.07  # of the cluster
STEPS, SAMPLES, BEFORE, AIM = 1000, 2000, "Before: ring and cluster", "The aim: retrained without it"
# On the seeds 101 and 102 the least distance with at most 0.5% in the cluster; naive deletion left more.
METHODS = {
    "Naive deletion: some are left": dict(name="naive_deletion", lr=3e-3),
    "NegGrad: the ring gets thin": dict(name="neggrad", steps=60, lr=5e-4),
    "SISS: only the ring is left": dict(name="siss", grad_ratio=0.2),
    "SISS with a ceiling: the same": dict(name="siss", grad_ratio=0.2, ceiling=1.0),
    "ReTrack: the same": dict(name="retrack", lr=3e-3, retrack_weight=0.01),
}


class Denoiser(nn.Module):
    """ε_θ: a small network on waves of random lengths, scaled as in Karras et al. (2022, table 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("waves", torch.randn(3, 32) * torch.tensor([[2.0], [2.0], [0.5]]))
        self.layers = nn.Sequential(
            nn.Linear(67, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, 2))

    def forward(self, m: Tensor, timesteps: Tensor) -> Tensor:
        gamma, sigma = SCHEDULE.gamma[timesteps][:, None], SCHEDULE.sigma[timesteps][:, None]
        z, noise, scale = m.flatten(1) / gamma, sigma / gamma, 0.5  # scale: about the points' own
        share = scale / (noise**2 + scale**2).sqrt()
        features = torch.cat([z * share / scale, noise.log()], dim=1)
        waves = features @ self.waves
        out = self.layers(torch.cat([features, waves.sin(), waves.cos()], dim=1))
        return ((z - share * (share * z + noise * out)) / noise).view_as(m)


def train(model: nn.Module, data: TrainingSet, generator: torch.Generator, name: str, draw_x: str = "rest",
          steps: int = 200, lr: float = 1e-3, ceiling: float | None = None, **settings: float) -> nn.Module:
    """A copy of a model, after steps of a method at a rate that falls to 0."""
    method, settings = unlearning.METHODS[name], unlearning.Settings(**settings)
    near = nearest_kept(data, settings.neighbours) if method.neighbours else None
    if ceiling:
        left = to_float(data.forget.flip(1)) * torch.tensor([-1.0, 1.0]).view(2, 1, 1)
        twin = to_uint8(torch.cat([left, -left]))  # the cluster turned by a quarter, where no data is
        ceiling *= torch.tensor(denoising_loss(model, SCHEDULE, twin, 5000, buckets=50)).repeat_interleave(20)
    model = copy.deepcopy(model)
    optimizer = adamw(model, lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        batch = unlearning.draw_batch(data, 256, SCHEDULE, generator, draw_x, near)
        unlearning.step(method, method.terms(model, batch, SCHEDULE, settings, ceiling), optimizer, settings)
    return model


def learn_and_forget(seed: int) -> tuple[TrainingSet, dict[str, nn.Module]]:
    """A ring and, inside it, a cluster; and by title models of both, of the ring, and after each method."""
    generator, n, k = torch.manual_seed(seed), 2000, 240
    angle, radius = 2 * torch.pi * torch.rand(n - k), 0.75 + 0.05 * torch.randn(n - k)
    ring = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
    cluster = CENTRE + WIDTH * torch.randn(k, 2)
    data, new = TrainingSet(to_uint8(torch.cat([ring, cluster]))[..., None, None], k), Denoiser()
    before, aim = (train(new, data, generator, "naive_deletion", x, STEPS, 5e-3) for x in ("all", "rest"))
    after = {title: train(before, data, generator, **how) for title, how in METHODS.items()}
    return data, {BEFORE: before, AIM: aim} | after


def look(data: TrainingSet, models: dict[str, nn.Module], seed: int) -> dict[str, tuple]:
    """By title: points [N, 2], which of them are in the cluster, [N], and their energy distance from another
    draw of the retrained model. First the data, then what each model draws."""
    def draw(title: str, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return sample(models[title], SCHEDULE, (SAMPLES, 2, 1, 1), generator=generator).flatten(1)

    aim = draw(AIM, seed + 1)
    points = {"Training data": to_float(data.images).flatten(1)} | {one: draw(one, seed) for one in models}
    near = {title: (of - CENTRE).norm(dim=1) < 3 * WIDTH for title, of in points.items()}
    return {title: (of, near[title], energy_distance(of, aim)) for title, of in points.items()}


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=filename, default="toy.png", help="the picture to write")
    parser.add_argument("--seed", type=seed, default=0)
    args = parser.parse_args()
    out = Path(args.out)
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: should be a file, in a directory that exists")
    try:
        from minisiss.study import toy_figure
    except ImportError as error:
        raise UserError("the picture needs matplotlib (pip install matplotlib)") from error
    data, models = learn_and_forget(args.seed)
    toy_figure.draw(out, SCHEDULE, data, models[BEFORE], look(data, models, args.seed))
    print(f"written to {out}")


if __name__ == "__main__":
    run(main)
