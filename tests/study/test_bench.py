"""The benchmark's structure, and that what it compares is the same step; never how long anything takes."""

import json
from argparse import Namespace

import pytest
import torch
from conftest import randomise
from PIL import Image

from minisiss import errors, presets
from minisiss.study import bench, workload

ARGS = Namespace(device="cpu", precision="fp32", batch_size=6, data_root=None, seed=0)


@pytest.fixture
def tiny():
    return workload.Workload(ARGS, "mnist-tiny")


def test_it_measures_everything_and_writes_it_down(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sys.argv", ["bench", "--quick", "--device", "cpu", "--out", str(tmp_path / "bench.json")])
    assert bench.main() == 0
    results = json.loads((tmp_path / "bench.json").read_text())["presets"]["mnist-tiny"]
    assert [row["step"] for row in results["steps"]] == ["naive_deletion", "siss literal", "siss", "siss, c known", "siss_no_is", "erasediff", "neggrad", "retrack", "unseen"]
    assert results["steps"][0]["× naive"] == 1 and 0 < results["overlap"] < 1
    assert [row["network"] for row in results["throughput"]] == ["fp32", "bf16"]
    rows = results["steps"] + results["throughput"]
    assert all(value > 0 for row in rows for name, value in row.items() if isinstance(value, float) and name != "step MiB")
    said = capsys.readouterr().out
    assert all(row["step"] in said for row in results["steps"]) and "× naive" in said


def test_the_literal_and_the_fast_step_take_the_model_to_the_same_place(tiny):
    parameters = list(randomise(tiny.model).parameters())
    old = [p.detach().clone() for p in parameters]
    moves = []
    for name in (workload.LITERAL, "siss"):
        for p, q in zip(parameters, old, strict=True):
            p.data.copy_(q)
        tiny.optimizer = torch.optim.SGD(parameters, lr=1.0)
        tiny.step(name, 0)
        moves.append(torch.cat([(p - q).detach().flatten() for p, q in zip(parameters, old, strict=True)]))
    assert moves[0].norm() > 0.1
    assert (moves[0] - moves[1]).norm() <= 1e-4 * moves[0].norm()


def test_timed_steps_leave_the_model_as_it_was(tiny):
    old = [p.detach().clone() for p in tiny.model.parameters()]
    for name in workload.STEPS:
        tiny.step(name, 0)
    assert all(torch.equal(p, q) for p, q in zip(tiny.model.parameters(), old, strict=True))


def test_networks_are_compared_by_precision_and_compiled_where_that_is_asked_for(tiny, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model: model)
    assert list(bench.variants(tiny, compiled=False)) == ["fp32", "bf16"]
    networks = bench.variants(tiny, compiled=True)
    assert list(networks) == ["fp32", "bf16", "fp32, compiled", "bf16, compiled"]
    assert [row["network"] for row in bench.throughput(networks, 1, 2)] == list(networks)


def test_rounds_stop_when_their_time_is_up(monkeypatch):
    seen = []
    monkeypatch.setattr(bench, "SECONDS", 0)
    times = bench.measure("", {("a",): seen.append, ("siss",): seen.append}, 5, torch.device("cpu"))
    assert seen == [0, 0, 0, 1, 1, 1]  # SISS twice
    assert {key: len(rounds) for key, rounds in times.items()} == {("a",): 1, ("siss",): 1}


def test_colour_pictures_come_from_a_folder_or_are_made_up(tmp_path):
    config = workload.UNetConfig(**{**presets.PRESETS["celebahq"]["unet"], "image_size": 64})
    assert workload.pictures(config, None)[0].shape == (128, 3, 64, 64)
    with pytest.raises(errors.UserError, match="no readable picture"):
        workload.pictures(config, str(tmp_path))
    for name in ("a.png", "b.jpg"):
        Image.new("RGB", (80, 70)).save(tmp_path / name)
    assert workload.pictures(config, str(tmp_path))[0].shape == (2, 3, 64, 64)


def test_an_output_that_cannot_be_written_is_refused_before_anything_runs(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["bench", "--quick", "--device", "cpu", "--out", str(tmp_path / "no" / "bench.json")])
    with pytest.raises(errors.UserError, match="--out"):
        bench.main()
