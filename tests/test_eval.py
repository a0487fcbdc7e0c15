"""eval.py: runs that are measured, the table of them, and what is passed over or refused."""

import json
import subprocess
import sys
import warnings
from argparse import Namespace

import pytest
import torch
from conftest import ROOT, TINY
from PIL import Image

from minisiss.lab import checkpoint, evaluation, metrics
from minisiss.lab.data import mnist_with_tshirt, read_sheet, to_float
from minisiss.schedule import NoiseSchedule
from minisiss.unet import UNet, UNetConfig

SCHEDULE = NoiseSchedule.linear()
QUICK = ("--preset", "mnist-tiny", "--samples", 100, "--precision", "fp32")
SETTINGS = {"method": "siss", "lam": 0.5, "steps": 6, "forget": []}
MEMORY = "memory, t = 500"


def make_run(directory, bias, steps=6, size=28, **settings):
    """A run as the scripts leave it, of a network that always predicts `bias`."""
    model = UNet(UNetConfig(**TINY | dict(channels=(4, 4, 4), image_size=size)))
    torch.nn.init.constant_(model.conv_out.bias, bias)
    made_by = {"script": "unlearn.py", "settings": SETTINGS | settings, "steps": steps}
    directory.mkdir(parents=True)
    checkpoint.save(directory / "model.pt", checkpoint.Checkpoint(model, SCHEDULE, made_by))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """eval.py over good and bad runs: its directory, its figures, and how it ended."""
    directory = tmp_path_factory.mktemp("measured")
    runs = directory / "runs"
    make_run(runs / "siss-0", 0.2, seed=0)
    make_run(runs / "siss-1", 0.3, seed=1)
    make_run(runs / "retrained", 0.0, exclude_forget=True)
    make_run(runs / "stopped", 0.1, steps=3)
    (runs / "empty").mkdir()
    (runs / "eval-7").mkdir()
    (runs / "eval-7/results.md").touch()
    names = "stopped/ siss-0/ siss-1/ empty eval-7/ nowhere retrained".split()
    command = [sys.executable, ROOT / "eval.py", *QUICK, *(f"runs/{name}" for name in names)]
    ended = subprocess.run(map(str, command), cwd=directory, capture_output=True, text=True)
    results = json.loads((runs / "eval-1/results.json").read_text())
    return runs / "eval-1", results["figures"], ended


def cells_of(table):
    """A table in Markdown: by the label of each row its cells, by their column."""
    cells = [list(map(str.strip, line.split("|")[1:-1])) for line in table.splitlines()]
    return {row[0]: dict(zip(cells[0][1:], row[1:], strict=True)) for row in cells[2:]}


def test_runs_of_other_seeds_share_a_row(measured):
    out, figures, _ = measured
    rows = cells_of((out / "results.md").read_text())
    assert list(rows) == ["runs/siss-0, …", "runs/retrained"]
    siss, retrained = rows.values()
    assert (siss["runs"], siss["steps"], retrained["runs"]) == ("2", "6", "1")
    first, second = (figures[f"runs/siss-{seed}"][MEMORY] for seed in (0, 1))
    deviation = abs(first - second) / 2**0.5
    assert siss[MEMORY] == f"{(first + second) / 2:#.3g} ± {deviation:#.3g}" and deviation > 0
    assert retrained[MEMORY] == f"{figures['runs/retrained'][MEMORY]:#.3g}"
    assert siss["T-shirts"] == "0.00% ± 0.00%"
    assert retrained["at most (95%)"] == "3.70%"  # of 100 samples
    assert retrained["to retrained"] == "—"
    assert {"NLL, bits/dim", "inception score", "Fréchet distance"} < siss.keys()


def test_runs_that_cannot_be_measured_are_said(measured):
    _, figures, ended = measured
    assert list(figures) == ["runs/siss-0", "runs/siss-1", "runs/retrained"]
    expected = [
        "runs/stopped/: was stopped at step 3",
        "runs/empty: holds no model",
        "runs/nowhere: no such checkpoint",
    ]  # and nothing of runs/eval-7
    errors = ended.stderr.splitlines()
    assert ended.returncode == 2 and len(errors) == len(expected)
    for words, line in zip(expected, errors, strict=True):
        assert f"error: {words}" in line


def test_the_table_is_printed_and_the_tradeoff_drawn(measured):
    out, _, ended = measured
    assert (out / "results.md").read_text() in ended.stdout
    pytest.importorskip("matplotlib")
    with Image.open(out / "tradeoff.png") as picture:
        picture.load()


def settings(**others):
    return {"settings": SETTINGS | {"seed": 0} | others}


A, SEED_1, SEED_7 = settings(), settings(seed=1), settings(seed=7, device="cuda")
B, B_1, PUBLISHED = settings(lam=0.1), settings(lam=0.1, seed=1), {"published": "folder"}
ROWS = [
    ({"r/a-0": A, "r/a-7": SEED_7, "r/a-1": SEED_1}, {"r/a-0, …": ["r/a-0", "r/a-7", "r/a-1"]}),
    ({"r/a-0": A, "r/b-1": SEED_1}, {"r/a-0": ["r/a-0"], "r/b-1": ["r/b-1"]}),
    ({"a-0": A, "a-1": SEED_1, "a-2": B}, {"a-0, …": ["a-0", "a-1"], "a-2": ["a-2"]}),
    ({"a": A, "a-0": B, "a-1": B_1}, {"a": ["a"], "a-0, …": ["a-0", "a-1"]}),
    ({"a-0": A, "a-1": A, "a-2": SEED_1}, {"a-0": ["a-0"], "a-1": ["a-1"], "a-2": ["a-2"]}),
    ({"a-0": PUBLISHED, "a-1": PUBLISHED}, {"a-0": ["a-0"], "a-1": ["a-1"]}),
]


@pytest.mark.parametrize("made_by, expected", ROWS)
def test_other_settings_and_names_have_their_own_rows(made_by, expected):
    assert evaluation.rows_of(made_by) == expected


def test_figures_count_tshirts_and_judge_the_other_samples():
    tshirt, digits = to_float(read_sheet("tshirt.png")), to_float(read_sheet("test-digits.png"))

    def half(m, timesteps):
        """The ideal denoiser of T-shirt or digit, by the noise of a pixel that is black in both."""
        images = (tshirt, digits[300:301])
        noise = [SCHEDULE.noise_between(x.expand_as(m), m, timesteps) for x in images]
        return torch.where(noise[0][:, :, :1, :1] > 0, *noise)

    args = Namespace(data="mnist", memory_timesteps=[500], draws=3, seed=0)
    args.samples, args.sampling_steps = 240, 3
    judge = evaluation.Evaluation(args, mnist_with_tshirt("bundled", "cpu"), torch.device("cpu"))
    found = judge.figures(half, SCHEDULE)
    copies = metrics.is_copy(judge.samples, tshirt)
    count = copies.sum().item()
    assert 72 < count < 140 and found["T-shirts"] == pytest.approx(count / 240)
    assert found["at most (95%)"] == metrics.wilson_interval(count, 240)[1]
    assert found["inception score"] == pytest.approx(1, abs=1e-3)  # the others are one digit
    others = metrics.moments(metrics.classify(judge.samples[~copies])[0])
    distance = metrics.frechet_distance(others, metrics.load_classifier()[1])
    assert found["Fréchet distance"] == pytest.approx(distance, rel=1e-4)


class Descriptor(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, :, ::100, ::100].flatten(1)


class Inception(torch.nn.Module):
    def forward(self, images: torch.Tensor, return_features: bool) -> torch.Tensor:
        assert images.dtype == torch.uint8 and images.size(1) == 3 and return_features
        return images.float().mean(dim=[2, 3])


def test_a_users_networks_add_columns(script, tmp_path):
    make_run(tmp_path / "run", 0.1, size=8)
    (tmp_path / "faces").mkdir()
    for level in (0, 100, 200):
        Image.new("L", (8, 8), level).save(tmp_path / f"faces/{level}.png")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would rather have torch.export
        torch.jit.script(Descriptor()).save("descriptor.pt")
        torch.jit.script(Inception()).save("inception.pt")
    folder = ("--data", "pictures", "--data-root", "faces", "--forget", "100.png")
    networks = ("--sscd", "descriptor.pt", "--inception", "inception.pt")
    status, _, error = script("eval", "run", *QUICK, *folder, *networks)
    assert (status, error) == (0, "")
    figures = json.loads((tmp_path / "runs/eval-1/results.json").read_text())["figures"]["run"]
    (row,) = cells_of((tmp_path / "runs/eval-1/results.md").read_text()).values()
    assert row["SSCD"] == f"{figures['SSCD']:#.3g}" and figures["FID"] > 0
    assert "kept, t = 500" in row
    assert "T-shirts" not in row and "inception score" not in row


def test_models_of_several_sizes_are_an_error(script, tmp_path):
    for size in (8, 16):
        make_run(tmp_path / f"run-{size}", 0.1, size=size)
    status, _, error = script("eval", *QUICK, "run-8", "run-16")
    assert status == 2 and "several sizes" in error


def test_nothing_to_measure_is_an_error(script):
    status, _, error = script("eval", *QUICK, "nowhere", "nothing")
    assert status == 2 and error.count("\n") == 3 and "nothing to measure" in error
