"""Samples in batches, from the same noise for every model."""

import torch

from minisiss.metrics.samples import draw_samples
from minisiss.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule.linear(10, 1e-3, 0.2)


def model(x, timesteps):
    return 0.5 * x


def draw(count: int = 10) -> torch.Tensor:
    return draw_samples(model, SCHEDULE, count, (1, 4, 4), seed=3, batch_size=4, steps=3, eta=1.0)


def test_batches_add_up_and_repeat():
    first, second = draw(), draw()
    assert first.shape == (10, 1, 4, 4) and first.dtype == torch.uint8
    assert torch.equal(first, second) and torch.equal(first[:8], draw(8))
    assert not torch.equal(first[:4], first[4:8])


def test_no_samples_are_no_samples():
    assert draw(0).shape == (0, 1, 4, 4)
