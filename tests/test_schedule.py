import math

import pytest
import torch

from minisiss.schedule import NoiseSchedule


def test_schedule_matches_closed_forms():
    schedule = NoiseSchedule.linear(1000, 1e-4, 0.02)
    product = 1.0
    for t in range(1000):
        beta = 1e-4 + (0.02 - 1e-4) * t / 999
        product *= 1 - beta
        # Computed in float32, σ = √(1 − ᾱ) would be off by 1e-4 at t = 0.
        expected = [beta, product, math.sqrt(product), math.sqrt(1 - product)]
        ours = [values[t].item() for values in vars(schedule).values()]
        assert ours == pytest.approx(expected, rel=1e-6)
    assert len(schedule) == 1000
    assert all(values.dtype == torch.float32 for values in vars(schedule).values())


@pytest.mark.parametrize("shape", [(2,), (1, 2), (3, 1, 4, 4)])
def test_noise_is_added_by_each_images_timestep(shape):
    schedule = NoiseSchedule.linear()
    x, noise = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([0, 500, 999])
    m = schedule.add_noise(x, noise, timesteps)
    for i, t in enumerate(timesteps):
        assert torch.equal(m[i], schedule.gamma[t] * x[i] + schedule.sigma[t] * noise[i])
    back = schedule.noise_between(x, m, timesteps)  # the other function inverts the first
    torch.testing.assert_close(back, noise, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("betas", [[], [0.0, 0.1], [0.1, 1.0], [0.1, math.nan], [0.999] * 20])
def test_impossible_schedules_are_refused(betas):
    with pytest.raises(ValueError, match="betas"):
        NoiseSchedule.from_betas(torch.tensor(betas))
