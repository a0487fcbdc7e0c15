import pytest
import torch

from minisiss.data.neighbours import nearest_kept
from minisiss.data.training_set import TrainingSet, to_float


def pictures(n, seed=0):
    return torch.randint(0, 256, (n, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def by_hand(data, a, count):
    """The `count` nearest kept pictures of one a, by sorting all distances."""
    kept = to_float(data.keep)
    return kept[[i for _, i in sorted((((x - a) ** 2).sum().item(), i) for i, x in enumerate(kept))][:count]]


def test_each_picture_to_forget_gets_the_kept_pictures_that_are_nearest_to_it():
    data = TrainingSet(pictures(600), 3)  # read in three parts
    near, a = nearest_kept(data, 10), to_float(data.forget)[[2, 0, 1, 0]]
    found = near(a)
    assert found.shape == (4, 10, 1, 4, 4)
    for one, points in zip(a, found, strict=True):
        assert torch.equal(points, by_hand(data, one, 10))


def test_copies_of_one_picture_share_their_neighbours():
    images = pictures(41)
    data = TrainingSet(torch.cat([images, images[-1:].expand(5, -1, -1, -1)]), 6)
    a = to_float(data.forget)[:4]
    assert torch.equal(nearest_kept(data, 7)(a), by_hand(data, a[0], 7)[None])


@pytest.mark.parametrize("count", [0, 9, 100])
def test_all_of_the_kept_set_is_the_same_for_each(count):
    data = TrainingSet(pictures(11), 2)
    assert torch.equal(nearest_kept(data, count)(to_float(data.forget)), to_float(data.keep)[None])
