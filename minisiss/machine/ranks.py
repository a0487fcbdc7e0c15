"""One run on several devices: `torchrun --nproc-per-node N train_ddpm.py …`, and so unlearn.py and eval.py.

Every rank, one of the N processes, runs the whole script and makes the same random draws; of a batch it
computes its share, and gradients are added up over the ranks before anything is done with them. So N ranks do
what one does, to rounding, and what one of them decides, all decide. Rank 0 alone speaks and writes files.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from threading import Event
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from minisiss.errors import UserError, of_torchrun, rank
from minisiss.losses import Difference, Term
from minisiss.unlearning import Gradient

T = TypeVar("T")

# How long a rank waits for the others: longer than rank 0 takes for a download. A rank that fails needs no
# waiting for: torchrun ends the others.
PATIENCE = timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """The ranks of a run. Of one rank alone every method is the identity, and no process group exists."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (it cannot change)

    def share(self, batch: Tensor) -> Tensor:
        """This rank's part of a batch [B, …]: they follow one another, and lengths differ by at most one."""
        return batch.tensor_split(self.size)[self.rank]

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model, with a backward pass that leaves the mean over the ranks of their gradients."""
        return model if self.size == 1 else DistributedDataParallel(model)

    def sum_(self, tensors: list[Tensor]) -> None:
        """Replace tensors of one dtype by their sums over the ranks, in one message."""
        if self.size > 1:
            flat = torch.cat([tensor.flatten() for tensor in tensors])
            dist.all_reduce(flat)
            sums = flat.split([tensor.numel() for tensor in tensors])
            for tensor, total in zip(tensors, sums, strict=True):
                tensor.copy_(total.view_as(tensor))

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the ranks, detached."""
        mean = value.detach() / self.size
        self.sum_([mean])
        return mean

    def max(self, value: int) -> int:
        """The largest of the ranks' numbers."""
        if self.size == 1:
            return value
        largest = torch.tensor(int(value), device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.item()

    def gather(self, tensor: Tensor) -> Tensor:
        """The ranks' tensors, all of one shape, one after the other along the first dimension."""
        if self.size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor)
        return torch.cat(parts)

    def on_rank_0(self, function: Callable[[], T]) -> T:
        """Call a function that writes on rank 0 alone. All ranks get what it returns, or its error."""
        if self.size == 1:
            return function()
        outcome = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = function()
            except UserError as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, device=self.device)
        if outcome[1]:
            raise outcome[1]
        return outcome[0]

    def rank_0_first(self, function: Callable[[], T]) -> T:
        """Call a function, one that downloads, on rank 0, and when that is done on the others."""
        result = []
        self.on_rank_0(lambda: result.append(function()))
        return result[0] if self.rank == 0 else function()


ALONE = World()


def start(device: torch.device, batch_size: int = 0) -> World:
    """Join the other ranks, by NCCL on GPUs and gloo on CPUs; `ALONE` without torchrun.

    Raises UserError when the ranks cannot share a batch of this size.
    """
    size = of_torchrun("WORLD_SIZE", 1)
    if size == 1:
        return ALONE
    if batch_size % size:
        raise UserError(f"--batch-size {batch_size}: should be divisible by {size}, the ranks that share it")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    return World(rank(), size, device)


def gradient_in_parts(term: Term | Difference, parameters: list[Tensor], *, micro_batch: int | None = None,
                      world: World = ALONE) -> tuple[Tensor, Gradient]:
    """`unlearning.gradient` by parts of a batch: the same to rounding.

    The images that count are shared out to the ranks. Each sends at most `micro_batch` at a time through the
    network, and frees each pass before the next; then all add up.
    """
    counts = term.counts
    images = world.share(counts.nonzero()[:, 0])
    value = torch.zeros((), device=images.device)
    for parameter in parameters:
        parameter.grad = None
    for part in images.split(micro_batch or max(1, len(images))):
        if len(part):
            loss = term.per_image(part).sum() / len(counts)
            loss.backward()  # adds up in the parameters' grad, without a second copy of the gradient
            value += loss.detach()
    total = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    world.sum_([value, *total])
    return value, total


def leave() -> None:
    """Part from the other ranks at the end of a run that went well. After a failure nobody may answer."""
    if dist.is_available() and dist.is_initialized():
        # Python's lock for gloo's threads, to drop the last message: torch 2.4 joins them while it holds it.
        Event().wait(0.1)
        dist.destroy_process_group()
