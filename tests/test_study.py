"""The study: the benchmark and the toy's picture."""

import pytest

from minisiss.unlearning import METHODS


def test_the_benchmark_has_a_row_per_method(script):
    quick = "--preset mnist-tiny --batch-size 2"
    status, said, _ = script("minisiss.study.bench", *quick.split())
    rows = [line.split("|")[1:-1] for line in said.splitlines() if line.startswith("| ")][2:]
    assert status == 0 and "mnist-tiny, batches of 2" in said
    ratios = {name.strip(): float(ratio) for name, _, ratio in rows}
    assert list(ratios) == list(METHODS)
    assert ratios["naive_deletion"] == 1 and min(ratios.values()) > 0


def test_the_toys_picture_shows_weights_and_points(tmp_path):
    pytest.importorskip("matplotlib")
    from minisiss.study import toy

    figure = toy.Figure()
    left, right, below = figure.subplots(1, 3)
    toy.draw_weights(left, right, t=60)
    w_x, w_a, unbounded = (line.get_ydata() for line in right.lines)
    assert w_x + w_a == pytest.approx(2)  # at λ = 0.5 their mean is 1
    assert unbounded.max() > 1000
    toy.draw_points(below, "a network", toy.torch.nn.Linear(3, 2))
    assert below.get_title() == "a network" and "in the cluster" in below.get_xlabel()
    figure.savefig(tmp_path / "toy.png")
    assert (tmp_path / "toy.png").stat().st_size > 10_000
