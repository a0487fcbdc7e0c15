"""Two ranks make the steps of one, to rounding. All that they do here is one launch of torchrun."""

import copy
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import log_of, tensors_of
from torch.nn.utils import parameters_to_vector

from minisiss import losses, unlearning
from minisiss.lab import checkpoint, cli, data, machine
from minisiss.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule.linear()
FLAGS = ("--preset", "mnist-tiny", "--precision", "fp32", "--batch-size", 6, "--steps", 6)
TRAIN = (*FLAGS, "--data-root", "bundled")
UNLEARN = (*FLAGS, "--method", "mine", "--samples", 2)


def steps_of_siss(base):
    """Weights after three steps of SISS with each kind of c, and the figures of the last step."""
    digits = data.mnist_with_tshirt("bundled", torch.device("cpu"))
    rule = partial(unlearning.ratio_of_norms, grad_ratio=0.5)
    found = {}
    for name, draw_x, c in (("by norms", "rest", rule), ("s = 2", "all", 3.0)):
        model, generator = copy.deepcopy(base), torch.Generator().manual_seed(0)
        loss = partial(losses.siss, model, schedule=SCHEDULE, lam=0.5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            batch = unlearning.draw_batch(digits, 6, SCHEDULE, generator, draw_x)
            figures = unlearning.step(loss, batch, c, optimizer, parts=2)
        numbers = {name: figure.item() for name, figure in figures.items()}
        found[name] = parameters_to_vector(model.parameters()).detach(), numbers
    return found


def add_mine():
    """The method "mine": SISS, and of two ranks the second gets a signal in its third step."""
    calls = []

    def mine(model, batch, schedule, lam):
        calls.append(len(batch.timesteps))
        assert calls[-1] == 6 // machine.size()  # each rank computes its share
        if machine.rank() == 1 and len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return losses.siss(model, batch, schedule, lam)

    row = unlearning.Method(mine, unlearning.ratio_of_norms, ("lam",), ("grad_ratio",))
    unlearning.METHODS["mine"] = row


def on_two_ranks(base):
    """What each of the ranks does. All of it is in one group: to meet again takes torchrun anew."""
    machine.start("cpu")
    leave = dist.destroy_process_group
    dist.init_process_group = dist.destroy_process_group = lambda *arguments, **options: None
    torch.save(steps_of_siss(checkpoint.load(base).model), f"steps-{machine.rank()}.pt")
    add_mine()
    unlearned = ("unlearn", *UNLEARN, "--checkpoint", base, "--out", "begun-by-two")
    statuses = []
    for name, *typed in (("train_ddpm", *TRAIN, "--out", "trained-by-two"), unlearned):
        sys.argv = [f"{name}.py", *map(str, typed)]
        with pytest.raises(SystemExit) as stopped:
            cli.run(__import__(name).main)
        statuses.append(stopped.value.code)
    Path(f"status-{machine.rank()}").write_text(str(statuses))
    leave()


if __name__ == "__main__":
    on_two_ranks(sys.argv[1])


@pytest.fixture(scope="module")
def launch(tiny_checkpoint, tmp_path_factory):
    """The directory in which two ranks did all this, and what they said."""
    directory = tmp_path_factory.mktemp("ranks")
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    command = [sys.executable, *torchrun, __file__, str(tiny_checkpoint)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    options = {"cwd": directory, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run(command, timeout=120, **options)
    assert done.returncode == 0, done.stderr
    return directory, done.stdout


@pytest.fixture
def alone(launch, script, monkeypatch):
    """A script in one process, in the directory of the launch."""
    monkeypatch.chdir(launch[0])
    add_mine()
    yield script
    del unlearning.METHODS["mine"]


def assert_same_end(a, b):
    """The same weights, averaged ones too, to a thousandth of what the steps change."""
    ours, theirs = (parameters_to_vector(tensors_of(run / "model.pt").values()) for run in (a, b))
    assert (ours - theirs).norm() < 1e-6 * theirs.norm()


def test_two_ranks_make_the_steps_of_one(launch, tiny_unet):
    directory, _ = launch
    start = parameters_to_vector(tiny_unet.parameters()).detach()
    found = [torch.load(directory / f"steps-{rank}.pt") for rank in (0, 1)]
    for name, (weights, figures) in steps_of_siss(tiny_unet).items():
        assert torch.equal(found[0][name][0], found[1][name][0])
        assert (found[0][name][0] - weights).norm() < 1e-5 * (weights - start).norm()
        assert found[0][name][1] == found[1][name][1] == pytest.approx(figures, rel=1e-4)
        assert ("norm_keep" in figures) == (name == "by norms")


def test_two_ranks_train_as_one_does(launch, alone):
    directory, said = launch
    assert alone("train_ddpm", *TRAIN, "--out", "trained-by-one")[0] == 0
    assert_same_end(directory / "trained-by-two", directory / "trained-by-one")
    assert said.count("done: trained-by-two") == 1  # rank 0 speaks for all


def test_a_run_that_two_ranks_began_one_ends(launch, alone, tiny_checkpoint):
    directory, said = launch
    assert [(directory / f"status-{rank}").read_text() for rank in (0, 1)] == 2 * ["[0, 143]"]
    assert said.count("stopped at step 3") == 1
    begun, whole = directory / "begun-by-two", directory / "whole"
    assert checkpoint.load(begun / "model.pt").made_by["steps"] == 3
    assert alone("unlearn", "--resume", "begun-by-two")[0] == 0
    assert alone("unlearn", *UNLEARN, "--checkpoint", tiny_checkpoint, "--out", "whole")[0] == 0
    assert_same_end(begun, whole)
    for ours, theirs in zip(log_of(begun), log_of(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert sorted(os.listdir(begun)) == sorted(os.listdir(whole))
