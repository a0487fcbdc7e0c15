"""From loss terms to one gradient to one optimizer step.

Every method's gradient has the form

    g = g_keep − c · g_forget

with the gradients of its two terms (see `minisiss.losses`) and a coefficient c by a rule of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from minisiss import losses
from minisiss.data.training_set import TrainingSet, draw
from minisiss.errors import Diverged
from minisiss.losses import Batch, Term, Terms
from minisiss.machine.ranks import ALONE, World
from minisiss.schedule import NoiseSchedule

Gradient = list[Tensor]  # one tensor a parameter


@dataclass(frozen=True)
class Settings:
    """The numbers that the methods take."""

    lam: float = 0.5  # λ: share of the mixture drawn around the forget set
    grad_ratio: float = 0.1  # ρ: norm of the subtracted gradient over the norm of the kept one
    superfactor: float | None = None  # s: instead of the norm rule, subtract (1+s) times
    erasediff_eta: float = 0.1  # η: how much of the forget gradient to descend even where both gradients agree


def subtract(g_keep: Gradient, g_forget: Gradient, settings: Settings) -> Tensor:
    """c = ρ ‖g_keep‖ / ‖g_forget‖ (the paper, section 5), or c = 1 + s where a superfactor is given."""
    if settings.superfactor is not None:
        return torch.tensor(1 + settings.superfactor, device=g_keep[0].device)
    # A batch in which no image matters to the forget term has g_forget = 0, and c · 0 = 0 needs c finite.
    return settings.grad_ratio * norm(g_keep) / norm(g_forget).clamp(min=1e-30)


def erasediff_rule(g_keep: Gradient, g_forget: Gradient, settings: Settings) -> Tensor:
    """−c = max(η − ⟨g_keep, g_forget⟩ / ‖g_forget‖², 0) (Wu et al. 2024): both terms are descended on."""
    agreement = dot(g_keep, g_forget) / norm(g_forget).square().clamp(min=1e-30)
    return -(settings.erasediff_eta - agreement).clamp(min=0)


@dataclass(frozen=True)
class Method:
    """A row of the table of methods."""

    loss: Callable[..., Terms]  # (model, batch, schedule, …) -> Terms
    rule: Callable[[Gradient, Gradient, Settings], Tensor] = subtract  # c; unused by a loss of one term
    settings: tuple[str, ...] = ()  # fields of `Settings` that the loss takes by name
    x_from: str = "all"  # the default of `draw_batch`


# A new method is one function in the form of those in losses.py, and one line here.
METHODS = {
    "siss": Method(losses.siss, settings=("lam",)),
    "siss_no_is": Method(losses.siss_no_is),
    "naive_deletion": Method(losses.naive_deletion, x_from="rest"),
    "neggrad": Method(losses.neggrad),
    "erasediff": Method(losses.erasediff, erasediff_rule, x_from="rest"),
}


def draw_batch(
    data: TrainingSet, size: int, schedule: NoiseSchedule, generator: torch.Generator, x_from: str = "all", world: World = ALONE
) -> Batch:
    """Draw everything that one step needs. Each rank reads its share of the images, and gets those of the others from them.

    x_from = "all" draws x ~ X: the paper's expectation, under which SISS at s = 0 is naive deletion.
    x_from = "rest" draws x ~ X∖A, as the paper's released code does, and as naive deletion and EraseDiff need. SISS at
    s = 0 is then n/(n−k) · L_{X∖A} − k/(n−k) · L_A: it pushes away from A where naive deletion does not.
    """
    device = data.images.device
    x = world.gather(draw(data.images if x_from == "all" else data.keep, size, generator, world))
    return Batch(
        x=x,
        a=world.gather(draw(data.forget, size, generator, world)),
        timesteps=torch.randint(len(schedule), (size,), generator=generator, device=device),
        noise=torch.randn(x.shape, generator=generator, device=device),
        pick=torch.rand(size, generator=generator, device=device),
        uniform=torch.rand(x.shape, generator=generator, device=device),
        n=data.n,
        k=data.k,
    )


def step(
    method: Method,
    terms: Terms,
    optimizer: torch.optim.Optimizer,
    settings: Settings,
    *,
    max_norm: float = 1.0,
    micro_batch: int | None = None,
    world: World = ALONE,
    c: Tensor | None = None,
) -> dict[str, Tensor]:
    """One optimizer step along g = g_keep − c · g_forget, clipped to `max_norm`.

    With c given, of an earlier step, g is had from one pass for both terms, which must share their noisy images.
    The terms are of the whole batch on every rank, which makes the same step, and figures, on all.
    Returns the step's figures as scalar tensors. Raises Diverged when a loss, an importance weight or a gradient is not
    finite, leaving the parameters as they were, and when a parameter is not finite after the step.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    figures = {f"ess_{name}": effective_sample_size(term.weight) for name, term in vars(terms).items() if term}
    if terms.keep and terms.forget:
        figures["overlap"] = (terms.keep.weighed & terms.forget.weighed).float().mean()
    if c is None:
        g, found = two_passes(method, terms, parameters, settings, micro_batch, world)
    else:
        loss, g = gradient(losses.Difference(terms.keep, terms.forget, c), parameters, micro_batch, world)
        found = {"loss": loss, "c": c}
    figures |= found
    for parameter, direction in zip(parameters, g, strict=True):
        parameter.grad = direction
    figures["norm"] = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    finite = torch.stack(list(figures.values())).isfinite().tolist()
    if not all(finite):
        name = list(figures)[finite.index(False)]
        raise Diverged(f"{name} is {figures[name].item()}")
    optimizer.step()
    optimizer.zero_grad()
    if not norm([p.detach() for p in parameters]).isfinite():
        raise Diverged("a parameter is not finite")
    return figures


def two_passes(
    method: Method, terms: Terms, parameters: Gradient, settings: Settings, micro_batch: int | None, world: World
) -> tuple[Gradient, dict[str, Tensor]]:
    """g = g_keep − c · g_forget, with c by the method's rule, and the figures of both terms."""
    figures, g_keep, g_forget, c = {}, None, None, torch.ones((), device=parameters[0].device)
    if terms.keep:
        figures["loss_keep"], g_keep = gradient(terms.keep, parameters, micro_batch, world)
        figures["norm_keep"] = norm(g_keep)
    if terms.forget:
        figures["loss_forget"], g_forget = gradient(terms.forget, parameters, micro_batch, world)
        figures["norm_forget"] = norm(g_forget)
    if not g_forget:
        return g_keep, figures
    if g_keep:
        c = method.rule(g_keep, g_forget, settings)
    torch._foreach_mul_(g_forget, -c)
    if g_keep:
        torch._foreach_add_(g_forget, g_keep)
    return g_forget, figures | {"c": c}


def gradient(term: Term | losses.Difference, parameters: Gradient, micro_batch: int | None = None, world: World = ALONE) -> tuple[Tensor, Gradient]:
    """The mean of a term over its batch, and the gradient of that.

    Only the images that the term weighs go through the network, at most `micro_batch` at a time, and each pass is freed
    before the next: the cost is 3 units for each image weighed (forward 1, backward 2), where one forward pass with two
    backward passes costs 5 for each image. They are shared out to the ranks, as evenly for each term as can be, and added
    up over them. The result does not depend on any of this, up to rounding.
    """
    weighed = term.weighed
    images = world.share(weighed.nonzero()[:, 0])
    value = torch.zeros((), device=images.device)
    for parameter in parameters:
        parameter.grad = None
    for some in images.split(micro_batch or max(1, len(images))):
        if len(some):
            loss = term.per_image(some).sum() / len(weighed)
            loss.backward()
            value += loss.detach()
    total = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    world.sum_([value, *total])
    return value, total


def dot(g: Gradient, h: Gradient) -> Tensor:
    """⟨g, h⟩"""
    return torch.stack([torch.vdot(a.flatten(), b.flatten()) for a, b in zip(g, h, strict=True)]).sum()


def norm(g: Gradient) -> Tensor:
    """‖g‖"""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(g)))


def effective_sample_size(weight: Tensor) -> Tensor:
    """(Σw)²/Σw²: how many images of equal weight would average as well (Kish 1965). 0 if all weights are 0."""
    return weight.sum().square() / weight.square().sum().clamp(min=1e-30)
