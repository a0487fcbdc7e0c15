import math

import pytest
import torch

from minisiss.schedule import NoiseSchedule


def test_values_match_the_closed_forms():
    schedule = NoiseSchedule.linear(1000, 1e-4, 0.02)
    product = 1.0
    for t in range(1000):
        beta = 1e-4 + (0.02 - 1e-4) * t / 999
        product *= 1 - beta
        assert schedule.betas[t].item() == pytest.approx(beta, rel=1e-6)
        assert schedule.alphas_cumprod[t].item() == pytest.approx(product, rel=1e-6)
        assert schedule.gamma[t].item() == pytest.approx(math.sqrt(product), rel=1e-6)
        # √(1 − ᾱ) computed in float32 would be off by 1e-4 at t = 0.
        assert schedule.sigma[t].item() == pytest.approx(math.sqrt(1 - product), rel=1e-6)


def test_values_are_float32_of_shape_t():
    schedule = NoiseSchedule.linear(10)
    assert len(schedule) == 10
    assert all(value.dtype == torch.float32 and value.shape == (10,) for value in vars(schedule).values())


def test_add_noise_scales_image_and_noise_by_each_images_own_timestep():
    schedule = NoiseSchedule.linear()
    x, noise = torch.randn(2, 3, 1, 4, 4)
    timesteps = torch.tensor([0, 500, 999])
    noisy = schedule.add_noise(x, noise, timesteps)
    for i, t in enumerate(timesteps):
        assert torch.equal(noisy[i], schedule.gamma[t] * x[i] + schedule.sigma[t] * noise[i])


def test_the_last_timestep_is_nearly_pure_noise():
    assert NoiseSchedule.linear().gamma[-1] < 0.01


@pytest.mark.parametrize("arguments", [(0,), (10, 0.0, 0.1), (10, 0.2, 0.1), (10, 0.1, 1.0)])
def test_impossible_schedules_are_refused(arguments):
    with pytest.raises(ValueError, match="timesteps"):
        NoiseSchedule.linear(*arguments)


@pytest.mark.parametrize("shape", [(2,), (1, 2), (1, 2, 1, 1)])
def test_images_may_have_any_number_of_dimensions(shape):
    schedule = NoiseSchedule.linear()
    x, noise, timesteps = torch.randn(4, 2), torch.randn(4, 2), torch.tensor([0, 10, 500, 999])
    noisy = schedule.add_noise(x.view(4, *shape), noise.view(4, *shape), timesteps)
    assert noisy.shape == (4, *shape)
    assert torch.equal(noisy.view(4, 2), schedule.add_noise(x[..., None, None], noise[..., None, None], timesteps)[..., 0, 0])
