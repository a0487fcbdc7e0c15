"""Two clusters of pictures, by k-means (Lloyd 1982)."""

from torch import Tensor

ROUNDS = 100  # at most; a few are enough for a hundred pictures


def cluster_around(images: Tensor, picture: Tensor) -> Tensor:
    """Which images are in the nearer one of two clusters of their L2 distances from a picture: [N] bool.

    images: [N, …]; picture: […], on the same scale. All False where all are equally far. (Two clusters of the
    pixels themselves put many digits of the same kind beside the copies: they are too much alike.)
    """
    distances = (images.double() - picture.double()).flatten(1).norm(dim=1)
    inside = distances < distances.max() / 2
    for _ in range(ROUNDS if inside.any() else 0):
        middle = (distances[inside].mean() + distances[~inside].mean()) / 2
        before, inside = inside, distances < middle
        if before.equal(inside):
            break
    return inside
