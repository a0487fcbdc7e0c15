"""The study: the benchmark, the table of what prompts bring back, and the toy's picture."""

import json

import pytest

from minisiss.study import bench
from minisiss.unlearning import METHODS


def test_the_benchmark_has_a_row_per_method(script):
    quick = "--preset mnist-tiny --rounds 1 --batch-size 2"
    status, said, _ = script("minisiss.study.bench", *quick.split())
    rows = [line.split("|")[1:-1] for line in said.splitlines() if line.startswith("| ")][2:]
    assert status == 0 and "mnist-tiny, batches of 2" in said
    assert [name.strip() for name, _, _ in rows] == list(bench.ROWS)
    assert {name.split(",")[0] for name in bench.ROWS} == set(METHODS)
    assert rows[0][2].strip() == "1.00" and all(float(ratio) > 0 for _, _, ratio in rows)


def record(directory, method, copies, named, others):
    """A run that forgot a prompt, with figures at the modified prompt and at the original one."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"method": method}))
    results = {"others": others}
    for kind, copy, share in zip(("modified", "original"), copies, named, strict=True):
        results[kind] = {"prompt": "a one", "copies": [16, copy], "named": [0.0, share]}
    (directory / "results.json").write_text(json.dumps(results))


def test_the_table_of_prompts_counts_what_is_mitigated(script, tmp_path):
    record(tmp_path / "1", "siss", (0, 0), (0.75, 1.0), (49, 46))
    record(tmp_path / "2", "neggrad", (0, 0), (0.0, 0.74), (49, 0))
    record(tmp_path / "3", "siss", (0, 1), (0.8, 1.0), (48, 48))  # a copy: not mitigated
    status, said, _ = script("minisiss.study.prompts", "1", "2", "3")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines()]
    expected = [["siss", "2", "100%", "50%", "1.5"], ["neggrad", "1", "0%", "0%", "49.0"]]
    assert status == 0 and rows[2:] == expected


def test_the_toys_picture_shows_weights_and_points(tmp_path):
    pytest.importorskip("matplotlib")
    from minisiss.study import toy

    figure = toy.Figure(figsize=(9, 10), dpi=50)
    above, below = figure.subfigures(2, 1)
    toy.draw_weights(above)
    weights = [line.get_ydata() for line in above.axes[2].lines[:2]]  # w_x and w_a at low noise
    assert weights[0] + weights[1] == pytest.approx(2)  # at λ = 0.5 their mean is 1
    toy.draw_points(below, {f"model {i}": toy.Denoiser() for i in range(6)}, seed=0)
    assert [axes.get_title() for axes in below.axes] == [f"model {i}" for i in range(6)]
    assert all("in the cluster" in axes.get_xlabel() for axes in below.axes)
    figure.savefig(tmp_path / "toy.png")
    assert (tmp_path / "toy.png").stat().st_size > 10_000
