"""What unlearn.py says and shows at its end."""

from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from minisiss.data.digits import bundled_digits, bundled_tshirt
from minisiss.data.training_set import TrainingSet, mnist_with_tshirt, to_float
from minisiss.machine.ranks import ALONE
from minisiss.report.pictures import save_gif
from minisiss.report.unlearned import BeforeAfter
from minisiss.schedule import NoiseSchedule

ARGS = Namespace(
    data="mnist", draws=2, memory_timesteps=[300, 500], steps=60, batch_size=64, method="siss", precision="fp32", samples=100, eta=0.0)


@pytest.fixture
def report():
    made = BeforeAfter(ARGS, mnist_with_tshirt("bundled"), lambda x, t: x, NoiseSchedule.linear(), ALONE)
    made.copies = torch.zeros(100, dtype=torch.bool)
    return made


@pytest.fixture
def loop():
    logged = []
    return SimpleNamespace(
        state=SimpleNamespace(step=60, seconds=6.0), logged=logged, write=lambda **figures: logged.append(figures))


def some_digits(first: int) -> torch.Tensor:
    """A hundred digits, ten of each class in turn."""
    return to_float(bundled_digits()[first::100].view(10, 10, 1, 28, 28).transpose(0, 1).flatten(0, 1))


def test_the_first_line_says_what_will_be_done(report, capsys):
    BeforeAfter(ARGS, mnist_with_tshirt("bundled"), lambda x, t: x, NoiseSchedule.linear(), ALONE)
    assert capsys.readouterr().out == "forgetting T-shirt by siss: 60 steps of 64 images, on cpu in fp32\n"


def test_t_shirts_that_became_digits_are_no_change_of_the_digits(report, loop):
    before, after = some_digits(0), some_digits(1)
    before[[3, 40]], report.copies[[3, 40]] = to_float(bundled_tshirt())[0], True
    blocks, words = report.compare_samples(before, after, loop)
    assert words[0] == "no T-shirt among 100 samples (2 before)" and words[1].startswith("digits as before (")
    assert blocks["T-shirt"] == [["T-shirts among 100 samples", "2.00%", "0.00%"]]
    (distance, was, now), (score, *scores) = blocks["kept: digits"]
    assert "Fréchet" in distance and "inception" in score and all(7 < float(one) <= 10 for one in scores)
    (logged,) = loop.logged
    assert logged["tshirt_rate_before"] == 0.02 and logged["tshirt_rate"] == 0
    assert [f"{logged[name]:.1f}" for name in ("frechet_before", "frechet")] == [was, now]


def test_digits_that_are_gone_and_t_shirts_that_came_are_said(report, loop):
    after = torch.rand(100, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    after[7] = to_float(bundled_tshirt())[0]
    _, words = report.compare_samples(some_digits(0), after, loop)
    assert words[0] == "1 T-shirt among 100 samples (0 before)" and words[1].startswith("digits much worse (")


def test_of_few_samples_only_t_shirts_are_counted(report, loop):
    report.copies = report.copies[:4]
    blocks, words = report.compare_samples(some_digits(0)[:4], some_digits(1)[:4], loop)
    assert words == ["no T-shirt among 4 samples (0 before)"] and list(blocks) == ["T-shirt"]
    assert "frechet" not in loop.logged[0]


def test_what_one_sees_again_and_again_has_t_shirts_in_it(report, monkeypatch):
    samples = some_digits(0)
    samples[[5, 50, 99]] = to_float(bundled_tshirt())[0]
    monkeypatch.setattr(report, "draw", lambda when: (samples, {}))
    report.draw_before()
    assert report.copies.nonzero()[:, 0].tolist() == [5, 50, 99]
    assert report.shown == [5, 50, 99, 0, 1, 2, 3, 4, 6, 7, 8, 9]
    report.args = Namespace(**vars(ARGS) | {"eta": 1.0})  # with noise of their own they cannot be drawn again
    report.draw_before()
    assert report.shown == []


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 256, 256)])
def test_the_film_has_a_frame_a_look_and_stays_small(shape, tmp_path):
    smooth = torch.nn.functional.interpolate(
        torch.rand(7, 12, shape[0], 8, 8, generator=torch.Generator().manual_seed(0)).flatten(0, 1) * 2 - 1, shape[1:], mode="bilinear")
    frames = {10 * look: (samples, samples[:5]) for look, samples in enumerate(smooth.view(7, 12, *shape))}
    save_gif(tmp_path / "film.gif", [300, 400, 500, 600, 700], frames)
    with Image.open(tmp_path / "film.gif") as film:
        assert film.n_frames == 7 and max(film.size) <= 600
    assert (tmp_path / "film.gif").stat().st_size < 500_000


def test_a_film_without_samples_shows_the_memory(tmp_path):
    frames = {step: (torch.zeros(0, 1, 28, 28), torch.full((2, 1, 28, 28), step / 10)) for step in (0, 10)}
    save_gif(tmp_path / "film.gif", [300, 500], frames)
    with Image.open(tmp_path / "film.gif") as film:
        assert film.n_frames == 2


def test_a_set_of_pictures_has_no_t_shirts(capsys):
    pictures = TrainingSet(torch.zeros(9, 3, 8, 8, dtype=torch.uint8), 1, "a.png")
    made = BeforeAfter(Namespace(**vars(ARGS) | {"data": "pictures"}), pictures, lambda x, t: x, NoiseSchedule.linear(), ALONE)
    assert list(made.sets) == ["a.png", "kept pictures"] and capsys.readouterr().out.startswith("forgetting a.png by siss")


def test_how_long_it_takes_is_said_once(report, loop):
    said = []
    loop.log, loop.bar = lambda figures, shown: figures, SimpleNamespace(write=said.append)
    report.args = Namespace(**vars(ARGS) | {"evaluate_every": 10})
    report.looking, report.drawing, loop.state.step, loop.state.seconds = 2.0, 30.0, 10, 15.0
    for _ in range(2):  # 50 steps of 1.5 s, six looks of 2 s (one is still to come at this step), and the samples
        report.log(loop, {})
    assert said == ["about 117 s to go"]
