"""The command line: what it takes, what it refuses, and what it prints where."""

import importlib
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from PIL import Image

from minisiss.lab import presets

METHODS = """
    siss siss_by_norms siss_no_is naive_deletion neggrad erasediff retrack old_targets""".split()
TINY = {
    "train_ddpm": ("--preset", "mnist-tiny", "--data-root", "bundled"),
    "unlearn": ("--preset", "mnist-tiny", "--checkpoint", "tiny.pt"),
}

# The script, what is typed, and words that the line of the error must have.
WRONG = [
    ("unlearn", "--steps many", ["--steps", "'many'"]),
    ("unlearn", "--steps 0", ["--steps", "0 is not a number from 1"]),
    ("unlearn", "--steps", ["--steps", "argument"]),
    ("unlearn", "--lam 1.5", ["--lam", "1.5 is not a number from 0 to 1"]),
    ("train_ddpm", "--lr nan", ["--lr", "nan"]),
    ("train_ddpm", "--warmup " + 400 * "9", ["--warmup"]),
    ("train_ddpm", "--no-such-flag", ["--no-such-flag"]),
    ("unlearn", "--see 1", ["--see"]),  # no abbreviation: a later flag could change its meaning
    ("unlearn", "--preset", ["--preset", "argument"]),
    ("unlearn", "--preset imagenet", ["--preset", "imagenet", "mnist-small"]),
    ("train_ddpm", "--preset prompts", ["--preset prompts", "unlearn.py"]),
    ("train_ddpm", "--data prompts", ["--data prompts", "unlearn.py"]),
    ("unlearn", "--data prompts", ["--checkpoint tiny.pt", "--preset prompts"]),
    ("unlearn", "--method prayer", ["--method prayer", "siss_no_is"]),
    ("unlearn", "--method retrack --draw-x all", ["--draw-x all", "retrack"]),
    ("unlearn", "--device toaster", ["--device toaster"]),
    ("train_ddpm", "--device cuda", ["--device cuda"]),
    ("unlearn", "--out a --resume b", ["--out", "--resume"]),
    ("unlearn", "--resume nowhere", ["nowhere", "no run"]),
    ("unlearn", "--out folder", ["--out folder", "is there already"]),
    ("unlearn", "--out tiny.pt/run", ["tiny.pt/run"]),
    ("unlearn", "--out " + 5000 * "x", [5000 * "x"]),
    ("unlearn", "--checkpoint nowhere.pt", ["nowhere.pt", "no such"]),
    ("unlearn", "--memory-timesteps 500 1000", ["--memory-timesteps", "999"]),
    ("unlearn", "--data pictures --data-root nowhere", ["--data-root nowhere"]),
    ("unlearn", "--data pictures --data-root folder", ["--forget"]),
    ("train_ddpm", "--data pictures --data-root folder --exclude-forget", ["--exclude-forget"]),
    ("unlearn", "--data pictures --data-root folder --forget c.png", ["c.png", "a.png"]),
    ("unlearn", "--forget a.png", ["--forget a.png", "--data pictures"]),
]


@pytest.mark.parametrize("name, typed, words", WRONG, ids=[row[1][:50] for row in WRONG])
def test_wrong_input_is_one_line_and_status_2(
        name, typed, words, script, tiny_checkpoint, tmp_path):
    (tmp_path / "tiny.pt").write_bytes(tiny_checkpoint.read_bytes())
    (tmp_path / "folder").mkdir()
    for picture in ("a.png", "b.png"):
        Image.new("L", (28, 28), ord(picture[0])).save(tmp_path / "folder" / picture)
    before = sorted(tmp_path.rglob("*"))
    tiny = () if "--resume" in typed else TINY.get(name, ())
    status, said, error = script(name, *tiny, *typed.split())
    assert (status, said, error.count("\n")) == (2, "", 1), error
    assert error.startswith(f"{name}.py: error: ") and all(word in error for word in words), error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture
def parse(monkeypatch):
    """parse("unlearn", "--steps", 3) -> the arguments as a dictionary."""
    monkeypatch.setitem(presets.PRESETS, "nothing", {"unet": {}})

    def parse(name, *typed):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, typed)])
        return vars(importlib.import_module(name).parse_arguments())

    return parse


@pytest.mark.parametrize("preset", presets.PRESETS)
def test_defaults_are_the_declared_ones_or_the_presets(preset, parse):
    values = presets.PRESETS[preset]
    assert set(values) <= {"unet", "all", "train", "unlearn", *(f"unlearn {m}" for m in METHODS)}
    of_all = values.get("all", {})
    if "unet" in values:
        declared = parse("train_ddpm", "--preset", "nothing")
        shared = {name: value for name, value in of_all.items() if name in declared}
        expected = declared | shared | values["train"] | {"preset": preset}
        assert parse("train_ddpm", "--preset", preset) == expected
    for method in METHODS:
        declared = parse("unlearn", "--preset", "nothing", "--method", method)
        of_method = values.get(f"unlearn {method}", {})
        chosen = {"preset": preset, "method": method}
        expected = declared | of_all | values["unlearn"] | of_method | chosen
        assert parse("unlearn", "--preset", preset, "--method", method) == expected


def test_the_declared_defaults_are_those_of_the_papers(parse):
    expected = dict(method="siss", draw_x="rest", lam=0.5, grad_ratio=0.1, superfactor=90.0,
                    subtract_until=0.0375, ema=0.0, steps=60)
    assert parse("unlearn", "--preset", "nothing").items() >= expected.items()


def test_help_shows_the_values_of_preset_and_method(script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    status, said, error = script("unlearn", "--preset", "mnist-tiny", "--help")
    assert (status, error) == (0, "") and "optimizer steps (default: 6)" in said
    _, said, _ = script("unlearn", "--method", "naive_deletion", "--help")
    assert "learning rate at first (default: 0.002)" in said and "(default: None)" not in said


def test_a_preset_can_choose_the_method(parse, monkeypatch):
    values = {"unlearn": {"method": "neggrad", "lr": 7.0}, "unlearn neggrad": {"lr": 8.0}}
    monkeypatch.setitem(presets.PRESETS, "nothing", values)
    chosen = parse("unlearn", "--preset", "nothing")
    assert (chosen["method"], chosen["lr"]) == ("neggrad", 8.0)
    typed = parse("unlearn", "--preset", "nothing", "--method", "siss")
    assert (typed["method"], typed["lr"]) == ("siss", 7.0)


@pytest.fixture
def directory(parse, tmp_path):
    """A directory with the settings of a run of unlearn.py."""
    settings = parse("unlearn", "--preset", "mnist-tiny", "--method", "retrack", "--lr", 0.5)
    del settings["out"], settings["resume"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    return tmp_path


def test_a_resumed_run_has_its_own_settings(parse, directory):
    settings = json.loads((directory / "config.json").read_text())
    again = ("--lr", 0.5, "--method", "retrack", "--preset", "mnist-tiny")
    for typed in ((), again):
        assert parse("unlearn", "--resume", directory, *typed).items() >= settings.items()
    other = ("--device", "cuda:1", "--save-every", 7, "--precision", "bf16", "--data-root", "x")
    args = parse("unlearn", "--resume", directory, *other)
    assert (args["device"], args["save_every"], args["precision"]) == ("cuda:1", 7, "bf16")


FIXED = [
    ("unlearn", "--lr 0.6", "--lr 0.5"),
    ("unlearn", "--method siss", "--method retrack"),
    ("unlearn", "--preset mnist", "--preset mnist-tiny"),
    ("train_ddpm", "", "--method retrack"),  # a run of unlearn.py
]


@pytest.mark.parametrize("name, typed, words", FIXED)
def test_what_fixes_a_run_cannot_change(name, typed, words, script, directory):
    status, _, error = script(name, "--resume", directory, *typed.split())
    assert (status, error.count("\n")) == (2, 1) and words in error, error


def test_help_and_typing_errors_import_no_torch(tmp_path):
    program = """if True:
        import sys
        from minisiss.lab import cli
        for name in ("train_ddpm", "unlearn", "eval"):
            for typed in (["--help"], ["--preset", "mnist", "--help"], ["--seed", "x"], ["--no"]):
                sys.argv = [name, *typed]
                try:
                    cli.run(__import__(name).main)
                except SystemExit as stopped:
                    print("END", stopped.code, "torch" in sys.modules)"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    ends = [line for line in done.stdout.splitlines() if line.startswith("END")]
    assert ends == 3 * (2 * ["END 0 False"] + 2 * ["END 2 False"]), done.stderr


def test_a_terminal_without_utf_8_shows_escapes(tmp_path):
    """The help has Greek letters, and a name that is typed need not be text at all."""
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "COLUMNS": "200"}
    for typed, status in (("--help", 0), (b"\xff", 2)):
        command = [sys.executable, ROOT / "unlearn.py", typed]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
        assert done.returncode == status and b"Traceback" not in done.stderr
        assert (b"\\udcff" in done.stderr) if status else (b"\\u03c1 of siss_by_norms" in done.stdout)
