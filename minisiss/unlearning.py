"""One step of unlearning: a batch, a loss, a gradient, an optimizer step. Every gradient is

    g = g_keep − c · g_forget

where g_keep and g_forget are the gradients of the two terms of a loss. `METHODS` says for each
method which loss it has, and which number or rule is its c.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minisiss import beyond, losses
from minisiss.losses import Batch
from minisiss.schedule import Model, NoiseSchedule

Gradient = list[Tensor]  # one tensor per parameter
Rule = Callable[[Gradient, Gradient], Tensor]  # (g_keep, g_forget) -> c
MAX_NORM = 1.0  # longer gradients are clipped to this norm


def draw_batch(data: Any, size: int, schedule: NoiseSchedule, generator: torch.Generator,
               draw_x: str = "rest") -> Batch:
    """Draw everything that one step needs, with `size` images x and as many a.

    data: has n, k and draw(part, size, generator) -> [size, C, H, W] in [−1, 1], where part is
    "all" for X, "rest" for X∖A, "forget" for A. draw_x: "all" draws x ~ X, "rest" draws x ~ X∖A.
    """
    x = data.draw(draw_x, size, generator)
    a = data.draw("forget", size, generator) if data.k else x  # training may forget nothing
    options = {"generator": generator, "device": x.device}
    return Batch(
        x, a,
        timesteps=(len(schedule) * spread(size, **options)).long(),
        noise=torch.randn(x.shape, **options),
        pick=spread(size, **options),
        uniform=torch.rand(x.shape, **options),
        n=data.n, k=data.k, x_from=draw_x)


def spread(size: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """One number from each of `size` equal parts of [0, 1), in random order: [size] float64.

    Each number alone is uniform in [0, 1), so the expectation of a loss stays as it is. Together
    they leave no gaps, so a mean varies less (Kingma et al. 2021, "Variational Diffusion Models").
    """
    order = torch.randperm(size, generator=generator, device=device)
    inside = torch.rand(size, generator=generator, device=device, dtype=torch.float64)
    return (order + inside) / size


def step(loss: Callable[[Any], tuple[Tensor, Tensor]], batch: Any, c: float | Rule,
         optimizer: torch.optim.Optimizer, parts: int = 1) -> dict[str, Tensor]:
    """One optimizer step along g = g_keep − c · g_forget, clipped to `MAX_NORM`.

    loss: batch -> keep, forget, [B] each. batch: a `Batch`, or tensors [B, …] with timesteps.
    c: a number needs one backward pass. A rule needs both gradients, so two backward passes; those
    of SISS go through the same graph. parts: the batch is cut into this many parts, which go
    through the network one after the other: less memory, the same step. Under torchrun each
    process computes its share of the batch.

    Returns the step's figures, scalar tensors; "norm" is that of g before it is clipped. Raises
    FloatingPointError, before the parameters change, when a loss or a gradient is not finite.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    size = len(batch.timesteps)
    by_rule = callable(c)
    means = torch.zeros(2, device=batch.timesteps.device)  # of keep and of forget
    g_keep: Gradient = []
    g_forget: Gradient = []

    for part in parts_of(share_of_rank(batch), parts):
        keep, forget = loss(part)
        keep, forget = keep.sum() / size, forget.sum() / size
        if by_rule:
            add_gradient(keep, parameters, g_keep, retain_graph=True)
            add_gradient(forget, parameters, g_forget)
        else:
            add_gradient(keep - c * forget, parameters, g_keep)  # g itself
        means += torch.stack([keep.detach(), forget.detach()])
        del keep, forget  # and the graph, before the next part makes its own
    sum_over_ranks([means, *g_keep, *g_forget])

    figures = {"loss_keep": means[0], "loss_forget": means[1]}
    if by_rule:
        c = c(g_keep, g_forget)
        figures |= {"norm_keep": norm(g_keep), "norm_forget": norm(g_forget)}
        for keep, forget in zip(g_keep, g_forget, strict=True):
            keep -= c * forget  # in place, to save memory
    for parameter, g in zip(parameters, g_keep, strict=True):
        parameter.grad = g
    figures["c"] = torch.as_tensor(c, device=means.device)
    figures["norm"] = torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
    finite = torch.stack(list(figures.values())).isfinite().tolist()
    if not all(finite):
        name = list(figures)[finite.index(False)]
        raise FloatingPointError(f"{name} is {figures[name].item()}")
    optimizer.step()
    optimizer.zero_grad()
    return figures


def ratio_of_norms(g_keep: Gradient, g_forget: Gradient, grad_ratio: float) -> Tensor:
    """c = ρ ‖g_keep‖ / ‖g_forget‖ (the paper, section 5), so that ‖c · g_forget‖ = ρ ‖g_keep‖."""
    return grad_ratio * norm(g_keep) / norm(g_forget).clamp(min=1e-30)


def erasediff_rule(g_keep: Gradient, g_forget: Gradient, eta: float = 0.1) -> Tensor:
    """c = −max(η − ⟨g_keep, g_forget⟩ / ‖g_forget‖², 0) (Wu et al. 2024): both terms go down."""
    agreement = dot(g_keep, g_forget) / norm(g_forget).square().clamp(min=1e-30)
    return -(eta - agreement).clamp(min=0)


def c_of_superfactor(progress: float, superfactor: float, subtract_until: float,
                     draw_x: str) -> float:
    """c for a given s: c = 1 + s with x ~ X, and c = s with x ~ X∖A (see `losses.siss`).

    s falls linearly to 0 and stays there: subtract first, repair after. progress: the share of the
    steps that is done. subtract_until: the progress at which s is 0.
    """
    s = superfactor * max(0.0, 1 - progress / subtract_until)
    return 1 + s if draw_x == "all" else s


@dataclass(frozen=True)
class Method:
    """A row of the table of methods."""

    loss: Callable[..., tuple[Tensor, Tensor]]  # (model, batch, schedule, …) -> keep, forget
    c: float | Callable[..., Tensor | float]  # a number, a function of the progress, or a rule
    loss_takes: tuple[str, ...] = ()  # names of the loss's other arguments
    c_takes: tuple[str, ...] = ()  # names of c's other arguments

    def loss_of(self, model: Model, schedule: NoiseSchedule,
                settings: dict[str, Any]) -> Callable[[Batch], tuple[Tensor, Tensor]]:
        """The loss as a function of the batch alone."""
        further = {name: settings[name] for name in self.loss_takes}
        return partial(self.loss, model, schedule=schedule, **further)

    def c_of(self, settings: dict[str, Any], progress: float = 0.0) -> float | Rule:
        """c for `step`: a number, or a rule, which takes the gradients alone."""
        if not callable(self.c):
            return self.c
        settings = settings | {"progress": progress}
        further = {name: settings[name] for name in self.c_takes}
        if "progress" in further:
            return self.c(**further)
        return partial(self.c, **further)


S = ("progress", "superfactor", "subtract_until", "draw_x")
# A loss of your own is one function in the form of those in losses.py, and one row here.
METHODS = {
    "siss": Method(losses.siss, c_of_superfactor, ("lam",), S),
    "siss_by_norms": Method(losses.siss, ratio_of_norms, ("lam",), ("grad_ratio",)),
    "siss_no_is": Method(losses.siss_no_is, c_of_superfactor, (), S),
    "naive_deletion": Method(losses.naive_deletion, c=0.0),
    "neggrad": Method(losses.neggrad, c=1.0),
    "erasediff": Method(losses.erasediff, erasediff_rule),
    "retrack": Method(beyond.retrack, -1.0, ("nearest",)),
    "old_targets": Method(beyond.old_targets, -1.0, ("lam", "old")),
}


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """average ← decay · average + (1 − decay) · model, for every parameter. The decay is smaller in
    the first steps: else a short run would end near the old weights."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def learning_rate(step: int, steps: int, peak: float, warmup: int = 0, end: float = 0.0) -> float:
    """A linear warm-up, and a cosine from the peak at step 0 to `end` times the peak at `steps`."""
    rising = min(1.0, (step + 1) / warmup) if warmup else 1.0
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return peak * rising * (end + (1 - end) * cosine)


def parts_of(batch: Any, count: int) -> list[Any]:
    """Cut the tensors of a batch, [B, …], into at most `count` batches. Other fields are copied."""
    size = len(batch.timesteps)
    parts = []
    for places in torch.arange(size).tensor_split(min(count, size)):
        place = slice(places[0], places[-1] + 1)
        cut = {name: x[place] for name, x in vars(batch).items() if isinstance(x, Tensor)}
        parts.append(type(batch)(**vars(batch) | cut))
    return parts


def share_of_rank(batch: Any) -> Any:
    """The part of a batch that this process computes under torchrun; alone, all of it."""
    if not dist.is_initialized():
        return batch
    return parts_of(batch, dist.get_world_size())[dist.get_rank()]


def sum_over_ranks(tensors: list[Tensor]) -> None:
    """Replace tensors by their sums over the processes of torchrun; alone, they stay."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


def add_gradient(loss: Tensor, parameters: list[Tensor], total: Gradient,
                 retain_graph: bool = False) -> None:
    """total ← total + ∂loss/∂parameters. An empty total is 0, and so is a constant's gradient."""
    g = [torch.zeros_like(p) for p in parameters]
    if loss.requires_grad:
        g = torch.autograd.grad(loss, parameters, retain_graph=retain_graph, materialize_grads=True)
    if total:
        torch._foreach_add_(total, g)
    else:
        # Copies, because they will change, and autograd may give two parameters the same tensor.
        total.extend(x.clone(memory_format=torch.contiguous_format) for x in g)


def dot(g: Gradient, h: Gradient) -> Tensor:
    """⟨g, h⟩"""
    return torch.stack([(a * b).sum() for a, b in zip(g, h, strict=True)]).sum()


def norm(g: Gradient) -> Tensor:
    """‖g‖"""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(g)))
