"""Runs that are killed at any moment, and continued: nothing is lost but the steps since the last checkpoint."""

import io
import json
import multiprocessing
import os
import random
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, few_steps, same

import train_ddpm
import unlearn
from minisiss import errors, presets, sampling, unlearning  # noqa: F401
from minisiss.machine import command_line
from minisiss.metrics import forgetting  # noqa: F401
from minisiss.report import pictures  # noqa: F401
from minisiss.runs import checkpoint

TRAIN = ("--preset", "mnist-tiny", "--data-root", "bundled", "--batch-size", 2, "--sample-every", 1000, "--save-every", 1)
UNLEARN = ("--preset", "mnist-tiny", "--samples", 0, "--memory-timesteps", 500, "--save-every", 2)
METHODS = ["siss", "siss_no_is", "naive_deletion", "neggrad", "erasediff", "retrack", "unseen"]

# A server that has imported everything once, and forks: a process costs a fraction of a second.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["test_kill"])
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/runs")])  # for the server to find it


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def half_written(state: dict, file: io.BufferedWriter, save=torch.save) -> None:
    whole = io.BytesIO()
    save(state, whole)
    file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
    file.flush()
    die()


MOMENTS = {
    "while writing": (torch, "save", half_written),
    "before it is on the disk": (os, "fsync", lambda *_: die()),
    "before the new file is in the old one's place": (os, "replace", lambda *_: die()),
    "just after that": (os, "replace", lambda *paths, replace=os.replace: (replace(*paths), die())),
}


def run(directory: str, arguments: tuple, moment: str | None, save: int) -> None:
    """Run a script in this process, and be killed at this moment of the save of this number."""
    os.chdir(directory)
    few_steps(setattr)
    torch.set_num_threads(1)  # the same for all processes, and so the same rounding
    sys.stdout = sys.stderr = open(os.devnull, "w")
    sys.argv = [f"{arguments[0]}.py", *map(str, arguments[1:])]
    if moment:
        write, count = checkpoint.files.write_atomically, iter(range(1, 10**6))

        def counted(*of_a_save):
            if next(count) == save:
                setattr(*MOMENTS[moment])
            write(*of_a_save)

        checkpoint.files = SimpleNamespace(**vars(checkpoint.files) | {"write_atomically": counted})  # not for directory.py
    command_line.run({"train_ddpm": train_ddpm, "unlearn": unlearn}[arguments[0]].main)


def start(directory, *arguments, moment=None, save=0):
    process = processes.Process(target=run, args=(str(directory), arguments, moment, save))
    process.start()
    return process


def finish(directory, *arguments, **death) -> int:
    """Run a script to its end, and return its exit status; −9 for a killed one."""
    process = start(directory, *arguments, **death)
    process.join()
    return process.exitcode


def in_order(path) -> bool:
    """Whether no line of the log is torn, missing or double."""
    steps = [line["step"] for line in map(json.loads, path.read_text().splitlines()) if "loss" in line or "norm" in line]
    return steps == sorted(set(steps)) and len(steps) > 0


def test_a_training_that_is_killed_twenty_times_equals_one_that_is_not(tmp_path):
    arguments = ("train_ddpm", *TRAIN, "--steps", 100)
    assert finish(tmp_path, *arguments, "--out", "whole") == 0
    moments, step, killed, path = random.Random(0), -1, 0, tmp_path / "killed/model.pt"
    for life in range(20):
        begins_with = path.stat() if path.exists() else None
        process = start(tmp_path, *(("train_ddpm", "--resume", "killed") if begins_with else (*arguments, "--out", "killed")))
        if life % 4 == 0:  # lives that make a step or more, then some that may not live to see one
            while process.is_alive() and (not path.exists() or path.stat() == begins_with):
                process.join(timeout=0.01)
        process.join(timeout=moments.uniform(0, 0.3))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        if path.exists():
            found = checkpoint.load(path).training["step"]
            assert found >= step
            step = found
    assert killed > 5 and step > 0
    assert finish(tmp_path, "train_ddpm", "--resume", "killed") == 0
    assert same(path, tmp_path / "whole/model.pt")
    assert in_order(tmp_path / "killed/metrics.jsonl")
    assert not list((tmp_path / "killed").glob(".unfinished-*"))


FOUR_STEPS = ("train_ddpm", *TRAIN, "--steps", 4)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The checkpoint of a training of four steps that nobody killed."""
    directory = tmp_path_factory.mktemp("whole")
    assert finish(directory, *FOUR_STEPS, "--out", "whole") == 0
    return directory / "whole/model.pt"


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_training_killed_inside_a_save_has_the_old_checkpoint_or_the_new_one(moment, whole, tmp_path):
    assert finish(tmp_path, *FOUR_STEPS, "--out", "killed", moment=moment, save=3) == -signal.SIGKILL  # the first is of step 0
    assert checkpoint.load(tmp_path / "killed/model.pt").training["step"] == (2 if moment == "just after that" else 1)
    assert finish(tmp_path, "train_ddpm", "--resume", "killed") == 0
    assert same(tmp_path / "killed/model.pt", whole)
    assert not list((tmp_path / "killed").glob(".unfinished-*"))


@pytest.mark.parametrize("method", METHODS)
def test_an_unlearning_that_is_killed_equals_one_that_is_not(method, tmp_path, tiny_checkpoint):
    arguments = ("unlearn", *UNLEARN, "--checkpoint", tiny_checkpoint, "--method", method)
    assert finish(tmp_path, *arguments, "--out", "whole") == 0
    assert finish(tmp_path, *arguments, "--out", "killed", moment="while writing", save=3) == -signal.SIGKILL
    assert checkpoint.load(tmp_path / "killed/model.pt").training["step"] == 2
    assert finish(tmp_path, "unlearn", "--resume", "killed") == 0
    assert same(tmp_path / "killed/model.pt", tmp_path / "whole/model.pt")
    assert in_order(tmp_path / "killed/metrics.jsonl")


def test_a_run_killed_before_its_first_checkpoint_starts_again(whole, tmp_path):
    assert finish(tmp_path, *FOUR_STEPS, "--out", "killed", moment="while writing", save=1) == -signal.SIGKILL
    assert not (tmp_path / "killed/model.pt").exists()
    assert finish(tmp_path, "train_ddpm", "--resume", "killed") == 0
    assert same(tmp_path / "killed/model.pt", whole)
