"""From loss terms to one gradient to one optimizer step. Every method's gradient has the form

    g = g_keep − c · g_forget

with the gradients of its two terms (`minisiss.losses`) and a coefficient c by a rule of its own. Not here:
parts of a batch and several devices; `machine.ranks.gradient_in_parts` takes the place of `gradient` there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from minisiss import losses
from minisiss.losses import Batch, Difference, Term, Terms
from minisiss.schedule import Model, NoiseSchedule

Gradient = list[Tensor]  # one tensor for each of the parameters
MAX_NORM = 1.0  # of the gradient that is stepped along


@dataclass(frozen=True)
class Settings:
    """The numbers that the methods take. Of each: its type, the least and the most it may be, its meaning."""

    lam: Annotated[float, 0, 1, "λ of the mixture: share of noisy images from A (siss, unseen)"] = 0.5
    grad_ratio: Annotated[float | None, 0, None, "ρ: norm of what is subtracted over the kept one's"] = 0.1
    superfactor: Annotated[float | None, 0, None, "s: subtract s·k/(n−k)·L_A, not by norms"] = None
    ceiling: Annotated[float, 0, None, "subtract an image up to this error, in units of τ; 0: always"] = 0.0
    erasediff_eta: Annotated[float, 0, None, "η of EraseDiff's rule"] = 0.1
    retrack_weight: Annotated[float, 0, 1, "λ of ReTrack: the weight of its forget term"] = 0.005
    neighbours: Annotated[int, 0, None, "K of ReTrack: kept pictures near one to forget; 0: all"] = 10
    unseen_weight: Annotated[float, 0, None, "s of unseen: the weight s·k/(n−k) of its forget term"] = 3.0


def subtract(g_keep: Gradient, g_forget: Gradient, settings: Settings) -> Tensor:
    """c = ρ ‖g_keep‖ / ‖g_forget‖ (the paper, section 5). Where s is given, c is known instead."""
    # A batch in which no image counts in the forget term has g_forget = 0, and c · 0 = 0 needs c finite.
    return settings.grad_ratio * norm(g_keep) / norm(g_forget).clamp(min=1e-30)


def erasediff_rule(g_keep: Gradient, g_forget: Gradient, settings: Settings) -> Tensor:
    """−c = max(η − ⟨g_keep, g_forget⟩ / ‖g_forget‖², 0) (Wu et al. 2024): both terms are descended on."""
    agreement = dot(g_keep, g_forget) / norm(g_forget).square().clamp(min=1e-30)
    return -(settings.erasediff_eta - agreement).clamp(min=0)


@dataclass(frozen=True)
class Method:
    """A row of the table of methods."""

    loss: Callable[..., Terms]  # (model, batch, schedule, …) -> Terms
    rule: Callable[[Gradient, Gradient, Settings], Tensor] | None = subtract  # c; None: −1, or one term
    settings: tuple[str, ...] = ()  # fields of `Settings` that the loss takes by name
    neighbours: bool = False  # whether the loss needs batch.neighbours
    old: bool = False  # whether it needs the model before unlearning

    @property
    def reads(self) -> set[str]:
        """The fields of `Settings` that make a difference. (A rule of one's own may read any.)"""
        of_rules = {None: (), erasediff_rule: ("erasediff_eta",),
                    subtract: ("grad_ratio", "superfactor", "ceiling")}
        every = Settings.__dataclass_fields__
        of_data = ("neighbours",) if self.neighbours else ()
        return {*self.settings, *of_rules.get(self.rule, every), *of_data}

    def terms(self, model: Model, batch: Batch, schedule: NoiseSchedule, settings: Settings,
              ceiling: Tensor | None = None, old: Model | None = None) -> Terms:
        """What the loss makes of a batch, the forget term only below a ceiling if there is one: [T].

        old: the model before unlearning, for the methods that need it.
        """
        more = {name: getattr(settings, name) for name in self.settings} | ({"old": old} if self.old else {})
        terms = self.loss(model, batch, schedule, **more)
        return terms if ceiling is None else terms.below(ceiling)

    def known_c(self, terms: Terms, settings: Settings) -> float | None:
        """c where it is known before any gradient: −1 where two terms are added, or where s is given."""
        if self.rule is None:
            return -1.0
        if self.rule is not subtract or settings.superfactor is None:
            return None
        return terms.c_of_deletion + settings.superfactor


# A new method is one function in the form of those in losses.py, and one line here.
METHODS = {
    "siss": Method(losses.siss, settings=("lam",)),
    "siss_no_is": Method(losses.siss_no_is),
    "naive_deletion": Method(losses.naive_deletion, None),
    "neggrad": Method(losses.neggrad, None),
    "erasediff": Method(losses.erasediff, erasediff_rule),
    "retrack": Method(losses.retrack, None, settings=("retrack_weight",), neighbours=True),
    "unseen": Method(losses.unseen, None, settings=("lam", "unseen_weight"), old=True),
}


def draw_batch(data: Any, size: int, schedule: NoiseSchedule, generator: torch.Generator,
               draw_x: str = "rest", neighbours: Callable[[Tensor], Tensor] | None = None) -> Batch:
    """Draw everything that one step needs.

    data: a `TrainingSet`, or what has n, k and draw(part, size, generator) -> [size, C, H, W] in [−1, 1],
    with the parts "all" for X, "rest" for X∖A and "forget" for A. draw_x: "all" draws x ~ X, the form of the
    paper's main text, for SISS with and without IS; "rest" draws x ~ X∖A, that of its appendix A.1.
    neighbours: gives `Batch.neighbours` for a batch of a.
    """
    x, a = data.draw(draw_x, size, generator), data.draw("forget", size, generator)
    kind = {"generator": generator, "device": x.device}
    return Batch(
        x, a,
        timesteps=torch.randint(len(schedule), (size,), **kind),
        noise=torch.randn(x.shape, **kind),
        pick=torch.rand(size, **kind),
        uniform=torch.rand(x.shape, **kind),
        n=data.n, k=data.k, x_from=draw_x,
        neighbours=neighbours(a) if neighbours else None,
    )


def gradient(term: Term | Difference, parameters: list[Tensor]) -> tuple[Tensor, Gradient]:
    """The mean of a term over its batch, and its gradient. Only images that count need the network."""
    counts, batch_size = term.counts, len(term.counts)
    if not counts.any():
        return torch.zeros((), device=counts.device), [torch.zeros_like(p) for p in parameters]
    loss = term.per_image(counts.nonzero()[:, 0]).sum() / batch_size
    return loss.detach(), list(torch.autograd.grad(loss, parameters, materialize_grads=True))


def step(method: Method, terms: Terms, optimizer: torch.optim.Optimizer, settings: Settings, *,
         gradient_of: Callable[..., tuple[Tensor, Gradient]] = gradient,
         also: Tensor | None = None) -> dict[str, Tensor]:
    """One optimizer step along g = g_keep − c · g_forget, clipped to `MAX_NORM`. The gradient of a further
    loss, `also`, is added to g before it is clipped; it has no part in c.

    Where c is known beforehand and both terms are of the same noisy images, one pass through the network
    gives g. Else each term has a pass of its own, over the images that count in it. Returns the step's
    figures as scalar tensors. Raises FloatingPointError when a loss, an importance weight or a gradient is
    not finite, leaving the parameters as they were, and when a parameter is not finite afterwards.
    """
    parameters = parameters_of(optimizer)
    figures = weight_figures(terms)
    if terms.forget is None:
        figures["loss_keep"], g = gradient_of(terms.keep, parameters)
    elif terms.keep is None:
        figures["loss_forget"], g_forget = gradient_of(terms.forget, parameters)
        g = [-f for f in g_forget]
    elif (c := method.known_c(terms, settings)) is not None and terms.share_images:
        figures["loss"], g = gradient_of(Difference(terms.keep, terms.forget, c), parameters)
    else:
        figures["loss_keep"], g_keep = gradient_of(terms.keep, parameters)
        figures["loss_forget"], g_forget = gradient_of(terms.forget, parameters)
        c = method.rule(g_keep, g_forget, settings) if c is None else torch.tensor(c, device=g_keep[0].device)
        figures |= {"c": c, "norm_keep": norm(g_keep), "norm_forget": norm(g_forget)}
        # In the memory of g_keep.
        g = [keep.sub_(c * forget) for keep, forget in zip(g_keep, g_forget, strict=True)]
    for parameter, direction in zip(parameters, g, strict=True):
        parameter.grad = direction
    if also is not None:
        also.backward()  # adds to what the parameters hold
        figures["loss_also"] = also.detach()
    return descend(optimizer, figures)


def descend(optimizer: torch.optim.Optimizer, figures: dict[str, Tensor]) -> dict[str, Tensor]:
    """Clip the gradient that the parameters hold, and step along it; adds its norm to the figures.

    Raises FloatingPointError as `step` does.
    """
    parameters = parameters_of(optimizer)
    figures["norm"] = torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
    finite = torch.stack(list(figures.values())).isfinite().tolist()
    if not all(finite):
        name = list(figures)[finite.index(False)]
        raise FloatingPointError(f"{name} is {figures[name].item()}")
    optimizer.step()
    optimizer.zero_grad()
    if not norm([p.detach() for p in parameters]).isfinite():
        raise FloatingPointError("a parameter is not finite")
    return figures


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All that an optimizer steps."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average ← decay · average + (1 − decay) · model, for every parameter."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def weight_figures(terms: Terms) -> dict[str, Tensor]:
    """The effective sample size of each term's weights, and the share of images that count in both terms."""
    there = {name: term for name, term in (("keep", terms.keep), ("forget", terms.forget)) if term}
    figures = {f"ess_{name}": effective_sample_size(term.weight) for name, term in there.items()}
    if len(there) == 2:
        figures["overlap"] = (terms.keep.counts & terms.forget.counts).float().mean()
    return figures


def effective_sample_size(weight: Tensor) -> Tensor:
    """(Σw)²/Σw²: how many images of equal weight would average as well (Kish 1965). 0 without weights."""
    return weight.sum().square() / weight.square().sum().clamp(min=1e-30)


def dot(g: Gradient, h: Gradient) -> Tensor:
    """⟨g, h⟩"""
    return torch.stack([torch.dot(a.flatten(), b.flatten()) for a, b in zip(g, h, strict=True)]).sum()


def norm(g: Gradient) -> Tensor:
    """‖g‖"""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(g)))
