"""Long runs whose memory must stay flat, a large folder, a large model: minutes each, so only with `pytest -m slow -s`."""

import io
import multiprocessing
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from minisiss import presets, unlearning
from minisiss.data import folder, training_set
from minisiss.machine import device, ranks
from minisiss.schedule import NoiseSchedule
from minisiss.study import bench
from minisiss.unet import UNet, UNetConfig

pytestmark = pytest.mark.slow


def resident(pid: int | str = "self") -> float:
    """The resident size of a process in MB."""
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def sizes(tmp_path, *arguments) -> list[float]:
    """Run a script and note its resident size twice a second."""
    seen = []
    with open(tmp_path / "output", "w") as output:
        process = subprocess.Popen([sys.executable, *map(str, arguments)], cwd=tmp_path, stdout=output, stderr=output)
        while process.poll() is None:
            seen.append(resident(process.pid))
            time.sleep(0.5)
    assert process.returncode == 0, (tmp_path / "output").read_text()[-2000:]
    return seen


@pytest.mark.parametrize("name, arguments", [
    ("unlearning, 2,000 steps", ("unlearn.py", "--steps", 2000, "--batch-size", 8, "--samples", 0, "--draws", 8, "--evaluate-every", 250)),
    ("sampling, 20,000 images", ("eval.py", "--checkpoint", "bundled", "--samples", 20_000, "--sampling-steps", 5)),
])  # fmt: skip
def test_the_resident_size_stays_within_5_percent_after_warm_up(name, arguments, tmp_path):
    seen = sizes(tmp_path, ROOT / arguments[0], *arguments[1:])
    warm = seen[len(seen) // 5 : -4]  # the last two seconds draw pictures and leave
    print(f"\n{name}: {len(seen) / 2:.0f} s, {warm[0]:.0f} MB after a fifth of it, at most {max(warm):.0f} MB from there on")
    assert max(warm) <= 1.05 * warm[0]


def test_a_folder_of_30000_pictures_starts_in_10_seconds_and_streams_with_bounded_memory(tmp_path):
    buffers = []
    for seed in range(50):
        image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize((128, 128))
        image.save(buffer := io.BytesIO(), "JPEG")
        buffers.append(buffer.getvalue())
    for number in range(30_000):
        (tmp_path / f"{number:05}.jpg").write_bytes(buffers[number % 50])

    before, began = resident(), time.monotonic()
    pictures = folder.ImageFolder(str(tmp_path), (3, 128, 128))  # 1.5 GB of pixels
    started, first = time.monotonic() - began, resident()
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        pictures[torch.randint(len(pictures), (64,), generator=generator)]
    grown = resident() - first
    print(f"\nfolder of 30,000: {started:.1f} s and {first - before:.0f} MB to start; {grown:.0f} MB more after 64,000 pictures, of which {folder.CACHE_BYTES / 1e6:.0f} may be kept")
    assert len(pictures) == 30_000 and started < 10
    assert grown < 1.1 * folder.CACHE_BYTES / 1e6


def large_step(checkpoint_activations: bool) -> tuple[int, float, float]:
    """A step of SISS on the faces' network, two images one at a time: parameters, seconds, GB at the peak of this process."""
    cpu = torch.device("cpu")
    model = UNet(UNetConfig(**presets.PRESETS["celebahq"]["unet"]))
    model.checkpoint_activations = checkpoint_activations
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-6, fused=True)
    pictures = training_set.TrainingSet(torch.randint(256, (3, 3, 256, 256), dtype=torch.uint8), 1, "picture")
    siss, schedule = unlearning.METHODS["siss"], NoiseSchedule.linear()
    batch = unlearning.draw_batch(pictures, 2, schedule, torch.Generator().manual_seed(0), "rest")
    began = time.monotonic()
    settings, gradient = unlearning.Settings(), partial(ranks.gradient_in_parts, micro_batch=1)
    terms = siss.terms(device.at_precision(model, cpu, "auto"), batch, schedule, settings)
    unlearning.step(siss, terms, optimizer, settings, gradient_of=gradient)
    return sum(p.numel() for p in model.parameters()), time.monotonic() - began, bench.peak_bytes(cpu) / 1e9


@pytest.mark.parametrize("checkpoint_activations", [False, True])
def test_a_step_of_the_faces_network_fits_in_12_gb(checkpoint_activations):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        parameters, seconds, peak = pool.submit(large_step, checkpoint_activations).result()
    with_or_without = "with" if checkpoint_activations else "without"
    print(f"\n{parameters:,} parameters, {with_or_without} --checkpoint-activations: a step of SISS on 2 images, one at a time: {seconds:.0f} s, {peak:.1f} GB at its peak")
    assert parameters == 113_673_219 and peak < 12
