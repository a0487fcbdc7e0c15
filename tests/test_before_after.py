"""What unlearn.py leaves to look at: figures before and after, the sheet, the film, the table."""

import json

import pytest
import torch
from PIL import Image

from minisiss.lab import before_after, checkpoint, data, evaluation, metrics
from minisiss.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule.linear()
QUICK = ("--preset", "mnist-tiny", "--steps", 1, "--precision", "fp32", "--out", "run")


def memory(path, images, timestep):
    """How alike what a model brings back of images is to them."""
    model = checkpoint.load(path).model
    back = metrics.noise_and_denoise(model, SCHEDULE, images, timestep, seed=0)
    return pytest.approx(metrics.similarity(back, images).mean().item(), abs=1e-5)


def test_digits_have_figures_before_and_after(script, tiny_checkpoint, tmp_path):
    words = ("--checkpoint", tiny_checkpoint, "--memory-timesteps", 300, 500, "--samples", 100)
    status, said, _ = script("unlearn", *QUICK, *words)
    assert status == 0 and "| forgetting: T-shirt " in said
    results = json.loads((tmp_path / "run/results.json").read_text())
    tshirt = data.to_float(data.read_sheet("tshirt.png")).expand(2, -1, -1, -1)
    for when, path in (("before", tiny_checkpoint), ("after", tmp_path / "run/model.pt")):
        found = results[when]
        assert found["T-shirts"] == 0 and found["at most (95%)"] == pytest.approx(0.0370, abs=1e-4)
        assert {"Fréchet distance", "inception score"} < found.keys()
        for timestep in (300, 500):
            assert found[f"memory, t = {timestep}"] == memory(path, tshirt, timestep)
        assert f" {found['memory, t = 300']:.3f} |" in said
    assert results["before"] != results["after"]
    with Image.open(tmp_path / "run/before_after.png") as sheet:
        assert sheet.width > 6 * 84 and 6 * 84 < sheet.height < 9 * 84  # images of 84 pixels
    with Image.open(tmp_path / "run/forgetting.gif") as film:
        assert film.n_frames == 3 and film.width >= 6 * 84 and film.height > 3 * 84


def test_a_folder_has_figures_of_forgotten_and_kept(script, tiny_checkpoint, tmp_path):
    (tmp_path / "faces").mkdir()
    stripes = torch.arange(28)[:, None].expand(28, 28)
    images = {f"{width}.png": (stripes // width % 2 * 255).byte() for width in range(1, 8)}
    for name, image in images.items():
        Image.fromarray(image.numpy()).save(tmp_path / "faces" / name)
    names = ["2.png", "3.png", "5.png", "7.png"]  # more than there are draws
    folder = ("--data", "pictures", "--data-root", "faces", "--forget", *names, "--draws", 2)
    status, said, _ = script("unlearn", *QUICK, *folder, "--checkpoint", tiny_checkpoint)
    assert status == 0 and "| forgetting: 2.png, 3.png, 5.png " in said
    found = json.loads((tmp_path / "run/results.json").read_text())["before"]
    assert "T-shirts" not in found and "kept in dB, t = 500" in found
    forget = data.to_float(torch.stack([images[name] for name in names])[:, None]).unique(dim=0)
    kept = torch.stack([image for name, image in images.items() if name not in names])[:, None]
    assert found["memory, t = 500"] == memory(tiny_checkpoint, forget, 500)
    assert found["kept, t = 500"] == memory(tiny_checkpoint, data.to_float(kept), 500)


def test_a_grid_has_rows_of_enlarged_images():
    white, grey = (torch.full((2, 1, 28, 28), value) for value in (1.0, 0.0))
    page = before_after.grid(torch.cat([white, grey]), columns=3)
    step, gap = 3 * 28 + before_after.GAP, before_after.GAP
    assert page.size == (3 * step + gap, 2 * step + gap)
    assert page.getpixel((step + gap, gap)) == (255, 255, 255)
    assert page.getpixel((2 * step + gap, gap)) == (128, 128, 128)  # the first of two greys
    assert page.getpixel((gap, step + gap)) == (128, 128, 128)  # the second, below
    below = before_after.below([before_after.words("words"), page])
    assert below.size == (before_after.WIDTH, before_after.TEXT + 2 * step + gap)
    assert below.getpixel((gap, before_after.TEXT + step + gap)) == (128, 128, 128)


def test_a_table_has_its_columns_aligned():
    table = "| a   | long |\n| --- | ---: |\n| bcd |   ±1 |"
    assert evaluation.aligned([["a", "long"], ["bcd", "±1"]]) == table
