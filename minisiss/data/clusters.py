"""Two clusters of pictures, by k-means (Lloyd 1982) on their pixels."""

import torch
from torch import Tensor

ROUNDS = 100  # at most; a few are enough for a hundred pictures


def cluster_around(images: Tensor, picture: Tensor) -> Tensor:
    """Which images are in the one of two clusters that starts at a picture: [N] bool.

    images: [N, …]; picture: […], on the same scale. Nothing is random: one cluster starts as the images in
    half the distance of the farthest one, the other as the rest. All False where all are equally far.
    """
    points = images.flatten(1).double()
    distances = (points - picture.flatten().double()).norm(dim=1)
    inside = distances < distances.max() / 2
    for _ in range(ROUNDS if inside.any() else 0):
        centres = torch.stack([points[inside].mean(dim=0), points[~inside].mean(dim=0)])
        before, inside = inside, torch.cdist(points, centres).argmin(dim=1) == 0
        if before.equal(inside):
            break
    return inside
