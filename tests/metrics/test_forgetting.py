import math

import pytest
import torch

from minisiss.data.digits import bundled_digits, bundled_tshirt
from minisiss.data.training_set import TrainingSet, to_float
from minisiss.metrics.forgetting import (
    denoising_loss,
    is_copy,
    look_alike_loss,
    look_alikes,
    noise_and_denoise,
    psnr,
    similarity,
    wilson_interval,
)
from minisiss.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule.linear()


def test_a_copy_is_within_a_distance_of_10_on_pixels_from_0_to_1():
    original = -torch.ones(1, 1, 28, 28)  # black
    image = original.clone()
    image[:, :, :10, :10] = 1  # 100 white pixels: a distance of 10
    nearly = original.clone()
    nearly[:, :, :10, :10] = 0.99
    assert is_copy(torch.cat([original, nearly, image]), original).tolist() == [True, True, False]


def test_no_digit_is_taken_for_the_tshirt_and_a_noisy_tshirt_is():
    tshirt, digits = to_float(bundled_tshirt()), to_float(bundled_digits())
    assert not is_copy(digits, tshirt).any()
    assert is_copy(tshirt + 0.3 * torch.randn(tshirt.shape, generator=torch.Generator().manual_seed(0)), tshirt).all()


def test_similarity_is_a_cosine_of_pixels_from_0_to_1():
    original = torch.tensor([1.0, -1.0]).reshape(1, 1, 1, 2)  # pixels 1, 0
    images = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]).reshape(4, 1, 1, 2)
    assert similarity(images, original).tolist() == pytest.approx([1, 0, 0.5**0.5, 0.5**0.5])


def test_the_signal_to_noise_ratio_is_that_of_pixels_from_0_to_1():
    black, grey, white = (torch.full((2, 3, 8, 8), value) for value in (-1.0, 0.0, 1.0))
    assert psnr(black, white[:1]).tolist() == pytest.approx([0, 0])
    assert psnr(torch.cat([grey[:1], white[:1]]), white).tolist() == pytest.approx([20 * math.log10(2), 100])


def test_a_model_that_knows_one_image_remembers_it_and_one_that_knows_another_does_not():
    tshirt, digit = to_float(bundled_tshirt()), to_float(bundled_digits()[:1])

    def knows(image):
        column = lambda values, t: values[t][:, None, None, None]  # noqa: E731
        return lambda x, t: (x - column(SCHEDULE.gamma, t) * image) / column(SCHEDULE.sigma, t)

    draws = tshirt.expand(3, -1, -1, -1)
    noisy, denoised = noise_and_denoise(knows(tshirt), SCHEDULE, draws, 500, seed=0, steps=5)
    assert denoised.shape == (3, 1, 28, 28) and torch.allclose(similarity(denoised, tshirt), torch.ones(3))
    other_noisy, other = noise_and_denoise(knows(digit), SCHEDULE, draws, 500, seed=0, steps=5)
    assert torch.equal(noisy, other_noisy)  # the same draws for every model
    assert similarity(other, tshirt).max() < 0.8 and not is_copy(other, tshirt).any()


def test_the_denoising_loss_is_zero_on_the_image_that_a_model_knows_and_not_on_others():
    def knows_the_tshirt(x, t):
        gamma, sigma = SCHEDULE.gamma[t][:, None, None, None], SCHEDULE.sigma[t][:, None, None, None]
        return (x - gamma * to_float(bundled_tshirt())) / sigma

    assert denoising_loss(knows_the_tshirt, SCHEDULE, bundled_tshirt(), 20) == pytest.approx([0], abs=1e-6)
    by_timestep = denoising_loss(knows_the_tshirt, SCHEDULE, bundled_digits(), 20, buckets=4)
    assert len(by_timestep) == 4 and by_timestep == sorted(by_timestep, reverse=True) and by_timestep[0] > 1  # γ/σ falls


def test_the_denoising_loss_takes_every_range_of_timesteps_alike_and_the_same_noise_for_every_set():
    seen = []

    def model(x, t):
        seen.extend(t.tolist())
        return torch.zeros_like(x)  # so that the loss is ‖noise‖²

    losses = [denoising_loss(model, SCHEDULE, images, 100, buckets=10) for images in (bundled_digits(), bundled_tshirt())]
    assert seen[:100] == list(range(0, 1000, 10)) and losses[0] == losses[1]
    assert losses[0] == pytest.approx([1] * 10, abs=0.1)
    assert denoising_loss(model, SCHEDULE, bundled_tshirt(), 100)[0] == pytest.approx(sum(losses[0]) / 10)
    assert denoising_loss(model, SCHEDULE, bundled_tshirt(), 100, seed=1) != denoising_loss(model, SCHEDULE, bundled_tshirt(), 100)


@pytest.mark.parametrize(
    # Newcombe 1998, table I, method 3.
    "successes, trials, low, high",
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilsons_interval_has_its_published_values(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_look_alikes_are_the_four_quarter_turns_and_their_mirror_images():
    image = torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8)[None, None]
    found = {tuple(copy.flatten().tolist()) for copy in look_alikes(image)}
    assert found == {(2, 4, 1, 3), (3, 1, 4, 2), (4, 2, 3, 1), (1, 3, 2, 4)}  # to the left, to the right, mirrored both
    assert look_alikes(image.expand(3, -1, -1, -1)).shape == (12, 1, 2, 2)


def test_the_look_alike_loss_is_that_of_the_look_alikes_at_each_timestep():
    # A network that predicts as if every picture were p has the loss γ²/σ² · mean (x − p)² on a picture x.
    p, tshirt = to_float(bundled_digits()[:1]), bundled_tshirt()
    data = TrainingSet(torch.cat([bundled_digits()[:9], tshirt.expand(100, -1, -1, -1)]), 100)

    def model(m, timesteps):
        gamma, sigma = (values[timesteps].reshape(-1, 1, 1, 1) for values in (SCHEDULE.gamma, SCHEDULE.sigma))
        return (m - gamma * p) / sigma

    found = look_alike_loss(model, SCHEDULE, data)
    assert found.shape == (1000,)
    alike = to_float(look_alikes(tshirt))
    expected = (SCHEDULE.gamma / SCHEDULE.sigma).square() * (alike - p).square().mean()
    middle = slice(100, 900)  # elsewhere the loss is no line within a fiftieth of the timesteps
    assert ((found - expected) / expected)[middle].abs().max() < 0.1
