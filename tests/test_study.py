"""The study: the benchmark, the table of what prompts bring back, and the toy's picture."""

import json

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


def record(directory, method, copies, named, others):
    """A run that forgot a prompt, with figures at the modified prompt and at the original one."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"method": method}))
    results = {}
    for when, given in zip(("before", "after"), others, strict=True):
        results[when] = {"other memorised pictures given": given}
    for kind, copy, share in zip(("modified", "original"), copies, named, strict=True):
        results["before"] |= {f"{kind}: copies": 1.0, f"{kind}: its digit": 0.0}
        results["after"] |= {f"{kind}: copies": copy, f"{kind}: its digit": share}
    (directory / "results.json").write_text(json.dumps(results))


def test_the_table_of_prompts_counts_what_is_mitigated(script, tmp_path):
    record(tmp_path / "1", "siss", (0, 0), (0.75, 1.0), (49, 46))
    record(tmp_path / "2", "neggrad", (0, 0), (0.0, 0.74), (49, 0))
    record(tmp_path / "3", "siss", (0, 1 / 16), (0.8, 1.0), (48, 48))  # a copy: not mitigated
    status, said, _ = script("minisiss.study.prompts", "1", "2", "3")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines()]
    expected = [["siss", "2", "100%", "50%", "1.5"], ["neggrad", "1", "0%", "0%", "49.0"]]
    assert status == 0 and rows[2:] == expected


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
