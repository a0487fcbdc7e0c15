"""What is measured: copies, memory, samples, their quality, and the networks that judge them."""

import math

import pytest
import torch

from minisiss.lab import metrics
from minisiss.lab.cli import UserError
from minisiss.lab.data import read_sheet, to_float
from minisiss.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule.linear()


@pytest.fixture(scope="module")
def tshirt():
    return to_float(read_sheet("tshirt.png"))


@pytest.fixture(scope="module")
def digits():
    """A hundred test digits of each class, class by class."""
    return to_float(read_sheet("test-digits.png"))


def knows(image):
    """The ideal denoiser of one image: whatever is noisy is that image and noise."""
    return lambda m, timesteps: SCHEDULE.noise_between(image.expand_as(m), m, timesteps)


def normal(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def test_a_copy_is_nearer_than_10(tshirt, digits):
    black = -torch.ones(1, 1, 28, 28)  # as a pixel from 0 to 1 it is 0
    far, near = black.clone(), black.clone()
    far[:, :, :10, :10] = 1  # 100 white pixels: a distance of 10
    near[:, :, :10, :10] = 0.99
    assert metrics.is_copy(torch.cat([black, near, far]), black).tolist() == [True, True, False]
    assert not metrics.is_copy(digits, tshirt).any()
    assert metrics.is_copy(tshirt + 0.3 * normal(1, 1, 28, 28, seed=0), tshirt).all()


def test_similarity_and_psnr_by_hand():
    images = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [0.0, 0.0]]).view(3, 1, 1, 2)
    original = images[:1]  # the pixels 1 and 0
    assert metrics.similarity(images, original).tolist() == pytest.approx([1, 0, 0.5**0.5])
    expected = [100, 0, 20 * math.log10(2)]  # 100 stands for ∞
    assert metrics.psnr(images, original).tolist() == pytest.approx(expected)


def test_a_model_brings_back_what_it_knows(tshirt, digits):
    draws = tshirt.expand(3, -1, -1, -1)
    back = metrics.noise_and_denoise(knows(tshirt), SCHEDULE, draws, 500, seed=0, steps=5)
    assert torch.allclose(back, draws, atol=1e-3)
    back = metrics.noise_and_denoise(knows(digits[0]), SCHEDULE, draws, 500, seed=0, steps=5)
    assert metrics.similarity(back, tshirt).max() < 0.8


def test_memory_noise_depends_on_seed_and_timestep(tshirt):
    noise = []

    def model(m, timesteps):
        noise.append(SCHEDULE.noise_between(tshirt, m, timesteps))
        return torch.zeros_like(m)

    for seed, timestep in ((0, 500), (0, 500), (1, 500), (0, 400)):
        metrics.noise_and_denoise(model, SCHEDULE, tshirt, timestep, seed, steps=1)
    first, again, other_seed, other_timestep = noise
    assert first.std().item() == pytest.approx(1, abs=0.1) and torch.equal(first, again)
    for other in (other_seed, other_timestep):
        assert (first * other).mean().abs() < 0.2


def test_samples_at_any_places_are_drawn_again():
    first_noise = []

    def model(x, timesteps):
        if timesteps[0] == len(SCHEDULE) - 1:
            first_noise.append(x)
        return 0.5 * x

    def draw(places, seed=3):
        return metrics.draw_samples(model, SCHEDULE, places, (1, 4, 4), seed, steps=3)

    samples = draw(list(range(150)))
    assert samples.shape == (150, 1, 4, 4) and [len(x) for x in first_noise] == [64, 64, 22]
    assert len(torch.cat(first_noise).flatten(1).unique(dim=0)) == 150  # noise of its own for each
    places = [149, 3, 64, 130]
    assert torch.equal(draw(places), samples[places])
    assert not torch.equal(draw(places, seed=4), samples[places])
    assert draw([]).shape == (0, 1, 4, 4)
    levels = (samples + 1) * 127.5
    assert torch.allclose(levels, levels.round(), atol=1e-4) and samples.abs().max() <= 1


@pytest.mark.parametrize(
    "successes, trials, low, high",
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilsons_interval_has_its_published_values(successes, trials, low, high):
    """Newcombe 1998, table I, method 3."""
    assert metrics.wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_the_inception_score_lies_between_1_and_10():
    sure = torch.eye(10).repeat(20, 1)
    assert metrics.inception_score(sure) == pytest.approx(10)
    assert metrics.inception_score(torch.full((50, 10), 0.1)) == pytest.approx(1)
    assert metrics.inception_score(sure[:1].expand(50, -1)) == pytest.approx(1)  # always the same
    p = torch.tensor([[0.9, 0.1], [0.1, 0.9]])
    by_hand = math.exp(0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5))
    assert metrics.inception_score(p, splits=1) == pytest.approx(by_hand, rel=1e-6)


def test_the_frechet_distance_of_diagonal_gaussians():
    means = torch.tensor([[1.0, -2, 0, 3], [0, 1, 0, 3]]).double()
    stds = torch.tensor([[1.0, 2, 0.5, 0], [3, 2, 0.1, 1]]).double()
    a, b = ((mean, std.square().diag()) for mean, std in zip(means, stds, strict=True))
    # ‖μ_a − μ_b‖² + ‖σ_a − σ_b‖²
    assert metrics.frechet_distance(a, b) == pytest.approx(10 + 4 + 0.16 + 1, abs=1e-6)


def test_the_frechet_distance_of_any_gaussians():
    a, b = (metrics.moments(normal(20, 6, seed=i) @ normal(6, 6, seed=i + 1)) for i in (1, 3))
    # The covariances do not commute, so their product is not symmetric.
    trace_of_root = torch.linalg.eigvals(a[1] @ b[1]).sqrt().sum().real
    expected = (a[0] - b[0]).square().sum() + a[1].trace() + b[1].trace() - 2 * trace_of_root
    assert metrics.frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-9)
    assert metrics.frechet_distance(b, a) == pytest.approx(expected.item(), rel=1e-9)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_the_classifier_is_right_on_99_percent(digits):
    features, probabilities = metrics.classify(digits)
    labels = torch.arange(10).repeat_interleave(100)
    assert (probabilities.argmax(dim=1) == labels).float().mean() >= 0.99
    # It comes with the moments of all classes: half of the classes are farther from them.
    real = metrics.load_classifier()[1]
    parts = (features, features[:500])
    all_classes, half = (metrics.frechet_distance(metrics.moments(part), real) for part in parts)
    assert all_classes < 0.1 * half


@pytest.mark.parametrize("content", [None, b"", b"PK junk"])
def test_what_is_no_torchscript_is_refused(content, tmp_path):
    path = tmp_path / "network.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="network.pt: cannot be read"):
        metrics.load_torchscript(path, torch.device("cpu"))


def test_descriptors_see_288_normalised_pixels_in_colour():
    seen = []

    def network(images):
        seen.append(images)
        return images.flatten(1)[:, :7]

    grey = torch.zeros(2, 1, 28, 28)
    assert torch.allclose(metrics.descriptors(network, grey).norm(dim=1), torch.ones(2))
    expected = (0.5 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    assert seen[0].shape == (2, 3, 288, 288) and torch.allclose(seen[0][0, :, 5, 5], expected)
