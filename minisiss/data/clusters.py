"""Two clusters of pictures, by k-means (Lloyd 1982) on their pixels."""

import torch
from torch import Tensor

ROUNDS = 100  # at most; a few are enough for a hundred pictures


def tight_cluster(images: Tensor) -> Tensor:
    """Which images are in the tight one of two clusters, that of a picture and its copies: [N] bool.

    images: [N, …] of any type. Nothing is random: the clusters start from the image that has a fifth of all
    others nearest around it, and all within half the distance of the farthest image from there. (From two
    images that are far apart, k-means can end with a few alike on one side, and the copies among the others.)
    All False where all images are the same.
    """
    points = images.flatten(1).double()
    distances = torch.cdist(points, points)
    densest = distances.kthvalue(1 + len(points) // 5).values.argmin()
    inside = distances[densest] < distances[densest].max() / 2
    for _ in range(ROUNDS if inside.any() else 0):
        centres = torch.stack([points[inside].mean(dim=0), points[~inside].mean(dim=0)])
        before, inside = inside, torch.cdist(points, centres).argmin(dim=1) == 0
        if before.equal(inside):
            break
    return inside
