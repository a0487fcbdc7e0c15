"""Two clusters of pictures, by k-means (Lloyd 1982) on their pixels."""

import torch
from torch import Tensor

ROUNDS = 100  # at most; a few are enough for a hundred pictures


def tight_cluster(images: Tensor) -> Tensor:
    """Which images are in the tighter of two clusters, whose members are nearer to their mean: [N] bool.

    images: [N, …] of any type. The first centre is the image farthest from the mean of all, the second the
    one farthest from that: there is nothing random. All False where all images are the same.
    """
    points = images.flatten(1).double()
    first = (points - points.mean(dim=0)).norm(dim=1).argmax()
    second = (points - points[first]).norm(dim=1).argmax()
    centres, inside = torch.stack([points[first], points[second]]), None
    if centres[0].equal(centres[1]):
        return torch.zeros(len(images), dtype=torch.bool, device=images.device)
    for _ in range(ROUNDS):
        before, inside = inside, torch.cdist(points, centres).argmin(dim=1) == 1
        if before is not None and before.equal(inside):
            break
        centres = torch.stack([points[~inside].mean(dim=0), points[inside].mean(dim=0)])
    outer, inner = (points[part] - points[part].mean(dim=0) for part in (~inside, inside))
    return inside if inner.norm(dim=1).mean() < outer.norm(dim=1).mean() else ~inside
