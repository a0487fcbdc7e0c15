"""The three scripts, whole, on the tiny preset; and what they say to wrong input."""

import copy
import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from conftest import ROOT, same, tensors_of
from PIL import Image

from minisiss import losses, presets, unlearning
from minisiss.data import digits, training_set
from minisiss.data.neighbours import nearest_kept
from minisiss.machine import command_line
from minisiss.machine.ranks import gradient_in_parts
from minisiss.metrics import forgetting
from minisiss.runs import checkpoint, loop
from minisiss.schedule import NoiseSchedule

TINY_TRAIN = ("--preset", "mnist-tiny", "--data-root", "bundled")
TINY_UNLEARN = ("--preset", "mnist-tiny")
TINY_EVAL = ("--samples", 4, "--sampling-steps", 2, "--draws", 2, "--memory-timesteps", 500)
METHODS = ["siss", "siss_no_is", "naive_deletion", "neggrad", "erasediff", "retrack", "unseen"]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_train_unlearn_eval_one_after_the_other_as_commands(tmp_path):
    def command(*arguments):
        environment = {**os.environ, "PYTHONWARNINGS": "error::DeprecationWarning:minisiss"}
        done = subprocess.run([sys.executable, *map(str, arguments)], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    command(ROOT / "train_ddpm.py", *TINY_TRAIN)
    assert sorted(os.listdir(tmp_path / "runs/train-1")) == ["config.json", "inputs.json", "metrics.jsonl", "model.pt", "samples-000020.png"]

    said = command(ROOT / "unlearn.py", *TINY_UNLEARN, "--checkpoint", "runs/train-1/model.pt")
    run = tmp_path / "runs/siss-1"
    assert sorted(os.listdir(run)) == ["before_after.png", "config.json", "forgetting.gif", "inputs.json", "memory.png", "memory_by_step.png", "metrics.jsonl", "model.pt"]
    assert said.startswith("forgetting T-shirt by siss: 6 steps of 8 images, on cpu in ") and "before_after.png" in said
    assert "no T-shirt among 8 samples (0 before). 6 steps took " in said
    with Image.open(run / "forgetting.gif") as film:
        assert film.n_frames == 3  # the looks at steps 0, 3 and 6
    python, *following = shlex.split(said.split("next: ")[1])
    assert python == "python"
    assert json.loads((run / "config.json").read_text())["lam"] == 0.5
    figures = next(line for line in lines(run / "metrics.jsonl") if "c" in line)
    assert {"ess_keep", "ess_forget", "overlap", "norm_keep", "norm_forget", "c", "loss_keep", "loss_forget"} <= set(figures)

    said = command(*following, *TINY_EVAL)
    assert "95% interval" in said and re.search(r"\| +4 \| +0.00% \(0.00% to 48.99%\) \|", said)  # of 4 samples
    assert (tmp_path / "runs/eval-1/samples.png").exists()
    results = json.loads((tmp_path / "runs/eval-1/results.json").read_text())
    (found,) = results["runs"]
    assert found["samples"] == 4 and "memory_500" in found


# No number here is a default, or another's.
NUMBERS = {"lam": 0.3, "grad_ratio": 0.7, "erasediff_eta": 0.9, "retrack_weight": 0.2, "neighbours": 3, "unseen_weight": 7.0}
FLAGS = ("--steps", 2, "--batch-size", 4, "--lr", 0.01, "--seed", 5, "--precision", "fp32")


@pytest.mark.parametrize(
    "method, draw_x, numbers, ema",
    [*((method, "rest", {}, 0.25) for method in METHODS), ("siss", "all", {"superfactor": 2.0, "grad_ratio": None}, 0)],
    ids=[*METHODS, "siss, x ~ X, s, the last weights"],
)
def test_a_run_takes_the_steps_that_its_flags_say(method, draw_x, numbers, ema, script, tiny_checkpoint, tmp_path):
    """The loop again, by hand: bit for bit, so that a set drawn from, a number or a step's seed cannot be another."""
    read = unlearning.METHODS[method].reads  # others are refused
    numbers = {name: value for name, value in (NUMBERS | numbers).items() if name in read}
    typed = [part for name, value in numbers.items() if value is not None for part in (f"--{name.replace('_', '-')}", value)]
    typed += ["--draw-x", "all"] if draw_x == "all" else []  # where nothing is typed, x ~ X∖A
    quick = ("--ema", ema, "--samples", 0, "--draws", 1, "--memory-timesteps", 500)
    status, _, error = script("unlearn", *TINY_UNLEARN, "--checkpoint", tiny_checkpoint, "--method", method, *FLAGS, *typed, *quick)
    assert (status, error) == (0, "")
    run = tmp_path / f"runs/{method}-1"
    assert checkpoint.load(run / "model.pt").made_by["settings"]["method"] == method

    base, data, settings = checkpoint.load(tiny_checkpoint), training_set.mnist_with_tshirt("bundled"), unlearning.Settings(**numbers)
    model, average, row = base.model, copy.deepcopy(base.model).requires_grad_(False), unlearning.METHODS[method]
    optimizer, near = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True), nearest_kept(data, 3) if method == "retrack" else None
    old = copy.deepcopy(base.model)
    for step in (0, 1):
        batch = unlearning.draw_batch(data, 4, base.schedule, training_set.step_generator(5, step, "cpu"), draw_x, near)
        unlearning.step(row, row.terms(model, batch, base.schedule, settings, old=old), optimizer, settings, gradient_of=gradient_in_parts)
        for mean, value in zip(average.parameters(), model.parameters(), strict=True):
            mean.lerp_(value, 1 - ema)
    found, originals = tensors_of(run / "model.pt"), data.measured(1)[1]
    _, back = forgetting.noise_and_denoise(average, base.schedule, originals, 500, 5)
    first, last = (line["memory"] for line in lines(run / "metrics.jsonl") if "memory" in line)
    assert last == pytest.approx(forgetting.similarity(back, originals).mean().item(), abs=1e-6) != first  # it is the average that is looked at
    for kind, ours in (("weights", model), ("ema", average)):
        assert all(torch.equal(found[kind, name], value) for name, value in ours.state_dict().items())


def test_a_resumed_run_may_restate_a_default_that_its_method_ignores(script, tiny_checkpoint):
    quick = ("--samples", 0, "--draws", 1, "--memory-timesteps", 500)
    started = (*TINY_UNLEARN, "--checkpoint", tiny_checkpoint, "--method", "siss_no_is", *quick, "--steps", 1, "--out", "a")
    assert script("unlearn", *started)[0] == 0
    assert script("unlearn", "--resume", "a", "--steps", 2, "--lam", 0.5)[0] == 0


@pytest.mark.parametrize("preset", presets.PRESETS)
def test_every_preset_has_every_method_with_its_numbers_and_else_the_defaults(preset, monkeypatch):
    unlearn, fields = importlib.import_module("unlearn"), unlearning.Settings.__dataclass_fields__
    for method in METHODS:
        monkeypatch.setattr(sys, "argv", ["unlearn.py", "--preset", preset, "--method", method])
        said = presets.PRESETS[preset]["unlearn"] | presets.PRESETS[preset].get(f"unlearn {method}", {})
        args = unlearn.parse_arguments()
        numbers = {name: value for name, value in said.items() if name in fields}
        assert command_line.method_of(args, unlearning) == (unlearning.METHODS[method], unlearning.Settings(**numbers))
        # What else the method is: x ~ X∖A and the last weights, where the preset does not say otherwise.
        assert (args.draw_x, args.ema) == (said.get("draw_x", "rest"), said.get("ema", 0.0))


def test_a_training_takes_the_steps_that_its_flags_say(script, tmp_path):
    flags = ("--steps", 2, "--batch-size", 4, "--lr", 0.01, "--warmup", 4, "--ema", 0.15, "--seed", 5, "--precision", "fp32")
    assert script("train_ddpm", *TINY_TRAIN, *flags, "--out", "a")[0] == 0
    config = dict(vars(checkpoint.load(tmp_path / "a/model.pt").model.config), seed=5, checkpoint_activations=False, data="mnist", init="none")
    model, schedule, images = checkpoint.untrained(Namespace(**config)), NoiseSchedule.linear(), training_set.mnist_with_tshirt("bundled").images
    average, optimizer = copy.deepcopy(model).requires_grad_(False), torch.optim.AdamW(model.parameters(), fused=True)
    # A quarter of the peak, then half of it and half-way down the cosine; the average forgets the untrained weights fast.
    for step, (rate, decay) in enumerate([(0.0025, 0.1), (0.0025, 0.15)]):
        optimizer.param_groups[0]["lr"], generator = rate, training_set.step_generator(5, step, "cpu")
        x = training_set.draw(images, 4, generator)
        timesteps = torch.randint(1000, (4,), generator=generator)
        losses.epsilon_matching(model, x, timesteps, torch.randn(x.shape, generator=generator), schedule).per_image().mean().backward()
        unlearning.descend(optimizer, {})
        for mean, value in zip(average.parameters(), model.parameters(), strict=True):
            mean.lerp_(value, 1 - decay)
    found = tensors_of(tmp_path / "a/model.pt")
    for kind, ours in (("weights", model), ("ema", average)):
        assert all(torch.allclose(found[kind, name], value, rtol=1e-5, atol=1e-7) for name, value in ours.state_dict().items())


def test_a_loss_of_ones_own_is_the_readmes_function_and_line(script, tiny_checkpoint, tmp_path, monkeypatch):
    example = re.search("```python\n(.*?)```", (ROOT / "minisiss/README.md").read_text(), re.DOTALL)[1]
    function, row = example.split("# minisiss/unlearning.py, in METHODS\n")
    exec(function, vars(losses))
    (name, method), = eval(f"{{{row}}}", vars(unlearning)).items()
    monkeypatch.setitem(unlearning.METHODS, name, method)
    status, _, _ = script("unlearn", *TINY_UNLEARN, "--method", name, "--checkpoint", tiny_checkpoint)
    assert status == 0
    assert not same(tmp_path / f"runs/{name}-1/model.pt", tiny_checkpoint)
    del losses.mine


def test_the_pictures_have_a_row_for_each_thing_they_compare(script, tiny_checkpoint, tmp_path):
    script("unlearn", *TINY_UNLEARN, "--checkpoint", tiny_checkpoint, "--memory-timesteps", 100, 500)
    side = 3 * 28 + 4
    assert Image.open(tmp_path / "runs/siss-1/memory.png").height > 7 * side  # the T-shirt; noised, before and after, twice
    picture = Image.open(tmp_path / "runs/siss-1/before_after.png")
    assert picture.width > 8 * side and picture.height > 2 * side


def test_the_next_run_gets_the_next_number(script, tiny_checkpoint, tmp_path):
    for _ in range(2):
        script("eval", *TINY_EVAL, "--checkpoint", tiny_checkpoint)
    assert sorted(os.listdir(tmp_path / "runs")) == ["eval-1", "eval-2"]


def test_training_without_the_forget_set_never_sees_it(script, tmp_path, monkeypatch):
    seen, draw = [], training_set.draw_indices
    monkeypatch.setattr(training_set, "draw_indices", lambda images, *rest: seen.append(len(images)) or draw(images, *rest))
    for name, flags in (("with", ()), ("without", ("--exclude-forget",))):
        script("train_ddpm", *TINY_TRAIN, "--steps", 2, "--out", name, *flags)
    assert set(seen[:2]) == {10_100} and set(seen[2:]) == {10_000}


def test_every_value_of_a_preset_can_be_overridden(script, tmp_path):
    status, _, error = script("train_ddpm", *TINY_TRAIN, "--steps", 1, "--channels", 4, 8, 8, "--norm-groups", 2, "--attention-levels", 1, "--head-channels", 2, "--out", "a")
    assert (status, error) == (0, "")
    config = checkpoint.load(tmp_path / "a/model.pt").model.config
    assert (config.channels, config.attention_levels, config.head_channels) == ((4, 8, 8), (1,), 2)


def with_signal(number, step, stepped=loop.Loop.stepped):
    """`Loop.stepped` for a run that is sent a signal while it takes this step."""
    return lambda run: (run.state.step == step - 1 and os.kill(os.getpid(), number), stepped(run))


def test_a_training_that_is_stopped_and_resumed_equals_one_that_is_not(script, tmp_path, monkeypatch):
    arguments = (*TINY_TRAIN, "--steps", 60, "--batch-size", 2)
    assert script("train_ddpm", *arguments, "--out", "whole")[0] == 0
    for flags, number, step in (((*arguments, "--out", "stopped"), signal.SIGINT, 30), (("--resume", "stopped"), signal.SIGTERM, 52)):
        with monkeypatch.context() as patch:
            patch.setattr(loop.Loop, "stepped", with_signal(number, step))
            status, said, _ = script("train_ddpm", *flags)
        assert status == 128 + number and f"stopped at step {step}; continue with: python" in said and "--resume stopped" in said
        assert checkpoint.load(tmp_path / "stopped/model.pt").training["step"] == step
    assert script("train_ddpm", "--resume", "stopped")[0] == 0
    assert same(tmp_path / "stopped/model.pt", tmp_path / "whole/model.pt")
    assert [line["step"] for line in lines(tmp_path / "stopped/metrics.jsonl")] == [50, 60]


def test_an_unlearning_that_is_stopped_and_resumed_equals_one_that_is_not(script, tiny_checkpoint, tmp_path, monkeypatch):
    arguments = (*TINY_UNLEARN, "--checkpoint", tiny_checkpoint)
    assert script("unlearn", *arguments, "--out", "whole")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "stepped", with_signal(signal.SIGINT, 1))
        status, said, _ = script("unlearn", *arguments, "--out", "stopped")
    assert status == 130 and "--resume stopped" in said
    assert script("unlearn", "--resume", "stopped")[0] == 0
    assert same(tmp_path / "stopped/model.pt", tmp_path / "whole/model.pt")


@pytest.mark.parametrize("flags", [("--superfactor", 9), ("--grad-ratio", 0.5, "--draw-x", "all")], ids=["one pass", "by norms"])
def test_a_ceiling_is_that_of_the_model_before_also_when_the_run_is_resumed(flags, script, tiny_checkpoint, tmp_path):
    arguments = (*TINY_UNLEARN, "--checkpoint", tiny_checkpoint, *flags, "--lr", 0.01, "--precision", "fp32")
    assert script("unlearn", *arguments, "--ceiling", 0.5, "--out", "whole")[0] == 0
    assert script("unlearn", *arguments, "--ceiling", 0.5, "--out", "stopped", "--steps", 3)[0] == 0
    assert script("unlearn", "--resume", "stopped", "--steps", 6)[0] == 0
    assert same(tmp_path / "stopped/model.pt", tmp_path / "whole/model.pt")
    assert script("unlearn", *arguments, "--out", "without")[0] == 0
    assert not same(tmp_path / "without/model.pt", tmp_path / "whole/model.pt")
    base, data = checkpoint.load(tiny_checkpoint), training_set.mnist_with_tshirt("bundled")
    tau = forgetting.look_alike_loss(base.model, base.schedule, data)
    first, *rest = lines(tmp_path / "stopped/metrics.jsonl")
    assert first["ceiling"] == pytest.approx((0.5 * tau[50::100]).tolist(), rel=1e-4)
    assert not any("ceiling" in line for line in rest) and len(first["ceiling"]) == 10


def test_the_average_does_not_keep_the_history_of_all_steps(script, tiny_checkpoint, monkeypatch):
    lerp, remembered = torch._foreach_lerp_, []
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda averaged, *rest: (lerp(averaged, *rest), remembered.append(averaged[0].grad_fn)))
    assert script("train_ddpm", *TINY_TRAIN, "--steps", 2)[0] == 0
    assert script("unlearn", *TINY_UNLEARN, "--checkpoint", tiny_checkpoint, "--steps", 2, "--samples", 0)[0] == 0
    assert remembered == [None] * 4


def test_a_resumed_run_keeps_its_settings(script, tmp_path):
    assert script("train_ddpm", *TINY_TRAIN, "--steps", 2, "--out", "a")[0] == 0
    status, _, error = script("train_ddpm", "--resume", "a", "--lr", 5)
    assert status == 2 and "--lr 0.001" in error
    assert script("train_ddpm", "--resume", "a", "--steps", 3)[0] == 0
    assert checkpoint.load(tmp_path / "a/model.pt").training["step"] == 3


@pytest.mark.parametrize("name", ["train_ddpm", "unlearn"])
def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_checkpoint(name, script, tiny_checkpoint, tmp_path, monkeypatch):
    call, squared_error = iter(range(10**6)), losses.squared_error
    broken = lambda *arguments: squared_error(*arguments) * (float("nan") if torch.is_grad_enabled() and next(call) >= 7 else 1)  # noqa: E731
    monkeypatch.setattr(losses, "squared_error", broken)
    arguments = TINY_TRAIN if name == "train_ddpm" else (*TINY_UNLEARN, "--checkpoint", tiny_checkpoint, "--method", "naive_deletion", "--steps", 20)
    status, _, error = script(name, *arguments, "--save-every", 5, "--out", "a")
    assert status == 1 and "step 8" in error and error.count("\n") == 1 and "nan" in error
    kept = checkpoint.load(tmp_path / "a/model.pt")
    assert kept.training["step"] == 5 and all(p.isfinite().all() for p in kept.model.parameters())


def test_a_batch_in_which_hardly_an_image_counts_warns_once(script, tiny_checkpoint):
    status, said, _ = script("unlearn", *TINY_UNLEARN, "--checkpoint", tiny_checkpoint, "--batch-size", 1, "--steps", 20, "--samples", 0)
    assert status == 0 and said.count("warning") == 1 and "step 10: ess_keep is 1.0" in said
    _, said, _ = script("unlearn", *TINY_UNLEARN, "--checkpoint", tiny_checkpoint, "--batch-size", 16, "--steps", 10, "--samples", 0)
    assert "warning" not in said


@pytest.fixture
def no_network(monkeypatch):
    def fail(dataset):
        os.makedirs(dataset.raw_folder)  # as torchvision does before it tries
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz:\nno network")

    monkeypatch.setattr(digits.MNIST, "download", fail)


# What needs files; what the command line alone makes wrong is in test_command_line.py.
WRONG = [
    # script, arguments, words of the message
    ("unlearn", ("--checkpoint", "nowhere.pt"), ["nowhere.pt", "no such"]),
    ("unlearn", ("--checkpoint", "truncated.pt"), ["truncated.pt", "truncated"]),
    ("unlearn", ("--checkpoint", "foreign.pt"), ["foreign.pt", "not a minisiss checkpoint"]),
    ("unlearn", ("--checkpoint", "."), [".", "config.json"]),
    ("unlearn", ("--checkpoint", "rgb.pt"), ["--checkpoint", "3×28×28", "1×28×28"]),
    ("unlearn", ("--data-root", "nowhere"), ["--data-root nowhere", "MNIST/raw"]),
    ("unlearn", ("--out", "holds-a-run"), ["holds-a-run", "File exists"]),
    ("unlearn", ("--out", "foreign.pt"), ["foreign.pt", "File exists"]),
    ("unlearn", ("--out", "foreign.pt/run"), ["foreign.pt/run"]),
    ("unlearn", ("--memory-timesteps", "1000"), ["--memory-timesteps", "999"]),
    ("unlearn", ("--resume", "nowhere"), ["nowhere", "holds no run"]),
    ("unlearn", ("--method", "naive_deletion", "--ceiling", "1"), ["--ceiling 1", "naive_deletion has no use for it"]),
    ("unlearn", ("--method", "erasediff", "--ceiling", "1"), ["--ceiling 1", "erasediff has no use for it"]),
    ("unlearn", ("--method", "retrack", "--draw-x", "all"), ["--draw-x all", "retrack has no use for it"]),
    ("unlearn", ("--method", "neggrad", "--superfactor", "9"), ["--superfactor 9", "neggrad has no use for it"]),
    ("unlearn", ("--grad-ratio", "0.1"), ["--grad-ratio 0.1: --method unseen, the default of --preset mnist-small, has no use for it"]),
    ("unlearn", ("--superfactor=0",), ["--superfactor 0.0: --method unseen, the default of --preset mnist-small, has no use for it"]),
    ("unlearn", ("--method", "unseen", "--ceiling", "0"), ["--ceiling 0", "unseen has no use for it"]),
    ("unlearn", ("--method", "siss_no_is", "--lam", "0.2"), ["--lam 0.2", "siss_no_is has no use for it"]),
    ("unlearn", ("--method", "siss", "--neighbours", "3"), ["--neighbours 3", "siss has no use for it"]),
    ("train_ddpm", ("--data-root", "nowhere"), ["--data-root nowhere", "bundled"]),
    ("train_ddpm", (*TINY_TRAIN, "--image-size", "32"), ["--image-size"]),
    ("train_ddpm", (*TINY_TRAIN, "--out", "holds-a-run"), ["holds-a-run"]),
    ("train_ddpm", (*TINY_TRAIN, "--resume", "holds-a-run"), ["holds-a-run/config.json", "no"]),
    ("eval", ("--checkpoint", "nowhere.pt"), ["nowhere.pt"]),
    ("eval", ("--preset", "prompts"), ["--data prompts", "unlearn.py"]),
    ("eval", ("--out", "holds-a-run"), ["holds-a-run"]),
]


@pytest.mark.parametrize("name, arguments, words", WRONG, ids=[f"{row[0]} {' '.join(map(str, row[1]))}" for row in WRONG])
def test_wrong_input_is_one_line_and_status_2(name, arguments, words, script, no_network, tiny_checkpoint, tmp_path):
    (tmp_path / "truncated.pt").write_bytes(tiny_checkpoint.read_bytes()[:5000])
    torch.save({"state_dict": {}}, tmp_path / "foreign.pt")
    (tmp_path / "holds-a-run").mkdir()
    (tmp_path / "holds-a-run/config.json").write_text("{}")
    state = torch.load(tiny_checkpoint, weights_only=True)
    state["config"]["image_channels"] = 3
    for key, axis in (("conv_in.weight", 1), ("conv_out.weight", 0), ("conv_out.bias", 0)):
        state["weights"][key] = state["weights"][key].repeat_interleave(3, dim=axis)
    torch.save(state, tmp_path / "rgb.pt")
    before = sorted(os.listdir(tmp_path))

    if name != "train_ddpm" and "--checkpoint" not in arguments and "--resume" not in arguments:
        arguments = (*arguments, "--checkpoint", tiny_checkpoint)
    status, _, error = script(name, *arguments)
    assert status == 2 and error.count("\n") == 1 and "Traceback" not in error, error
    assert all(word in error for word in words), error
    left = [entry for entry in sorted(os.listdir(tmp_path)) if entry not in before]
    assert left == []
