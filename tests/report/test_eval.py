"""Measuring and comparing runs: eval.py with runs, and the rooms it uses."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_run

from minisiss.data.digits import bundled_digits, bundled_tshirt, held_out_digits
from minisiss.data.training_set import to_float, to_uint8
from minisiss.errors import UserError
from minisiss.metrics import classifier, colour, quality
from minisiss.report import comparison, evaluation, table
from minisiss.runs import checkpoint, pretrained
from minisiss.schedule import NoiseSchedule
from minisiss.study import train_classifier

FLAGS = ("--samples", 12, "--sampling-steps", 2, "--draws", 2, "--memory-timesteps", 300, 500, 700, "--precision", "fp32")


@pytest.fixture(scope="session")
def untrained() -> tuple[classifier.DigitClassifier, quality.Moments]:
    torch.manual_seed(0)
    network = classifier.DigitClassifier().eval().requires_grad_(False)
    features, _ = classifier.classify(network, to_float(held_out_digits("bundled")[::5]))
    return network, quality.moments(features)


@pytest.fixture
def measure(script, monkeypatch, untrained):
    monkeypatch.setattr(classifier, "load_classifier", lambda: untrained)
    monkeypatch.setattr(evaluation, "LOSS_IMAGES", 20)
    return lambda *arguments: script("eval", *arguments, *FLAGS)


def read(path):
    return json.loads(path.read_text())


def test_runs_are_measured_averaged_over_seeds_and_compared(measure, tmp_path):
    make_run(tmp_path / "runs/a", 0.2, seed=1, method="siss", lam=0.5)
    make_run(tmp_path / "runs/b", 0.3, seed=2, method="siss", lam=0.5)
    make_run(tmp_path / "runs/c", 0.1, method="siss", lam=0.1)
    make_run(tmp_path / "runs/retrained", 0.0, exclude_forget=True)
    make_run(tmp_path / "runs/pretrained", -0.1, exclude_forget=False)
    status, said, error = measure(*[f"runs/{name}/" for name in ("a", "b", "c", "retrained", "pretrained")])
    assert (status, error) == (0, "")

    out = tmp_path / "runs/eval-1"
    results = read(out / "results.json")
    assert results["rows"] == {
        "pretrained": ["runs/pretrained"], "retrained": ["runs/retrained"], "siss (lam 0.5)": ["runs/a", "runs/b"], "siss (lam 0.1)": ["runs/c"],
    }  # fmt: skip
    one = {result["run"]: result for result in results["runs"]}
    assert one["runs/a"]["samples"] == 12 and one["runs/a"]["settings"]["lam"] == 0.5
    assert all(result[name] > 0 for result in one.values() for name in ("frechet", "inception_score", "nll"))
    assert {"similarity", "psnr", "comes_back", "feature_similarity"} == one["runs/b"]["memory_700"].keys()
    assert all(len(losses) == 10 for losses in one["runs/c"]["losses"].values())
    assert one["runs/retrained"]["to_retrained"] is None and one["runs/a"]["to_retrained"] > 0

    table = (out / "results.md").read_text()
    rows = {cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for line in said.split("\n\n")[0].splitlines() if len(cells := line.split("|")) > 3}
    assert said.split("\n\n")[0].strip() in table and "held out" in table
    columns = dict(zip(rows["method"], rows["siss (lam 0.5)"], strict=True))
    nll = [one[name]["nll"] for name in ("runs/a", "runs/b")]
    assert columns["NLL, bits/dim"] == f"{sum(nll) / 2:.3f} ± {abs(nll[0] - nll[1]) / 2**0.5:.3f}"
    assert (columns["runs"], columns["steps"], columns["seconds"]) == ("2", "6", "4")
    assert columns["T-shirts (95% interval)"].startswith("0.00% (0.00% to 24.2")  # of 12 samples
    assert rows["retrained"][-1] == "—"


def test_the_runs_of_the_scripts_are_runs_and_an_evaluation_is_not(measure, script, tmp_path):
    assert script("train_ddpm", "--preset", "mnist-tiny", "--data-root", "bundled", "--steps", 2)[0] == 0
    assert script("unlearn", "--preset", "mnist-tiny", "--checkpoint", "runs/train-1/model.pt", "--samples", 2, "--method", "naive_deletion")[0] == 0
    looks = [line for line in map(json.loads, (tmp_path / "runs/naive_deletion-1/metrics.jsonl").read_text().splitlines()) if "memory" in line]
    assert [look["step"] for look in looks] == [0, 3, 6]
    assert all({"loss_on_kept", "loss_on_forget"} <= look.keys() for look in looks)
    for number in (1, 2):
        status, _, error = measure(*sorted(f"runs/{name}" for name in os.listdir("runs")))
        assert (status, error) == (0, "")
        assert list(read(tmp_path / f"runs/eval-{number}/results.json")["rows"]) == ["pretrained", "naive_deletion"]


def test_samples_are_drawn_once_for_a_model_and_again_for_another(measure, tmp_path, monkeypatch):
    drawn, draw_samples = [], evaluation.draw_samples
    monkeypatch.setattr(evaluation, "draw_samples", lambda *arguments, **options: drawn.append(1) or draw_samples(*arguments, **options))
    directory = make_run(tmp_path / "a", 0.1, method="siss")
    measure("a")
    measure("a")
    first, second = (read(tmp_path / f"runs/eval-{number}/results.json") for number in (1, 2))
    assert len(drawn) == 1 and first == second
    (cached,) = directory.glob("samples-*.pt")
    assert torch.load(cached, weights_only=True).dtype == torch.uint8
    measure("a", "--seed", 1)
    assert len(drawn) == 2
    cached.write_bytes(cached.read_bytes()[:100])
    measure("a")
    assert len(drawn) == 3
    os.replace(make_run(tmp_path / "b", 0.9, method="siss") / "model.pt", directory / "model.pt")
    measure("a")
    assert len(drawn) == 4
    assert read(tmp_path / "runs/eval-5/results.json")["runs"][0]["frechet"] != first["runs"][0]["frechet"]


def test_everything_is_written_before_anything_is_printed(tmp_path, monkeypatch):
    def closed(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", closed)
    result = {"run": "\udcff", "method": "siss", "steps": 1, "seconds": 1.0, "settings": {"forget": ["\udcff.png"] * 99, "lam": 0}}
    other = {**result, "settings": {"forget": ["b.png"], "lam": 1}}
    memory = {"memory_500": {"similarity": 0.5, "psnr": 9.0}}
    with pytest.raises(BrokenPipeError):
        comparison.write(tmp_path, [result | memory, other | memory], [500], "\udcff.png")
    table = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "\\udcff.png" in table and len(read(tmp_path / "results.json")["runs"]) == 2
    assert max(map(len, table.splitlines())) < 200  # a list of names does not make the table wide


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(30, "Read-only file system")])
def test_samples_that_cannot_be_kept_are_a_warning(error, measure, tmp_path, monkeypatch):
    def refuse(path, write):
        raise error

    make_run(tmp_path / "runs/a", 0.2, exclude_forget=False)
    monkeypatch.setattr(evaluation, "write_atomically", refuse)
    status, said, warned = measure("runs/a")
    assert status == 0 and "pretrained" in said
    assert warned.count("\n") == 1 and "warning: runs/a: its samples are not kept" in warned and error.strerror in warned


def test_what_is_wrong_with_one_run_is_one_line_and_the_others_are_measured(measure, tmp_path):
    make_run(tmp_path / "good", 0.1, method="siss")
    make_run(tmp_path / "large", 0.1, size=32, method="siss")
    make_run(tmp_path / "stopped", 0.1, steps=3, method="siss")
    make_run(tmp_path / "prompted", 0.1, method="siss", data="prompts")
    make_run(tmp_path / "no-model", 0.1, method="siss").joinpath("model.pt").unlink()
    truncated = make_run(tmp_path / "truncated", 0.1, method="siss") / "model.pt"
    truncated.write_bytes(truncated.read_bytes()[:2000])
    of_unknown_origin = make_run(tmp_path / "foreign", 0.1, method="siss") / "model.pt"
    checkpoint.save(of_unknown_origin, checkpoint.load(of_unknown_origin).model, NoiseSchedule.linear(), {"script": "conftest.py"})
    (tmp_path / "empty").mkdir()
    status, said, error = measure("large", "empty", "nowhere", "no-model", "truncated", "stopped", "prompted", "foreign", "good")
    assert status == 2 and "siss" in said
    lines = error.splitlines()
    expected = ["1×32×32", "empty: holds no run", "nowhere: holds no run", "no model.pt", "truncated", "step 3 of 6", "prompted: a run on prompts", "does not say how it was made"]
    assert len(lines) == len(expected) and all(words in line for words, line in zip(expected, lines, strict=True)), error
    assert [result["run"] for result in read(tmp_path / "runs/eval-1/results.json")["runs"]] == ["good"]


@pytest.mark.parametrize("layout", [".", "unet", "unet_ema"])
def test_a_published_model_is_no_run_and_a_run_no_published_model(layout, script, tiny_unet, tmp_path):
    """Each is told in a line what to give instead."""
    make_run(tmp_path / "run", 0.1, method="siss")
    pretrained.save_pretrained(tmp_path / "pipe" / layout, tiny_unet, NoiseSchedule.linear())
    status, _, error = script("eval", "pipe")
    assert status == 2 and error.splitlines()[0] == "eval.py: error: pipe: holds no run but a published model; look at it with --checkpoint pipe"
    for name in ("eval", "unlearn"):
        status, _, error = script(name, "--checkpoint", "run", "--data-root", "bundled")
        assert status == 2 and error == f"{name}.py: error: run: is the directory of a run; give run/model.pt\n"
    shutil.copy("run/model.pt", "pipe")  # a file too many makes no run of it
    checkpoint.load_any("pipe", [0], torch.device("cpu"))
    assert sorted(os.listdir(tmp_path)) == ["pipe", "run"]


def scripted(path: Path, network: torch.nn.Module) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would rather have torch.export
        torch.jit.script(network).save(str(path))
    return path


class Descriptor(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, :, ::100, ::100].flatten(1)


class Inception(torch.nn.Module):
    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return images.float().mean(dim=[2, 3]) + 0 * float(return_features)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--sscd", "nowhere.pt"), ["--sscd nowhere.pt", "no such file", "sscd_disc_mixup.torchscript.pt"]),
        (("--sscd", "run/model.pt"), ["--sscd run/model.pt", "not a TorchScript file", "https://"]),
        (("--inception", "nowhere.pt"), ["--inception nowhere.pt", "https://"]),
        (("--inception", "run/config.json"), ["--inception run/config.json", "not a TorchScript file"]),
        (("--inception", "descriptor.pt"), ["--inception", "return_features=True", "https://"]),
        (("--out", "run"), ["--out run"]),
    ],
)
def test_wrong_flags_are_one_line_and_leave_nothing_behind(arguments, words, measure, script, tmp_path):
    make_run(tmp_path / "run", 0.1, method="siss")
    scripted(tmp_path / "descriptor.pt", Descriptor())
    before = sorted(os.listdir(tmp_path))
    status, _, error = script("eval", "run", *FLAGS, *arguments)
    assert status == 2 and error.count("\n") == 1 and all(word in error for word in words), error
    assert sorted(os.listdir(tmp_path)) == before


def test_directories_without_any_run_are_an_error(measure, tmp_path):
    status, _, error = measure("nowhere")
    assert status == 2 and "nowhere: holds no run" in error and error.count("\n") == 1
    status, _, error = measure("nowhere", "nothing")
    assert status == 2 and "nothing: holds no run" in error and "nothing to measure" in error
    assert os.listdir(tmp_path) == []


def test_colour_metrics_are_columns_where_their_networks_are_given(measure, tmp_path):
    make_run(tmp_path / "run", 0.1, method="siss")
    status, said, _ = measure("run", "--sscd", scripted(tmp_path / "d.pt", Descriptor()), "--inception", scripted(tmp_path / "i.pt", Inception()))
    assert status == 0 and "SSCD of memory" in said and "FID" in said
    result = read(tmp_path / "runs/eval-1/results.json")["runs"][0]
    assert -1 <= result["copy_similarity"] <= 1 and result["fid"] > 0


def test_descriptors_are_of_288_normalised_pixels_in_three_colours_and_of_length_one():
    seen = []
    network = lambda images: seen.append(images) or images.flatten(1)[:, :7]  # noqa: E731
    grey = torch.zeros(2, 1, 28, 28)
    vectors = colour.descriptors(network, grey)
    assert seen[0].shape == (2, 3, 288, 288) and torch.allclose(vectors.norm(dim=1), torch.ones(2))
    expected = (0.5 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(seen[0][0, :, 5, 5], expected)
    assert torch.allclose(colour.copy_similarity(network, grey, grey[:1]), torch.ones(2))
    colour.descriptors(network, torch.zeros(1, 3, 64, 128))
    assert seen[-1].shape == (1, 3, 288, 576)


def test_the_picture_aims_at_the_retrained_model_where_there_is_one(monkeypatch, tmp_path):
    plots = pytest.importorskip("minisiss.report.plots")
    drawn = []
    monkeypatch.setattr(plots.plt, "close", lambda figure: drawn.append(figure))

    def one(memories, to_retrained, frechet=20.0):
        alike = {f"memory_{t}": {"similarity": value} for t, value in zip((300, 500), memories, strict=True)}
        return alike | {"run": str(tmp_path), "method": "siss", "to_retrained": to_retrained, "frechet": frechet}

    groups = {"retrained": [one((0.8, 0.6), None)], "siss": [one((0.5, 0.5), 7.0), one((0.9, 0.7), 5.0)]}
    plots.save_pareto(tmp_path / "pareto.png", groups, 500)
    end = drawn[0].axes[0]
    assert "difference of the memories" in end.get_xlabel() and "retrained" in end.get_ylabel()
    (points,) = [line.get_xydata() for line in end.lines if len(line.get_xydata()) == 2 and line.get_marker() == "."]
    assert points == pytest.approx(torch.tensor([[0.2, 7.0], [0.1, 5.0]]).numpy())  # (0.3 + 0.1)/2, (0.1 + 0.1)/2
    plots.save_pareto(tmp_path / "pareto.png", {"siss": groups["siss"]}, 500)
    assert "t = 500" in drawn[1].axes[0].get_xlabel() and "real digits" in drawn[1].axes[0].get_ylabel()


def test_the_picture_needs_matplotlib_and_the_table_does_not(measure, tmp_path, monkeypatch):
    make_run(tmp_path / "run", 0.1, method="siss")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "minisiss.report.plots", None)
        status, said, _ = measure("run")
    assert status == 0 and "needs matplotlib" in said and not (tmp_path / "runs/eval-1/pareto.png").exists()
    pytest.importorskip("matplotlib")
    status, said, _ = measure("run")
    assert status == 0 and "pareto.png" in said and (tmp_path / "runs/eval-2/pareto.png").stat().st_size > 10_000


def test_a_likelihood_that_cannot_be_solved_is_a_dash(monkeypatch):
    def fail(*arguments, **options):
        raise ArithmeticError

    monkeypatch.setattr(evaluation, "bits_per_dimension", fail)
    assert evaluation.likelihood(None, None, None, 0) == {"nll": None, "nll_error": None}
    assert comparison.mean_and_spread([1.0, None]) == (None, None)


def test_quality_is_that_of_the_samples_that_are_not_the_tshirt():
    features, probabilities = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)), torch.eye(10).repeat(3, 1)
    copies = torch.arange(30) >= 20
    real = quality.moments(features + 1)
    found = evaluation.quality(features, probabilities, copies, real)
    assert found["left_out"] == 10 and found["inception_score"] == pytest.approx(quality.inception_score(probabilities[:20])[0])
    assert found["frechet"] == pytest.approx(quality.frechet_distance(quality.moments(features[:20]), real))
    assert evaluation.quality(features, probabilities, torch.arange(30) >= 9, real)["frechet"] is None


def test_the_distance_to_several_retrained_models_is_the_mean_without_itself():
    at = lambda place: (torch.tensor([place]).double(), torch.eye(1).double())  # noqa: E731
    results = [{"method": "siss"}, {"method": "retrained"}, {"method": "retrained"}]
    evaluation.add_distances(results, [at(0.0), at(1.0), at(3.0)])
    assert [result["to_retrained"] for result in results] == pytest.approx([5, 4, 4])


def test_rows_are_in_columns():
    assert table.aligned([["a", "long"], ["bcd", "±1"]]) == "| a   | long |\n| --- | ---: |\n| bcd |   ±1 |"


def test_the_test_digits_are_a_hundred_of_each_class_and_none_of_the_training_digits():
    digits = held_out_digits("bundled")
    assert digits.shape == (1000, 1, 28, 28) and digits.dtype == torch.uint8
    ink = digits.float().mean(dim=(1, 2, 3)).reshape(10, 100).mean(dim=1)
    assert ink.argmax() == 0 and ink.argmin() == 1
    both = torch.cat([digits, bundled_digits()])
    assert len(torch.unique(both.flatten(1), dim=0)) == 11_000


def test_pixels_come_back_from_the_range_of_the_network():
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(every)), every)
    assert to_uint8(torch.tensor([-1.5, 1.5])).tolist() == [0, 255]
    assert torch.equal(to_uint8(to_float(bundled_tshirt())), bundled_tshirt())


def test_the_classifier_comes_with_the_moments_of_its_features(untrained, tmp_path):
    network, (mean, covariance) = untrained
    train_classifier.save(tmp_path / "c.pt", network, (mean, covariance), 0.1, {})
    loaded, moments = classifier.load_classifier(tmp_path / "c.pt")
    assert torch.equal(moments[0], mean) and torch.equal(moments[1], covariance)
    assert torch.equal(loaded.head.weight, network.head.weight)
    train_classifier.save(tmp_path / "c.pt", network, (mean, covariance[:5]), 0.1, {})
    with pytest.raises(UserError, match="c.pt: no readable digit classifier"):
        classifier.load_classifier(tmp_path / "c.pt")


def test_the_study_goes_on_where_it_was_stopped(tmp_path):
    """minisiss/study/study.sh with a stand-in for python that writes down how it is called and is stopped in its fourth run."""
    (tmp_path / "bin").mkdir()
    stand_in = tmp_path / "bin/python"
    stand_in.write_text("""#!/usr/bin/env bash
echo "$(basename "$1") ${*:2}" >> calls
if [ "$2" = --out ]; then mkdir -p "$3"; touch "$3/config.json"; fi
if [ "$(wc -l < calls)" = 4 ]; then exit 130; fi
""")
    stand_in.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    study = lambda: subprocess.run(["bash", ROOT / "minisiss/study/study.sh", "mnist", "data"], cwd=tmp_path, env=environment).returncode  # noqa: E731

    assert study() == 130
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 4 and "--out runs/study-mnist/siss_no_is-0 " in calls[3]
    assert study() == 0
    again = (tmp_path / "calls").read_text().splitlines()[4:]
    assert again[0] == "unlearn.py --resume runs/study-mnist/siss_no_is-0"
    assert len(again) == 1 + 25 + 10 + 14 + 3 and all("--out" in call for call in again[1:-3])
    assert again[-3].startswith("eval.py runs/study-mnist/ceiling-0/ ") and "--samples 4096" in again[-3]
    assert again[-2].startswith("eval.py runs/ablation-mnist/lam-0.1/ ") and again[-1].startswith("eval.py runs/again-mnist/all-")
    assert study() == 0
    assert (tmp_path / "calls").read_text().splitlines()[4 + len(again) :] == again[-3:]
