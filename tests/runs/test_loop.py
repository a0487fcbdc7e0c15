"""Where a run begins, logs, saves and ends, at the boundaries: loops of five steps, each of which takes one second by a clock of ours."""

import copy
import itertools
import json
import os
import signal
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from conftest import same

from minisiss.errors import Diverged
from minisiss.machine.ranks import ALONE
from minisiss.runs import checkpoint, loop
from minisiss.schedule import NoiseSchedule
from minisiss.unet import UNet, UNetConfig


class Killed(Exception):
    """What ends a run without a word."""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run that logs every step and looks at the first and every second, as unlearn.py does; `at`: what happens after a step, by its number."""
    network = UNet(UNetConfig(image_size=4, channels=(4,), layers_per_block=1, attention_levels=(), norm_groups=2))
    monkeypatch.setattr(os, "fsync", lambda file: None)  # nothing here is about the disk
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=itertools.count(1).__next__))
    monkeypatch.chdir(tmp_path)

    def go(out, resume=False, steps=5, save_every=2, at=None):
        model = copy.deepcopy(network)
        average = copy.deepcopy(model).requires_grad_(False)
        state = loop.State(model, average, torch.optim.AdamW(model.parameters(), lr=0.1), NoiseSchedule.linear())
        args = Namespace(method="siss", out=out, resume=out if resume else None, steps=steps, save_every=save_every)
        with loop.Loop(args, "unlearn.py", state, ALONE, {}) as running:
            running.log({"look": state.step})
            for step in running:
                for parameter in model.parameters():
                    parameter.grad = torch.full_like(parameter, (-1.0) ** step)
                state.optimizer.step()
                torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 0.5)
                running.stepped()
                running.log({"norm": float(step)})
                if running.due(2):
                    running.log({"look": step + 1})
                if at and step + 1 in at:
                    at[step + 1](running)
        return running

    return go


def die(running):
    raise Killed


def diverge(running):
    raise FloatingPointError("loss is nan")


def ctrl_c(running):
    running.note(signal.SIGINT, None)


def log(out):
    with open(f"{out}/metrics.jsonl") as file:
        return [json.loads(line) for line in file]


def alike(a, b):
    """The same tensors, steps and seconds."""
    told = [(x.training["step"], x.training["seconds"], x.made_by["steps"], x.made_by["seconds"]) for x in map(checkpoint.load, (f"{a}/model.pt", f"{b}/model.pt"))]
    return told[0] == told[1] and same(f"{a}/model.pt", f"{b}/model.pt")


@pytest.mark.parametrize("dies_after, kept", [(1, 0), (2, 0), (3, 2), (4, 2), (5, 4)])
def test_a_killed_and_resumed_run_has_the_weights_the_log_and_the_seconds_of_one_that_was_not(dies_after, kept, run):
    """A step is logged before it is saved: of the step resumed from the lines are there, and what is past it is dropped."""
    run("whole")
    with pytest.raises(Killed):
        run("killed", at={dies_after: die})
    found = checkpoint.load("killed/model.pt")
    assert found.training["step"] == found.made_by["steps"] == found.made_by["seconds"] == kept and log("killed")[-1]["step"] == dies_after
    assert run("killed", resume=True).start == kept
    assert log("killed") == log("whole") and alike("killed", "whole")
    steps = [(line["step"], "look" in line) for line in log("whole")]
    assert steps == [(0, True), (1, False), (2, False), (2, True), (3, False), (4, False), (4, True), (5, False), (5, True)]
    assert [line["seconds"] for line in log("whole")] == [step for step, _ in steps]


@pytest.mark.parametrize("stops_in", [3, 4, 5])
def test_a_run_that_is_stopped_and_resumed_has_them_too(stops_in, run):
    """It is saved at the step that it stops after, whether that is due or not, or the last."""
    run("whole")
    stopped = run("stopped", at={stops_in - 1: ctrl_c})
    assert (stopped.status, stopped.saved) == (130, stops_in) and log("stopped")[-1]["step"] == stops_in
    assert run("stopped", resume=True).status == 0
    assert log("stopped") == log("whole") and alike("stopped", "whole")


def test_a_run_at_its_end_is_resumed_to_no_step_and_to_more(run):
    run("whole", steps=5)
    run("shorter", steps=3, save_every=3)
    before = log("shorter"), os.stat("shorter/model.pt").st_mtime_ns
    again = run("shorter", resume=True, steps=3)
    assert (again.start, again.state.step, again.status) == (3, 3, 0) and (log("shorter"), os.stat("shorter/model.pt").st_mtime_ns) == before
    run("shorter", resume=True, steps=5)
    # The look after what was the last step then is the one line more.
    assert [line for line in log("shorter") if line != {"step": 3, "seconds": 3.0, "look": 3}] == log("whole") and alike("shorter", "whole")


@pytest.mark.parametrize("save_every, saved", [(1, [0, 1, 2, 3, 4, 5]), (2, [0, 2, 4, 5]), (5, [0, 5]), (99, [0, 5])])
def test_it_saves_at_the_start_when_that_is_due_and_once_at_the_end(save_every, saved, run, monkeypatch):
    steps, save = [], checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *arguments: (steps.append(arguments[5]["step"]), save(*arguments)))
    run("whole", save_every=save_every)
    assert steps == saved
    with pytest.raises(Killed):
        run("killed", save_every=save_every, at={4: die})
    steps.clear()
    start = run("killed", save_every=save_every, resume=True).start
    assert steps == [step for step in saved if step > start or not start]


def test_a_loss_that_is_no_number_names_the_step_and_the_last_good_one_also_in_a_resumed_run(run):
    with pytest.raises(Killed):
        run("a", at={3: die})
    with pytest.raises(Diverged, match="step 4: loss is nan; a/model.pt holds step 2"):
        run("a", resume=True, at={3: diverge})  # before anything was saved
    with pytest.raises(Diverged, match="step 6: loss is nan; a/model.pt holds step 4"):
        run("a", resume=True, at={5: diverge})


def test_a_second_ctrl_c_ends_a_run_at_once_and_after_it_signals_are_what_they_were(run):
    kinds, seen = (signal.SIGINT, signal.SIGTERM), []
    before = [signal.getsignal(kind) for kind in kinds]

    def look(running):
        seen.append([signal.getsignal(kind) for kind in kinds])
        ctrl_c(running)
        seen.append(signal.getsignal(signal.SIGINT))

    running = run("a", at={2: look})
    assert seen == [[running.note] * 2, before[0]]
    assert [signal.getsignal(kind) for kind in kinds] == before
