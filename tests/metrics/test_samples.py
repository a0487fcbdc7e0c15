"""Samples in batches, from the same noise for every model."""

import torch

from minisiss.data.training_set import to_uint8
from minisiss.metrics.samples import draw_again, draw_samples
from minisiss.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule.linear(10, 1e-3, 0.2)


def model(x, timesteps):
    return 0.5 * x


def draw(count: int = 10, start: int = 0) -> torch.Tensor:
    return draw_samples(model, SCHEDULE, count, (1, 4, 4), seed=3, batch_size=4, start=start, steps=3, eta=1.0)


def test_batches_add_up_and_repeat():
    first, second = draw(), draw()
    assert first.shape == (10, 1, 4, 4) and first.dtype == torch.uint8
    assert torch.equal(first, second) and torch.equal(first[:8], draw(8))
    assert not torch.equal(first[:4], first[4:8])
    assert torch.equal(first[4:], draw(10, start=4)) and len(draw(8, start=8)) == 0


def test_no_samples_are_no_samples():
    assert draw(0).shape == (0, 1, 4, 4)


def test_samples_at_any_places_can_be_drawn_again():
    how = dict(seed=3, batch_size=64, steps=3)
    samples = draw_samples(model, SCHEDULE, 150, (1, 4, 4), eta=0.0, **how)
    places = [149, 3, 64, 130]  # the last batch is a smaller one
    again = draw_again(model, SCHEDULE, places, 150, (1, 4, 4), **how)
    assert (to_uint8(again).int() - samples[places].int()).abs().max() <= 1


def test_no_samples_drawn_again_need_no_network():
    # Attention on a GPU returns nothing for an empty batch.
    assert draw_again(None, SCHEDULE, [], 150, (1, 4, 4), seed=3, steps=3).shape == (0, 1, 4, 4)


def test_eta_0_samples_by_the_sampler_of_order_2(monkeypatch):
    orders = []
    monkeypatch.setattr("minisiss.sampling.sample", lambda *_, order, **__: orders.append(order) or torch.zeros(2, 1, 4, 4))
    for eta in (0.0, 0.5, 1.0):
        draw_samples(model, SCHEDULE, 2, (1, 4, 4), seed=3, steps=3, eta=eta)
    assert orders == [2, 1, 1]
