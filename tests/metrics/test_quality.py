import math

import pytest
import torch

from minisiss.metrics.quality import energy_distance, frechet_distance, inception_score, moments


def test_inception_score_of_two_unsure_predictions_by_hand():
    p = torch.tensor([[0.9, 0.1], [0.1, 0.9]])
    mean, std = inception_score(p, splits=1)
    assert mean == pytest.approx(math.exp(0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)), rel=1e-6)
    assert std == 0


def test_inception_score_has_its_ends_at_1_and_the_number_of_classes():
    sure = torch.eye(10).repeat(20, 1)
    assert inception_score(sure) == pytest.approx((10, 0))
    assert inception_score(sure[:, :1].expand(-1, 10) * 0 + 0.1) == pytest.approx((1, 0))
    assert inception_score(sure[:1].expand(50, -1)) == pytest.approx((1, 0))  # sure, but always of the same class


def test_inception_score_splits_consecutive_rows_and_takes_the_population_deviation():
    p = torch.cat([torch.full((4, 2), 0.5), torch.eye(2), torch.eye(2)])  # a split that scores 1, a split that scores 2
    assert inception_score(p, splits=2) == pytest.approx((1.5, 0.5))
    assert inception_score(p[:, [1, 0]], splits=2) == pytest.approx((1.5, 0.5))
    assert inception_score(p[[0, 4, 1, 5, 2, 6, 3, 7]], splits=2) == pytest.approx((2**0.5, 0))  # half the rows unsure


def test_inception_score_uses_every_row_where_the_splits_cannot_be_equal():
    p = torch.cat([torch.eye(2), torch.full((2, 2), 0.5)])  # splits of 2 rows, 1 and 1
    assert inception_score(p, splits=3)[0] == pytest.approx((2 + 1 + 1) / 3)


@pytest.mark.parametrize(("n", "splits"), [(9, 10), (0, 1), (5, 0)])
def test_inception_score_needs_a_row_a_split(n, splits):
    with pytest.raises(ValueError, match=f"got {n}"):
        inception_score(torch.full((n, 10), 0.1), splits)


def features(mean: torch.Tensor, root: torch.Tensor, n: int = 200, seed: int = 0) -> torch.Tensor:
    """Features with exactly the given mean and the covariance root · rootᵀ."""
    z = torch.randn(n, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    z = z - z.mean(dim=0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(z.T)), z.T, upper=False).T
    return white @ root.T + mean


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_frechet_distance_of_gaussians_with_diagonal_covariances():
    mean_a, mean_b = torch.tensor([1.0, -2, 0, 3]).double(), torch.tensor([0.0, 1, 0, 3]).double()
    std_a, std_b = torch.tensor([1.0, 2, 0.5, 0]).double(), torch.tensor([3.0, 2, 0.1, 1]).double()
    expected = (mean_a - mean_b).square().sum() + (std_a - std_b).square().sum()  # 10 + 4 + 0.16 + 1
    a, b = features(mean_a, std_a.diag(), seed=1), features(mean_b, std_b.diag(), n=90, seed=2)
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(expected.item(), abs=1e-6)


def test_frechet_distance_of_covariances_that_do_not_commute():
    a, b = features(random(6, seed=1), random(6, 6, seed=2)), features(random(6, seed=3), random(6, 6, seed=4))
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    assert (cov_a @ cov_b - cov_b @ cov_a).abs().max() > 0.1
    trace_root = torch.linalg.eigvals(cov_a @ cov_b).sqrt().sum().real  # of the product itself, which is not symmetric
    expected = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * trace_root
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_distance_is_a_distance_that_rotations_and_shifts_leave_alone():
    a, b = random(40, 5, seed=1), random(30, 5, seed=2) * 2 + 1
    rotation = torch.linalg.qr(random(5, 5, seed=3)).Q
    distance = frechet_distance(moments(a), moments(b))
    assert distance > 1
    assert frechet_distance(moments(b), moments(a)) == pytest.approx(distance, rel=1e-9)
    assert frechet_distance(moments(a @ rotation + 7), moments(b @ rotation + 7)) == pytest.approx(distance, rel=1e-9)
    assert frechet_distance(moments(3 * a), moments(3 * b)) == pytest.approx(9 * distance, rel=1e-9)
    assert frechet_distance(moments(a), moments(a.flip(0))) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_fewer_images_than_features_in_float32():
    a, b = random(8, 20, seed=1).float(), random(9, 20, seed=2).float()
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(frechet_distance(moments(b), moments(a)), rel=1e-6)
    assert frechet_distance(moments(a), moments(a)) == pytest.approx(0, abs=1e-6)


def test_moments_are_the_mean_and_the_unbiased_covariance_in_float64():
    mean, cov = moments(torch.tensor([[0.0, 1], [2, 1], [4, 4]]))
    assert mean.tolist() == [2, 2] and cov.tolist() == [[4, 3], [3, 3]] and cov.dtype == torch.float64


@pytest.mark.parametrize("shape", [(1, 3), (0, 3), (5,), (5, 3, 1)])
def test_moments_refuse_what_has_no_covariance(shape):
    with pytest.raises(ValueError, match="N ≥ 2"):
        moments(torch.zeros(shape))


def test_frechet_distance_refuses_other_features():
    with pytest.raises(ValueError, match="3 and 4"):
        frechet_distance(moments(torch.zeros(5, 3)), moments(torch.zeros(5, 4)))


def test_energy_distance_by_hand():
    a, b = torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [5.0]])
    assert energy_distance(a, b) == pytest.approx(2 * (2 + 5 + 1 + 4) / 4 - 1 - 3)


def test_energy_distance_is_0_in_the_mean_for_sets_of_one_origin_and_not_for_others():
    rng = torch.Generator().manual_seed(0)
    found = torch.tensor([energy_distance(*torch.randn(2, 20, 2, generator=rng)) for _ in range(400)])
    assert abs(found.mean()) < 4 * found.std() / 20  # with a bias of 1/20 of the mean distance it would be 0.18
    moved = torch.randn(500, 2, generator=rng), torch.randn(500, 2, generator=rng) + 1
    assert energy_distance(*moved) > 0.2


def test_energy_distance_refuses_single_points():
    with pytest.raises(ValueError, match="two points"):
        energy_distance(torch.zeros(1, 2), torch.zeros(3, 2))
