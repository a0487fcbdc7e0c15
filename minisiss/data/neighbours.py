"""The kept pictures that are nearest to each forgotten one, for ReTrack."""

from collections.abc import Callable

import torch
from torch import Tensor

from minisiss.data.training_set import TrainingSet, to_float


def nearest_kept(data: TrainingSet, count: int) -> Callable[[Tensor], Tensor]:
    """A function from pictures a of A, [B, C, H, W], to the `count` nearest of X∖A by the distance of their
    pixels: [B, count, C, H, W] in [−1, 1], or [1, count, C, H, W] where all a have the same. 0: all of X∖A.

    X∖A is read once, 256 pictures at a time; what is returned stays in memory.
    """
    if not 0 < count < len(data.keep):
        everything = to_float(data.keep[torch.arange(len(data.keep))])[None]
        return lambda a: everything
    forgotten = to_float(data.forget[torch.arange(data.k)]).unique(dim=0)
    distances = [torch.cdist(forgotten.flatten(1), to_float(data.keep[part]).flatten(1))
                 for part in torch.arange(len(data.keep)).split(256)]
    indices = torch.cat(distances, dim=1).topk(count, largest=False).indices  # [forgotten, count]
    points = torch.stack([to_float(data.keep[row.cpu()]) for row in indices])
    if len(points) == 1:
        return lambda a: points
    return lambda a: points[torch.cdist(a.flatten(1), forgotten.flatten(1)).argmin(dim=1)]
