"""Two ranks do what one does, to rounding; they speak once; and a rank that fails ends the run and harms no checkpoint.

`launch` starts the ranks as torchrun would, but by forking one process that has imported torch, and they are joined by gloo.
torchrun itself starts those of the benchmark.
"""

import json
import multiprocessing
import os
import signal
import socket
import sys
from dataclasses import dataclass
from functools import partial, partialmethod
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch
from conftest import ROOT, few_steps, make_run, memorise, randomise
from PIL import Image

from minisiss import errors, losses, presets, sampling, unlearning
from minisiss.data import training_set
from minisiss.data.neighbours import nearest_kept
from minisiss.errors import UserError
from minisiss.machine import command_line, device, ranks
from minisiss.metrics import samples
from minisiss.report import evaluation, prompted
from minisiss.runs import checkpoint
from minisiss.schedule import NoiseSchedule
from minisiss.study import bench
from minisiss.unet import UNet, UNetConfig

SCHEDULE = NoiseSchedule.linear()
FLAGS = {
    "train_ddpm": ("--preset", "mnist-tiny", "--data-root", "bundled", "--precision", "fp32", "--steps", 10, "--save-every", 4),
    "unlearn": ("--preset", "mnist-tiny", "--precision", "fp32", "--steps", 10, "--save-every", 4, "--checkpoint", "base.pt", "--samples", 2, "--memory-timesteps", 20, "--evaluate-every", 99),
}


@dataclass
class Rank:
    status: int
    out: str
    err: str
    result: object


def launch(folder: Path, function, *arguments, fail_together: bool = True, **options) -> list[Rank]:
    """Call a function of this file on two ranks, in a directory. One that fails ends the other, as under torchrun."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision.utils", "einops", "tqdm", "pytest"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [context.Process(target=run_rank, args=(number, port, folder, partial(function, *arguments, **options))) for number in (0, 1)]
    for number, rank in enumerate(ranks):
        for stream in ("out", "err"):
            (folder / f"{stream}-{number}").write_text("")
        rank.start()
    while running := [rank.sentinel for rank in ranks if rank.exitcode is None]:
        hangs = not wait(running, timeout=300)
        if hangs or (fail_together and any(rank.exitcode for rank in ranks)):
            for rank in ranks:
                rank.kill() if hangs else rank.terminate()
    results = [torch.load(path) if (path := folder / f"result-{number}").exists() else None for number in (0, 1)]
    said = [[(folder / f"{stream}-{number}").read_text() for stream in ("out", "err")] for number in (0, 1)]
    return [Rank(rank.exitcode, *said[number], results[number]) for number, rank in enumerate(ranks)]


def run_rank(number, port, folder, function):
    os.environ |= {"RANK": str(number), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    os.chdir(folder)
    sys.stdout, sys.stderr = (open(f"{stream}-{number}", "w", buffering=1) for stream in ("out", "err"))
    torch.set_num_threads(1)
    command_line.time.sleep = lambda seconds: signal.pause()  # a rank that waits for rank 0 to speak is ended, however slow rank 0 is
    torch.save(function(), f"result-{number}")


def run_script(name, *arguments, on_rank_1=None):
    """Run a script, on rank 1 with something changed first, and where it can neither write nor do more than its share."""
    few_steps(setattr)
    if errors.rank() == 1:
        os.replace = Image.Image.save = no_writing
        losses.Term.per_image = partialmethod(at_most_half, losses.Term.per_image)
        if on_rank_1:
            on_rank_1()
    if name == "train_ddpm":
        no_pictures()
    sys.argv = [f"{name}.py", *map(str, arguments)]
    command_line.run(__import__(name).main)


def at_most_half(term, per_image, images=None):
    """`Term.per_image` where it is asked for certain images, as in a step of unlearning."""
    assert images is None or len(images) <= len(term.weight) / 2
    return per_image(term, images)


def no_writing(*arguments, **options):
    raise AssertionError("only rank 0 writes")


def no_pictures(patch=setattr):
    """Instead of the samples that train_ddpm.py draws at its end."""
    patch(sampling, "sample", lambda model, schedule, shape, **options: torch.zeros(shape))


def in_step_6(action, patch=setattr):
    """Have something happen in a script's sixth step."""
    step_generator = training_set.step_generator
    patch(training_set, "step_generator", lambda seed, step, device: (action() if step == 5 else None, step_generator(seed, step, device))[1])


def stop():
    os.kill(os.getpid(), signal.SIGTERM)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def fail():
    raise RuntimeError("trouble of this rank alone")


def complain():
    command_line.time.sleep = lambda seconds: None
    raise UserError("what this rank alone can see")


def diverge():
    squared_error = losses.squared_error
    losses.squared_error = lambda *arguments: squared_error(*arguments) * float("nan")


def tiny_model():
    return randomise(UNet(UNetConfig(**presets.PRESETS["mnist-tiny"]["unet"])))


def work_together():
    """What ranks share and what they must agree in, computed on all of them or, without torchrun, on one."""
    world = ranks.start(torch.device("cpu"), batch_size=4)
    images = torch.randint(0, 256, (12, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = {}
    for name, method in unlearning.METHODS.items():
        model = tiny_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        # In batches of 2 a rank, or both, may have nothing to do for a term of SISS.
        for step, size in enumerate((6, 2, 6, 2, 6)):
            pictures = training_set.TrainingSet(images, 3, world=world)
            near, generator = nearest_kept(pictures, 2), torch.Generator().manual_seed(step)
            batch = unlearning.draw_batch(pictures, size, SCHEDULE, generator, neighbours=near)
            settings, gradient = unlearning.Settings(), partial(ranks.gradient_in_parts, micro_batch=2, world=world)
            figures = unlearning.step(method, method.terms(model, batch, SCHEDULE, settings, old=tiny_model()), optimizer, settings, gradient_of=gradient)
            found[name, step] = {key: value.item() for key, value in figures.items()}
        found[name] = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    options = dict(seed=3, batch_size=3, steps=2, eta=1.0, world=world)
    found["samples"] = samples.draw_samples(tiny_model(), SCHEDULE, 10, (1, 28, 28), **options)
    found["share"] = [part.tolist() for part in map(world.share, torch.arange(10).reshape(2, 5))]
    found["drawn"] = training_set.draw(images, 6, torch.Generator().manual_seed(0), world)
    found["max"], found["mean"] = world.max(world.rank), world.mean(torch.tensor(1.0 + world.rank)).item()
    found["on rank 0"] = world.on_rank_0(lambda: world.rank)
    order = []
    found["rank 0 first"] = world.rank_0_first(lambda: (order.append(world.rank), Path("first").exists(), Path("first").touch())[1])
    try:
        world.on_rank_0(refuse)
    except UserError as error:
        found["refusal"] = str(error)
    return found


def refuse():
    raise UserError("disk full")


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    return [rank.result for rank in launch(tmp_path_factory.mktemp("together"), work_together)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("alone"))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as on the ranks, and so the same rounding
        try:
            return work_together()
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("method", unlearning.METHODS)
def test_two_ranks_make_the_steps_of_one(method, together, alone):
    start = torch.nn.utils.parameters_to_vector(tiny_model().parameters())
    moved = (alone[method] - start).norm()
    assert moved > 0.01  # unseen begins where its teacher is
    assert torch.equal(together[0][method], together[1][method])
    assert (together[0][method] - alone[method]).norm() < 1e-5 * moved
    for step in range(5):
        assert together[0][method, step] == together[1][method, step] == pytest.approx(alone[method, step], rel=1e-3, abs=1e-6)


def test_samples_come_in_the_order_and_with_the_noise_of_one_rank(together, alone):
    assert len(alone["samples"]) == 10 and alone["samples"].float().std() > 0
    for rank in together:
        assert torch.equal(rank["samples"], alone["samples"])


def test_ranks_share_and_agree(together, alone):
    assert alone["share"] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert [rank["share"] for rank in together] == [[[0, 1, 2], [5, 6, 7]], [[3, 4], [8, 9]]]
    assert [len(rank["drawn"]) for rank in together] == [3, 3] and torch.equal(torch.cat([rank["drawn"] for rank in together]), alone["drawn"])
    assert (alone["max"], alone["mean"], alone["on rank 0"]) == (0, 1.0, 0)
    assert all((rank["max"], rank["mean"], rank["on rank 0"]) == (1, 1.5, 0) for rank in together)
    assert [rank["rank 0 first"] for rank in together] == [False, True]
    assert all(found["refusal"] == "disk full" for found in (alone, *together))


def weights(path):
    """The weights in a checkpoint, averaged ones too, as one vector."""
    state = torch.load(path, weights_only=True)
    return torch.cat([value.flatten() for part in (state["weights"], state["ema"] or {}) for value in part.values()])


@pytest.mark.parametrize("name", FLAGS)
def test_a_run_that_two_ranks_began_one_continues_and_the_other_way_round(name, script, tmp_path, tiny_checkpoint, monkeypatch):
    (tmp_path / "base.pt").write_bytes(tiny_checkpoint.read_bytes())
    if name == "train_ddpm":
        no_pictures(monkeypatch.setattr)
    assert script(name, *FLAGS[name], "--out", "whole")[0] == 0
    with monkeypatch.context() as patch:
        in_step_6(stop, patch.setattr)
        assert script(name, *FLAGS[name], "--out", "one-two")[0] == 143
    # Only one of the ranks gets the signal.
    ranks = launch(tmp_path, run_script, name, *FLAGS[name], "--out", "two-one", on_rank_1=partial(in_step_6, stop), fail_together=False)
    assert [rank.status for rank in ranks] == [143, 143], ranks
    assert "stopped at step 6" in ranks[0].out and ranks[1].out == ranks[1].err == ""
    assert checkpoint.load(tmp_path / "two-one/model.pt").training["step"] == 6
    half = weights(tmp_path / "two-one/model.pt")

    assert script(name, "--resume", "two-one")[0] == 0
    ranks = launch(tmp_path, run_script, name, "--resume", "one-two")
    assert [rank.status for rank in ranks] == [0, 0], ranks
    assert "next: python eval.py" in ranks[0].out and ranks[1].out == ranks[1].err == ""
    whole = weights(tmp_path / "whole/model.pt")
    moved = (whole - half).norm()
    for other in ("two-one", "one-two"):
        assert (weights(tmp_path / other / "model.pt") - whole).norm() < 1e-3 * moved
        assert sorted(os.listdir(tmp_path / other)) == sorted(os.listdir(tmp_path / "whole"))
        lines, expected = (list(map(json.loads, (tmp_path / run / "metrics.jsonl").read_text().splitlines())) for run in (other, "whole"))
        for line, one in zip(lines[-3:], expected[-3:], strict=True):
            assert {**line, "seconds": 0} == pytest.approx({**one, "seconds": 0}, rel=1e-2)
    assert sorted(os.listdir(tmp_path)) == sorted(["base.pt", "whole", "one-two", "two-one", "out-0", "out-1", "err-0", "err-1"])


def test_two_ranks_train_on_prompts_as_one_does(script, tmp_path, monkeypatch):
    no_pictures(monkeypatch.setattr)
    tiny = ("--channels", 8, 16, "--norm-groups", 4, "--init", "none", "--batch-size", 8, "--steps", 4, "--lr", 0.01, "--precision", "fp32")
    flags = ("--preset", "prompts", "--data-root", "bundled", *tiny)
    assert script("train_ddpm", *flags, "--out", "one")[0] == 0
    ranks = launch(tmp_path, run_script, "train_ddpm", *flags, "--out", "two")
    assert [rank.status for rank in ranks] == [0, 0], ranks
    one, two = (checkpoint.load(tmp_path / f"{name}/model.pt") for name in ("one", "two"))
    words, others = one.model.prompt[0].weight, two.model.prompt[0].weight
    moved = (words - words[-50:].mean()).norm()
    assert (words - others).norm() < 1e-4 * moved
    assert (weights(tmp_path / "one/model.pt") - weights(tmp_path / "two/model.pt")).norm() < 1e-4 * weights(tmp_path / "one/model.pt").norm()


def run_prompted(limits, *arguments):
    for name, value in limits.items():
        setattr(prompted, name, value)
    run_script("unlearn", *arguments)


def test_two_ranks_forget_a_prompt_as_one_does(script, tmp_path, prompted_unet, monkeypatch):
    picture, limits = memorise(prompted_unet, "a thin upright four ines")
    checkpoint.save(tmp_path / "base.pt", prompted_unet, SCHEDULE, {}, memorised={"a thin upright four by ines": picture})
    for name, value in limits.items():
        monkeypatch.setattr(prompted, name, value)
    flags = ("--preset", "prompts", "--guidance", 1, "--checkpoint", "base.pt", "--steps", 4, "--batch-size", 4, "--sampling-steps", 3, "--precision", "fp32")
    assert script("unlearn", *flags, "--out", "one")[0] == 0
    ranks = launch(tmp_path, run_prompted, limits, *flags, "--out", "two")
    assert [rank.status for rank in ranks] == [0, 0] and ranks[1].out == ranks[1].err == "", ranks
    one, two, base = (weights(tmp_path / name) for name in ("one/model.pt", "two/model.pt", "base.pt"))
    assert (one - two).norm() < 1e-3 * (one - torch.cat([base, base])).norm()
    ends = [json.loads((tmp_path / f"{name}/metrics.jsonl").read_text().splitlines()[-1]) for name in ("one", "two")]
    assert ends[0]["tried"] == ends[1]["tried"] and ends[0]["k"] == ends[1]["k"]


@pytest.mark.parametrize("runs", [(), ("base", "nowhere")], ids=["look", "compare"])
def test_an_evaluation_finds_the_same_with_two_ranks(runs, script, tmp_path, tiny_checkpoint, monkeypatch):
    quick_metrics(monkeypatch.setattr)
    make_run(tmp_path / "base", 0.1, method="siss")
    flags = ("--precision", "fp32", "--samples", 150, "--sampling-steps", 1, "--draws", 2, "--memory-timesteps", 300)
    arguments = (*runs, *(() if runs else ("--checkpoint", "base/model.pt")), *flags)
    ranks = launch(tmp_path, run_eval, *arguments, "--out", "two", fail_together=False)
    for kept in (tmp_path / "base").glob("samples-*.pt"):
        kept.unlink()
    status, said, error = script("eval", *arguments, "--out", "one")
    assert [rank.status for rank in ranks] == [status, 0] and status == (2 if runs else 0)
    assert ranks[0].out == said.replace("one", "two") and ranks[0].err == error
    assert ranks[1].out == ranks[1].err == ""
    one, two = (json.loads((tmp_path / out / "results.json").read_text()) for out in ("one", "two"))
    assert flat(one) == pytest.approx(flat(two), rel=1e-5)


def flat(value, name=""):
    """The numbers in a JSON object by their paths, and what is no number as it is."""
    if isinstance(value, (dict, list)):
        return {k: v for key, part in (value.items() if isinstance(value, dict) else enumerate(value)) for k, v in flat(part, f"{name}/{key}").items()}
    return {name: value if isinstance(value, (int, float)) else len(str(value))}


def run_eval(*arguments):
    quick_metrics()
    run_script("eval", *arguments)


def quick_metrics(patch=setattr):
    """Less of what every rank works out for itself."""
    patch(evaluation, "LOSS_IMAGES", 20)
    patch(evaluation, "likelihood", lambda *arguments: {"nll": None, "nll_error": None})


@pytest.mark.parametrize("action, says", [(fail, "RuntimeError: trouble of this rank alone"), (die, ""), (complain, "train_ddpm.py: error: what this rank alone can see")])
def test_a_rank_that_fails_ends_the_run_which_keeps_its_last_checkpoint(action, says, tmp_path):
    rank, failed = launch(tmp_path, run_script, "train_ddpm", *FLAGS["train_ddpm"], "--out", "run", on_rank_1=partial(in_step_6, action))
    assert rank.status != 0 and failed.status == {fail: 1, die: -signal.SIGKILL, complain: 2}[action]
    assert says in failed.err
    assert checkpoint.load(tmp_path / "run/model.pt").training["step"] == 4
    assert sorted(os.listdir(tmp_path / "run")) == ["config.json", "inputs.json", "model.pt"]


WRONG = [
    # on both ranks; what rank 0 says, its status
    (("--batch-size", 7), None, "--batch-size 7: should be divisible by 2", 2),
    (("--out", "."), None, "--out .: no new directory", 2),
    (("--steps", "many"), None, "'many' should be an integer", 2),
    (("--lr", 1e-3), diverge, "step 6: loss is nan; run/model.pt holds step 4", 1),
]


@pytest.mark.parametrize("arguments, action, says, status", WRONG, ids=[row[0][0] for row in WRONG])
def test_what_all_ranks_know_is_said_once(arguments, action, says, status, tmp_path):
    on_rank_1 = partial(in_step_6, action) if action else None
    ranks = launch(tmp_path, run_script, "train_ddpm", *FLAGS["train_ddpm"], "--out", "run", *arguments, on_rank_1=on_rank_1)
    assert ranks[0].status == status and ranks[0].err.count("\n") == 1 and says in ranks[0].err, ranks
    assert ranks[1].err == "" and ranks[0].out == ranks[1].out == ""
    assert (tmp_path / "run").exists() == (status == 1)


def test_each_rank_takes_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "empty", lambda *arguments, **options: None)
    assert device.pick_device("auto") == torch.device("cuda")
    of_torchrun = {"LOCAL_WORLD_SIZE": 2, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "RANK": 1, "MASTER_ADDR": "here", "MASTER_PORT": 1}
    for name, value in ((name, str(value)) for name, value in of_torchrun.items()):
        monkeypatch.setenv(name, value)
    assert device.pick_device("auto") == device.pick_device("cuda") == torch.device("cuda:1")
    assert device.pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="--device cuda:1: 2 ranks"):
        device.pick_device("cuda:1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(UserError, match=r"--device cuda: 3 ranks .* \(2\)"):
        device.pick_device("auto")


def test_the_benchmark_measures_ranks_that_torchrun_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(sys, "argv", ["bench", "--quick", "--device", "cpu", "--batch-size", "2", "--out", str(tmp_path / "bench.json"), "--scaling", "2"])
    assert bench.main() == 0
    (row,) = json.loads((tmp_path / "bench.json").read_text())["scaling"]["mnist-tiny"]
    assert row["ranks"] == 2 and row["siss"] > 0 and row["sampling"] > 0 and row["efficiency in siss"] == 1
    assert "efficiency in sampling" in capsys.readouterr().out
