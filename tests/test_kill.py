"""Runs that are killed with kill -9, and resumed: only the steps since the last save are lost.

A child process follows its own lines, and kills itself at one of them. So a run dies where the test
likes, also in the middle of a save, and the next time at the same place.
"""

import itertools
import multiprocessing
import os
import random
import signal
import sys
import threading

import torch
from conftest import ROOT, log_of, same
from tqdm import tqdm

import unlearn
from minisiss import unlearning
from minisiss.lab import before_after, checkpoint, cli, files, run  # noqa: F401 (imported once)

FLAGS = ("--preset", "mnist-tiny", "--samples", 0, "--draws", 1, "--memory-timesteps", 1,
         "--steps", 20, "--save-every", 2, "--evaluate-every", 4)
FOLLOWED = {part.__file__ for part in (run, checkpoint, files, unlearning)}
SAVE, WRITE = torch.save.__code__, files.write_atomically.__code__

# A server that imports everything once, and forks: a process costs a fraction of a second.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["test_kill"])
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])  # it finds this file


def is_moment(moment, frame, event):
    """Whether an event, as `sys.settrace` tells of it, is this moment of a run."""
    code, names = frame.f_code, frame.f_locals
    if moment == "any line":
        return code.co_filename in FOLLOWED and event == "line"
    if moment == "the new file is empty":
        return code is SAVE and event == "call"
    if moment == "the new file lacks its end":
        return code is SAVE and event == "return"
    if code is not WRITE or names["path"].name != "model.pt":
        return False
    if moment == "the new file is whole":
        return event == "line" and "file" in names and names["file"].closed
    return event == "return"  # the new file has taken the old one's place


def life(directory, typed, moment, number):
    """Run unlearn.py in this process, and be killed when this moment comes for the n-th time."""
    os.chdir(directory)
    torch.set_num_threads(1)  # the same for all processes, and so the same rounding
    tqdm.set_lock(threading.RLock())  # its own lock would outlive a killed process
    sys.stdout = sys.stderr = open(os.devnull, "w")
    sys.argv = ["unlearn.py", *map(str, typed)]
    count = itertools.count(1)

    def follow(frame, event, argument):
        if is_moment(moment, frame, event) and next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return follow if frame.f_code is SAVE or frame.f_code.co_filename in FOLLOWED else None

    sys.settrace(follow)
    cli.run(unlearn.main)


def live(directory, *typed, moment="any line", number=0):
    """Run unlearn.py in a process; return its exit status, which is −9 for a killed one."""
    process = processes.Process(target=life, args=(directory, typed, moment, number))
    process.start()
    process.join()
    return process.exitcode


# In each life the run dies when a moment comes for this time; then its checkpoint is of this step.
SAVES = [
    ("the new file is empty", 2, 0),  # saves at steps 0 and 2
    ("the new file lacks its end", 3, 2),  # at 0 again, 2 and 4
    ("the new file is whole", 1, 2),  # at 4
    ("the new file is in its place", 1, 4),  # at 4
]
PLACES = random.Random(0).sample(range(1, 4000), 6)


def test_a_run_killed_often_equals_a_whole_one(tiny_checkpoint, tmp_path):
    begin = (*FLAGS, "--checkpoint", tiny_checkpoint)
    assert live(tmp_path, *begin, "--out", "whole") == 0
    found, typed = tmp_path / "run", (*begin, "--out", "run")
    for moment, number, expected in SAVES:
        assert live(tmp_path, *typed, moment=moment, number=number) == -signal.SIGKILL, moment
        step = checkpoint.load(found / "model.pt").made_by["steps"]
        assert step == expected, moment
        assert len(list(found.glob(".model.pt*"))) == (moment != "the new file is in its place")
        typed = ("--resume", "run")
    for number in PLACES:
        assert live(tmp_path, *typed, number=number) == -signal.SIGKILL, number
        before, step = step, checkpoint.load(found / "model.pt").made_by["steps"]
        assert before <= step < 20
    assert step > expected

    with (found / "metrics.jsonl").open("a") as log:
        log.write('{"step": 19, "seco')  # a line of which the end was never written
    assert live(tmp_path, *typed) == 0
    assert same(found / "model.pt", tmp_path / "whole/model.pt")
    assert log_of(found) == log_of(tmp_path / "whole")
    assert sorted(os.listdir(found)) == sorted(os.listdir(tmp_path / "whole"))
