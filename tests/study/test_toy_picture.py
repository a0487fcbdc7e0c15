"""The toy: what it measures, and that its picture is drawn or refused in one line. Never what it looks like."""

import sys

import pytest
import torch
from PIL import Image

from minisiss import study
from minisiss.study import toy


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(toy, "STEPS", 150)
    monkeypatch.setattr(toy, "SAMPLES", 200)
    monkeypatch.setattr(toy, "METHODS", {title: how | {"steps": 3} for title, how in toy.METHODS.items()})


def test_it_learns_measures_and_draws(small, script, tmp_path, monkeypatch):
    figure, found = pytest.importorskip("minisiss.study.toy_figure"), []
    draw = figure.draw
    monkeypatch.setattr(figure, "LAMS", figure.LAMS[::2])
    monkeypatch.setattr(figure, "draw", lambda *arguments: (found.append(arguments), draw(*arguments)))
    status, said, _ = script("minisiss.study.toy", "--out", tmp_path / "toy.png", "--seed", 1)
    assert status == 0 and "toy.png" in said and (tmp_path / "toy.png").stat().st_size < 300_000
    assert min(Image.open(tmp_path / "toy.png").size) > 1000
    ((_, schedule, data, model, looks),) = found
    assert list(looks) == ["Training data", toy.BEFORE, toy.AIM, *toy.METHODS]
    shares = {title: inside.float().mean().item() for title, (_, inside, _) in looks.items()}
    assert 0.1 < shares["Training data"] < 0.13  # 240 of 2,000, but for the 1% beyond three widths
    assert shares[toy.BEFORE] > shares[toy.AIM] + 0.02
    assert abs(looks[toy.AIM][2]) < 0.01  # two draws of one model
    least, *others = (figure.variance(model, data, schedule, 60, lam) for lam in (0.5, 0.05, 0.95))
    assert all(least < 0.5 * other for other in others) and figure.variance(model, data, schedule, 600, 0.05) < 0.5 * least


def test_without_matplotlib_it_says_so_in_one_line(script, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "minisiss.study.toy_figure", raising=False)
    monkeypatch.delattr(study, "toy_figure", raising=False)  # as if it had not been imported yet
    monkeypatch.setattr(toy, "learn_and_forget", lambda seed: pytest.fail("nothing to draw it with"))
    status, _, error = script("minisiss.study.toy")
    assert status == 2 and "needs matplotlib" in error and error.count("\n") == 1


def test_a_picture_that_cannot_be_written_is_refused_before_anything_runs(script, tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "learn_and_forget", lambda seed: pytest.fail("too late"))
    for out in (tmp_path / "no" / "toy.png", tmp_path):
        status, _, error = script("minisiss.study.toy", "--out", out)
        assert status == 2 and "--out" in error and error.count("\n") == 1


def test_a_denoiser_works_on_pictures_of_one_pixel_and_two_channels():
    torch.manual_seed(0)
    m, timesteps = torch.randn(5, 2, 1, 1), torch.tensor([0, 10, 100, 500, 999])
    assert toy.Denoiser()(m, timesteps).shape == m.shape
