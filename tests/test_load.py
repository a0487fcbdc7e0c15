"""The paper's network for faces, a minute or more: only with `python -m pytest -m slow`."""

import multiprocessing
import resource
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import pytest
import torch

from minisiss import losses, unlearning
from minisiss.lab.data import TrainingSet
from minisiss.lab.presets import PRESETS
from minisiss.schedule import NoiseSchedule
from minisiss.unet import UNet, UNetConfig


def step_of_the_faces():
    """One step of SISS by norms, two images one at a time: parameters, and GB at the peak."""
    model, schedule = UNet(UNetConfig(**PRESETS["celebahq"]["unet"])), NoiseSchedule.linear()
    pictures = TrainingSet(torch.randint(256, (3, 3, 256, 256), dtype=torch.uint8), 1)
    batch = unlearning.draw_batch(pictures, 2, schedule, torch.Generator().manual_seed(0))
    loss = partial(losses.siss, model, schedule=schedule, lam=0.5)
    rule = partial(unlearning.ratio_of_norms, grad_ratio=0.1)
    unlearning.step(loss, batch, rule, torch.optim.AdamW(model.parameters(), 5e-6, fused=True), parts=2)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return sum(p.numel() for p in model.parameters()), kilobytes / 1e6


@pytest.mark.slow
def test_a_step_on_faces_fits_in_12_gb():
    spawn = multiprocessing.get_context("spawn")  # a process of its own has a peak of its own
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        parameters, peak = pool.submit(step_of_the_faces).result()
    assert parameters == 113_673_219 and 1 < peak < 12
