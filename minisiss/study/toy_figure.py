"""Draws what `toy` found. Imports matplotlib, an optional extra: import it where it is wanted."""

import io
from dataclasses import replace
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure, SubFigure
from PIL import Image
from torch import Tensor
from torch.distributions import Normal

from minisiss.data.training_set import TrainingSet
from minisiss.losses import importance_weights, siss
from minisiss.runs.files import write_atomically
from minisiss.schedule import Model, NoiseSchedule
from minisiss.unlearning import draw_batch

KEEP, FORGET, MIXTURE = "#0072B2", "#D55E00", "#333333"  # told apart by colour-blind readers too
LEVELS = {60: "Low noise: m counts in one loss", 250: "More noise", 600: "High noise: m counts in both"}
LAMS = torch.linspace(0.02, 0.98, 25).tolist()
HEADING = dict(x=0.012, ha="left", fontsize=12, fontweight="bold")
STYLE = {"font.size": 9.5, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}


def draw(path: Path, schedule: NoiseSchedule, data: TrainingSet, model: Model,
         found: dict[str, tuple[Tensor, Tensor, float]]) -> None:
    """Write the picture. model: the one before unlearning; found: what `toy.look` returns."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 9.4), dpi=150, layout="constrained")
        above, below = figure.subfigures(2, 1, height_ratios=[4, 5.6], hspace=0.03)
        left, right = above.subfigures(1, 2, width_ratios=[3, 1.15])
        draw_weights(left, schedule)
        draw_variances(right, schedule, data, model)
        draw_points(below, found)
        figure.savefig(drawn := io.BytesIO())
    picture = Image.open(drawn).convert("RGB").quantize(200)  # few colours: a third of the size
    write_atomically(path, lambda file: picture.save(file, "PNG", optimize=True))


def draw_weights(figure: SubFigure, schedule: NoiseSchedule) -> None:
    """The noisy images of the numbers x = −0.6 and a = 0.6, and how much each m counts for them."""
    figure.suptitle("1  One noisy image m serves two losses, and no weight exceeds 2", **HEADING)
    m = torch.linspace(-2.1, 2.1, 400)[:, None]
    x, a = torch.full_like(m, -0.6), torch.full_like(m, 0.6)
    axes = figure.subplots(2, 3, sharex=True, sharey="row")
    for (over, under), (t, title) in zip(axes.T, LEVELS.items(), strict=True):
        gamma, sigma = schedule.gamma[t].expand(len(m)), schedule.sigma[t].expand(len(m))
        q_x, q_a = (Normal(gamma[0] * of, sigma[0]).log_prob(m).exp()[:, 0] for of in (x, a))
        w_x, w_a = importance_weights(m, x, a, gamma, sigma, lam=0.5)
        _, unbounded = importance_weights(m, x, a, gamma, sigma, lam=0.0)
        for q, w, colour, of in ((q_x, w_x, KEEP, "x"), (q_a, w_a, FORGET, "a")):
            over.fill_between(m[:, 0], q, color=colour, alpha=0.35, lw=0, label=f"q(m|{of})")
            under.plot(m, w, color=colour, lw=2.2, label=f"$w_{of}$")
        over.plot(m, (q_x + q_a) / 2, color=MIXTURE, lw=1.5, label="their mixture, λ = ½")
        under.plot(m, unbounded, color=FORGET, lw=1.5, ls=":", label="$w_a$ at λ = 0")
        under.axhline(2, color=MIXTURE, lw=1, ls="--", label="1/λ = 2")
        over.set(title=title, yticks=[])
        under.set(xlabel=f"m at t = {t}", ylim=(-0.1, 3.6), yticks=[0, 1, 2, 3])
    axes[0, 0].set_ylabel("density")
    axes[1, 0].set_ylabel("weight")
    axes[0, 2].legend(frameon=False, loc="upper right")
    axes[1, 2].legend(frameon=False, loc="upper left", ncols=2, columnspacing=1)


def variance(model: Model, data: TrainingSet, schedule: NoiseSchedule, timestep: int, lam: float) -> float:
    """Of one image's part in SISS, keep − c · forget, with the c that makes both terms equal in the mean."""
    batch = draw_batch(data, 4096, schedule, torch.Generator().manual_seed(0))
    batch = replace(batch, timesteps=torch.full_like(batch.timesteps, timestep))
    with torch.no_grad():
        terms = siss(model, batch, schedule, lam)
        keep, forget = (term.per_image() for term in (terms.keep, terms.forget))
    return (keep / keep.mean() - forget / forget.mean()).var().item()


def draw_variances(figure: SubFigure, schedule: NoiseSchedule, data: TrainingSet, model: Model) -> None:
    """How much one image's part in the loss varies, over λ."""
    figure.suptitle("2  Why λ = ½", **HEADING)
    axis = figure.subplots()
    looks = ("#000000", 12, "bottom"), ("#009E73", 4, "bottom"), ("#CC79A7", 4, "top")
    for t, (colour, place, side) in zip(LEVELS, looks, strict=True):
        values = [variance(model, data, schedule, t, lam) for lam in LAMS]
        axis.semilogy(LAMS, values, color=colour, lw=2.2)
        beside = 1.12 if side == "bottom" else 1 / 1.12
        axis.text(LAMS[place] + 0.03, values[place] * beside, f"t = {t}", color=colour, va=side)
    axis.axvline(0.5, color=MIXTURE, lw=1, ls="--", zorder=0)
    axis.set(title="Variance of the loss: least\nat ½ where it is large", xlabel="λ, the share of m from a",
             ylim=(0.3, 150), xticks=[0, 0.5, 1], xticklabels=["0", "½", "1"])


def draw_points(figure: SubFigure, found: dict[str, tuple[Tensor, Tensor, float]]) -> None:
    """The training data and what each model draws, the cluster in its own colour."""
    figure.suptitle("3  Forget the cluster, keep the ring", **HEADING)
    figure.supxlabel("distance: energy distance × 1000 from other samples of the retrained model", fontsize=9)
    axes = figure.subplots(2, 4, gridspec_kw={"hspace": 0.03})
    for axis, title in zip(axes.flat, found, strict=True):
        points, inside, distance = found[title]
        shown = slice(None, None, 2)  # half of them are enough to see
        axis.scatter(*points[shown].T, s=4, lw=0, color=[FORGET if one else KEEP for one in inside[shown]])
        said = f"{inside.float().mean():.1%} in cluster, distance {max(0, 1000 * distance):.1f}"
        axis.set(title=title, xlabel=said, xlim=(-1, 1), ylim=(-1, 1), xticks=[], yticks=[], aspect="equal")
        axis.spines[:].set_visible(False)
