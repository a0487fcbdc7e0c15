"""train_ddpm.py and unlearn.py: the steps they take, what they write, and resuming."""

import copy
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, log_of, same, tensors_of
from PIL import Image

from minisiss import beyond, losses, unlearning
from minisiss.lab import checkpoint, data, metrics
from minisiss.schedule import NoiseSchedule
from minisiss.unet import UNet, UNetConfig

CPU = torch.device("cpu")
SCHEDULE = NoiseSchedule.linear()
TRAIN = ("--preset", "mnist-tiny", "--data-root", "bundled")
QUICK = ("--samples", 0, "--draws", 1)
FLAGS = "--steps 2 --batch-size 4 --lr 0.01 --seed 5 --precision fp32 --out run".split()


@pytest.fixture
def unlearn(script, tiny_checkpoint):
    """Run unlearn.py on the tiny model: unlearn("--steps", 3) -> (status, stdout, stderr)."""
    return partial(script, "unlearn", "--preset", "mnist-tiny", "--checkpoint", tiny_checkpoint)


def assert_holds(path, model, average, equal):
    """The checkpoint holds these weights, those that take the steps and those averaged."""
    found = tensors_of(path)
    for kind, network in (("weights", model), ("average", average)):
        for name, value in network.state_dict().items():
            assert equal(found[kind, name], value), (kind, name)


def siss_with_s(model, old, digits):
    return partial(losses.siss, model, schedule=SCHEDULE, lam=0.3), [3.0, 1.75]  # c = 1 + s


def retrack(model, old, digits):
    options = {"schedule": SCHEDULE, "weight": 0.005, "nearest": digits.nearest}
    return partial(beyond.retrack, model, **options), [-1.0, -1.0]


def old_targets(model, old, digits):
    options = {"schedule": SCHEDULE, "lam": 0.3, "weight": 3.0, "old": old}
    return partial(beyond.old_targets, model, **options), [-1.0, -1.0]


STEPS = [  # the loss and c by hand, and flags that say the same. No number is a default.
    (siss_with_s, "all", "--method siss --lam 0.3 --superfactor 2 --subtract-until 0.8 --draw-x all"),
    (retrack, "rest", "--method retrack"),
    (old_targets, "rest", "--method old_targets --lam 0.3"),
]


@pytest.mark.parametrize("by_hand, draw_x, typed", STEPS, ids=[row[0].__name__ for row in STEPS])
def test_a_run_takes_the_steps_its_flags_say(by_hand, draw_x, typed, unlearn, tiny_unet):
    """The loop by hand: bit for bit, so no set, number, order or seed can be another one."""
    assert unlearn(*FLAGS, *typed.split(), *QUICK, "--ema", 0.25)[0] == 0
    digits = data.mnist_with_tshirt("bundled", CPU)
    model, average, old = copy.deepcopy(tiny_unet), copy.deepcopy(tiny_unet), tiny_unet
    average.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    loss, c = by_hand(model, old, digits)
    for number in (0, 1):  # s falls by the share of the steps; the rate is half the peak then
        generator = data.step_generator(5, number, CPU)
        batch = unlearning.draw_batch(digits, 4, SCHEDULE, generator, draw_x)
        optimizer.param_groups[0]["lr"] = (0.01, 0.005)[number]
        unlearning.step(loss, batch, c[number], optimizer)
        unlearning.update_average(average, model, 0.25, number)
    assert_holds("run/model.pt", model, average, torch.equal)


def test_siss_at_s_0_steps_as_naive_deletion(unlearn):
    """Where nothing is subtracted, λ is 0: no noisy image is made from a."""
    flags = (*QUICK, "--steps", 2, "--batch-size", 4, "--precision", "fp32")
    assert unlearn(*flags, "--superfactor", 0, "--out", "siss")[0] == 0
    assert unlearn(*flags, "--method", "naive_deletion", "--out", "naive")[0] == 0
    found, expected = tensors_of("siss/model.pt"), tensors_of("naive/model.pt")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=str(name))


@pytest.mark.parametrize("exclude", [[], ["--exclude-forget"]])
def test_a_training_takes_the_steps_its_flags_say(exclude, script, tmp_path):
    flags = ("--warmup", 4, "--ema", 0.15, *exclude)
    status, said, _ = script("train_ddpm", *TRAIN, *FLAGS, *flags)
    assert status == 0 and "unlearn.py --checkpoint run/model.pt" in said
    torch.manual_seed(5)
    model = UNet(UNetConfig(**TINY))
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0025, fused=True)
    digits = data.mnist_with_tshirt("bundled", CPU)
    draw_x = "rest" if exclude else "all"
    # A quarter of the peak; then half of it, half-way down the cosine. The decay rises.
    for number in (0, 1):
        generator = data.step_generator(5, number, CPU)
        batch = unlearning.draw_batch(digits, 4, SCHEDULE, generator, draw_x)
        optimizer.zero_grad()
        losses.naive_deletion(model, batch, SCHEDULE)[0].mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        unlearning.update_average(average, model, 0.15, number)
    near = partial(torch.allclose, rtol=1e-5, atol=1e-7)
    assert_holds("run/model.pt", model, average, near)
    records = ["config.json", "metrics.jsonl", "model.pt", "samples-000002.png"]
    assert sorted(os.listdir("run")) == records and log_of(tmp_path / "run")[-1]["step"] == 2
    Image.open("run/samples-000002.png").load()


def test_an_unlearning_writes_pictures_and_results(unlearn, tmp_path):
    status, said, _ = unlearn()
    run = tmp_path / "runs/siss-1"
    assert status == 0 and "eval.py runs/siss-1" in said and "runs/siss-1/before_after.png" in said
    records = ["config.json", "forgetting.gif", "metrics.jsonl", "model.pt", "results.json"]
    assert sorted(os.listdir(run)) == ["before_after.png", *records]
    Image.open(run / "before_after.png").load()
    assert Image.open(run / "forgetting.gif").n_frames == 4  # before, at steps 3 and 6, after
    looks = [figures["step"] for figures in log_of(run) if "memory" in figures]
    steps = [figures["step"] for figures in log_of(run) if "loss_keep" in figures]
    assert (looks, steps) == ([3, 6], [6])
    assert unlearn("--steps", 1, *QUICK)[0] == 0
    assert sorted(os.listdir(tmp_path / "runs")) == ["siss-1", "siss-2"]


def stripes(width):
    """A picture of black and white stripes, [28, 28] uint8."""
    return torch.arange(28, dtype=torch.uint8)[:, None].expand(28, 28) // width % 2 * 255


@pytest.fixture
def pictures(tmp_path):
    """A folder of five pictures, a.png to e.png."""
    (tmp_path / "pictures").mkdir()
    for width, name in enumerate("abcde", start=1):
        Image.fromarray(stripes(width).numpy()).save(tmp_path / f"pictures/{name}.png")
    return ("--data", "pictures", "--data-root", "pictures")


def test_every_picture_to_forget_is_measured(script, unlearn, pictures, tmp_path):
    """From training to results on a folder. One draw is too few for two pictures."""
    assert script("train_ddpm", "--preset", "mnist-tiny", *pictures, "--steps", 2)[0] == 0
    forget = ("--checkpoint", "runs/train-1", *pictures, "--forget", "b.png", "c.png")
    assert unlearn(*forget, "--draws", 1, "--out", "run")[2] == ""
    both = data.to_float(torch.stack([stripes(2), stripes(3)])[:, None]).unique(dim=0)
    average = checkpoint.load("run/model.pt").model
    back = metrics.noise_and_denoise(average, SCHEDULE, both, 500, seed=0)
    results = json.loads((tmp_path / "run/results.json").read_text())
    alike = metrics.similarity(back, both).mean().item()
    assert results["after"]["memory, t = 500"] == pytest.approx(alike, abs=1e-4)


def test_what_was_forgotten_before_is_warned_of(unlearn, pictures):
    few = (*pictures, *QUICK, "--steps", 1)
    assert unlearn(*few, "--forget", "b.png", "--out", "first")[2] == ""
    few_more = (*few, "--checkpoint", "first", "--forget", "c.png")
    _, _, error = unlearn(*few_more, "--out", "second")
    assert error.count("\n") == 1 and "b.png was forgotten before" in error
    assert checkpoint.load("second/model.pt").forgotten == ["b.png", "c.png"]
    assert unlearn(*few, "--checkpoint", "second", "--forget", "c.png", "b.png")[2] == ""


@pytest.fixture
def own_row(monkeypatch):
    """A loss of one's own, the row "mine" of the table: SISS, and in one step something happens."""

    def add(step, action):
        calls = itertools.count(1)

        def mine(model, batch, schedule, lam):
            if next(calls) == step:
                action()
            return losses.siss(model, batch, schedule, lam)

        row = unlearning.Method(mine, unlearning.c_of_superfactor, ("lam",), unlearning.S)
        monkeypatch.setitem(unlearning.METHODS, "mine", row)

    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    yield add
    signal.signal(signal.SIGHUP, before)


def send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)


STOPS = [(3, signal.SIGINT), (4, signal.SIGHUP), (6, signal.SIGTERM)]


@pytest.mark.parametrize("step, number", STOPS)
def test_a_stopped_unlearning_resumed_equals_a_whole_one(
        step, number, unlearn, script, own_row, tmp_path):
    """The signal comes in a step with a look, in one without, and in the last."""
    assert unlearn(*QUICK, "--out", "whole")[0] == 0
    own_row(step, partial(send, number))
    status, said, _ = unlearn(*QUICK, "--method", "mine", "--out", "stopped")
    assert status == 128 + number and f"stopped at step {step}" in said
    assert checkpoint.load("stopped/model.pt").made_by["steps"] == step
    handlers = [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)]
    assert handlers == [signal.default_int_handler, signal.SIG_DFL]
    assert script("unlearn", "--resume", "stopped")[0] == 0
    assert same(tmp_path / "stopped/model.pt", tmp_path / "whole/model.pt")
    assert log_of(tmp_path / "stopped") == log_of(tmp_path / "whole")


def test_a_second_ctrl_c_ends_it_at_once(unlearn, own_row, script):
    own_row(3, partial(send, signal.SIGINT, signal.SIGINT))
    status, said, error = unlearn(*QUICK, "--method", "mine", "--save-every", 2, "--out", "run")
    assert (status, said) == (130, "") and "interrupted" in error
    assert checkpoint.load("run/model.pt").made_by["steps"] == 2
    assert script("unlearn", "--resume", "run")[0] == 0


def test_nohup_keeps_a_run_going(unlearn, own_row):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    own_row(3, partial(send, signal.SIGHUP))
    assert unlearn(*QUICK, "--method", "mine")[0] == 0


def test_a_stopped_training_resumed_equals_a_whole_one(script, tmp_path):
    """As a command: SIGTERM comes once there is a bar, and the command that is printed goes on."""
    flags = (*TRAIN, "--steps", 60, "--batch-size", 2, "--seed", 3)
    assert script("train_ddpm", *flags, "--out", "whole")[0] == 0
    command = [sys.executable, str(ROOT / "train_ddpm.py"), *map(str, flags), "--out", "a run"]
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    options = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **options) as process:
        for line in process.stderr:
            if "/60" in line:
                break
        process.send_signal(signal.SIGTERM)
        said, error = process.communicate()
    assert process.returncode == 143, error
    stopped = checkpoint.load("a run/model.pt").made_by["steps"]
    assert f"stopped at step {stopped}" in said and 1 <= stopped < 60
    python, name, *arguments = shlex.split(said.split("to go on: ")[1])
    assert (python, name) == ("python", command[1])
    assert script("train_ddpm", *arguments)[0] == 0
    assert same(tmp_path / "a run/model.pt", tmp_path / "whole/model.pt")
    assert log_of(tmp_path / "a run") == log_of(tmp_path / "whole")
    assert [figures["step"] for figures in log_of(tmp_path / "whole")] == [50, 60]


def test_other_data_does_not_resume_a_run(unlearn, script, pictures, tmp_path):
    assert unlearn(*pictures, *QUICK, "--forget", "b.png", "--out", "run")[0] == 0
    before = (tmp_path / "run/model.pt").read_bytes()
    (tmp_path / "pictures/d.png").rename(tmp_path / "pictures/f.png")
    status, _, error = script("unlearn", "--resume", "run")
    assert status == 2 and error.count("\n") == 1 and "other pictures" in error
    assert (tmp_path / "run/model.pt").read_bytes() == before
    (tmp_path / "pictures/f.png").rename(tmp_path / "pictures/d.png")
    status, _, error = script("unlearn", "--resume", "run", "--checkpoint", "bundled")
    assert status == 2 and error.count("\n") == 1
    (tmp_path / "pictures").rename(tmp_path / "moved")  # the same data, in another place
    assert script("unlearn", "--resume", "run", "--data-root", "moved")[0] == 0


@pytest.mark.parametrize("name", ["unlearn", "train_ddpm"])
def test_a_loss_of_nan_stops_a_run(name, script, tiny_checkpoint):
    """One step at this rate, and the next has numbers that float32 does not hold."""
    start = TRAIN
    if name == "unlearn":
        start = ("--preset", "mnist-tiny", "--checkpoint", tiny_checkpoint, "--method", "neggrad")
    status, said, error = script(name, *start, "--lr", 1e30, "--steps", 9, "--out", "run")
    assert (status, said, error.count("\n")) == (1, "", 1)
    assert "step 2: " in error and "the last good checkpoint is run/model.pt" in error
    assert checkpoint.load("run/model.pt").made_by["steps"] == 0


def test_a_model_without_finite_output_is_not_measured(script, tiny_checkpoint):
    """Its weights are finite, but its samples would be black, and count as no T-shirts."""
    flags = ("--preset", "mnist-tiny", "--checkpoint", tiny_checkpoint, "--method", "neggrad")
    look = ("--evaluate-every", 1, "--steps", 1, "--save-every", 1, "--out", "run")
    status, _, error = script("unlearn", *flags, "--lr", 1e15, *look)
    assert (status, error.count("\n")) == (1, 1) and "memory is nan" in error
    assert checkpoint.load("run/model.pt").made_by["steps"] == 0
    assert "results.json" not in os.listdir("run")
    assert "NaN" not in Path("run", "metrics.jsonl").read_text()  # it is no JSON
