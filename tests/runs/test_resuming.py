"""Going on with a run: on the same data, from elsewhere, alone; and with a model that has forgotten before."""

import json
import os
import shlex
import shutil
import signal

import pytest
from conftest import randomise
from PIL import Image

from minisiss import presets
from minisiss.errors import UserError
from minisiss.runs import checkpoint, directory, loop
from minisiss.schedule import NoiseSchedule
from minisiss.unet import UNet, UNetConfig

NAMES = ["a.png", "b.png", "c.png", "d.png", "e.png"]
TINY = ("--preset", "mnist-tiny", "--data", "pictures", "--batch-size", 3, "--samples", 0, "--precision", "fp32")


@pytest.fixture
def folder(tmp_path):
    """Five pictures in `pictures`, and models of them in model.pt and other.pt."""
    (tmp_path / "pictures").mkdir()
    for number, name in enumerate(NAMES):
        Image.new("RGB", (16 + number, 16), (50 * number, 99, 0)).save(tmp_path / "pictures" / name)
    config = UNetConfig(**{**presets.PRESETS["mnist-tiny"]["unet"], "image_size": 16, "image_channels": 3})
    for seed, name in enumerate(["model.pt", "other.pt"]):
        checkpoint.save(tmp_path / name, randomise(UNet(config), seed), NoiseSchedule.linear(), {"script": "a test"})
    return tmp_path / "pictures"


@pytest.fixture
def unlearn(script, folder):
    """Run unlearn.py on the pictures, stopped in its first step; unlearn(...) -> (status, stdout, stderr)."""

    def run(*arguments, checkpoint="model.pt"):
        return script("unlearn", *TINY, "--data-root", "pictures", "--checkpoint", checkpoint, *arguments)

    return run


def stop_in_the_first_step(monkeypatch, number=signal.SIGINT):
    enter = loop.Loop.__enter__
    monkeypatch.setattr(loop.Loop, "__enter__", lambda run: (enter(run), os.kill(os.getpid(), number))[0])


def steps(path):
    return checkpoint.load(path / "model.pt").training["step"]


@pytest.mark.parametrize("change, words", [
    (lambda root: (root / "c.png").unlink(), "gone: c.png"),
    (lambda root: shutil.copy(root / "c.png", root / "new.png"), "new: new.png"),
    (lambda root: Image.new("RGB", (30, 30)).save(root / "d.png"), "changed: d.png"),
    (lambda root: [shutil.copy(root / "c.png", root / f"{n}.png") for n in range(5)], "new: 0.png, 1.png, 2.png and 2 more"),
    (lambda root: shutil.copy(root / "../other.pt", root / "../model.pt"), "changed: checkpoint"),
])  # fmt: skip
def test_a_run_does_not_go_on_with_other_data(change, words, unlearn, script, folder, tmp_path):
    assert unlearn("--forget", "b.png", "--steps", 1, "--out", "run")[0] == 0
    assert script("unlearn", "--resume", "run", "--steps", 2)[0] == 0
    change(folder)
    status, _, error = script("unlearn", "--resume", "run", "--steps", 3)
    assert status == 2 and words in error and error.count("\n") == 1
    assert steps(tmp_path / "run") == 2 and json.loads((tmp_path / "run/config.json").read_text())["steps"] == 2


def test_a_finished_run_that_is_resumed_or_extended_says_its_rate_once(script, tiny_checkpoint, tmp_path):
    arguments = ("--preset", "mnist-tiny", "--checkpoint", tiny_checkpoint, "--samples", 4, "--draws", 1, "--steps", 1)
    assert script("unlearn", *arguments, "--out", "run")[0] == 0
    for more in ((), ("--steps", 2)):
        assert script("unlearn", "--resume", "run", *more)[0] == 0
        rates = [line for line in directory.read_metrics(tmp_path / "run") if "tshirt_rate" in line]
        assert [line["step"] for line in rates] == [2 if more else 1]


def test_digits_are_known_again_too(script, tiny_checkpoint, tmp_path):
    arguments = ("--preset", "mnist-tiny", "--checkpoint", tiny_checkpoint, "--samples", 0, "--steps", 1)
    assert script("unlearn", *arguments, "--out", "run")[0] == 0
    inputs = json.loads((tmp_path / "run/inputs.json").read_text())
    assert set(inputs) == {"digits", "T-shirts", "checkpoint"}
    (tmp_path / "run/inputs.json").write_text(json.dumps(inputs | {"digits": 1}))
    status, _, error = script("unlearn", "--resume", "run", "--steps", 2)
    assert status == 2 and "changed: digits" in error


def test_a_list_of_names_that_was_edited_changes_nothing_in_a_run_that_began_with_it(unlearn, script, folder, tmp_path):
    (tmp_path / "names.txt").write_text("b.png\n")
    assert unlearn("--forget", "names.txt", "--steps", 1, "--out", "run")[0] == 0
    (tmp_path / "names.txt").write_text("c.png\n")
    status, _, error = script("unlearn", "--resume", "run", "--steps", 2, "--forget", "names.txt")
    assert status == 2 and "was started with --forget ['b.png']" in error
    status, said, _ = script("unlearn", "--resume", "run", "--steps", 2)
    assert status == 0 and "b.png noised to" in said


def test_the_command_that_a_stopped_run_prints_goes_on_with_it(unlearn, script, folder, tmp_path, monkeypatch):
    assert unlearn("--forget", "b.png", "--steps", 2, "--out", "a run")[0] == 0
    with monkeypatch.context() as patch:  # extended, and stopped again
        stop_in_the_first_step(patch)
        status, said, _ = script("unlearn", "--resume", "a run", "--steps", 4)
    assert status == 130 and steps(tmp_path / "a run") == 3
    python, name, *arguments = shlex.split(said.split("continue with: ")[1])
    assert (python, name, arguments) == ("python", "unlearn.py", ["--resume", "a run"])
    assert script("unlearn", *arguments)[0] == 0 and steps(tmp_path / "a run") == 4


def test_a_closed_terminal_stops_a_run_as_ctrl_c_does_and_nohup_keeps_it_going(unlearn, folder, tmp_path, monkeypatch):
    stop_in_the_first_step(monkeypatch, signal.SIGHUP)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    try:
        assert unlearn("--forget", "b.png", "--steps", 3, "--out", "run")[0] == 129
        assert steps(tmp_path / "run") == 1
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert unlearn("--forget", "b.png", "--steps", 3, "--out", "nohup")[0] == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert steps(tmp_path / "nohup") == 3


def test_a_run_goes_on_from_another_directory_and_with_data_and_model_that_moved(unlearn, script, folder, tmp_path, monkeypatch):
    assert unlearn("--forget", "b.png", "--steps", 1, "--out", "run")[0] == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert script("unlearn", "--resume", "../run", "--steps", 2)[0] == 0
    folder.rename(tmp_path / "moved")
    (tmp_path / "model.pt").rename(tmp_path / "moved.pt")
    assert script("unlearn", "--resume", "../run", "--steps", 3)[0] == 2
    moved = ("--data-root", "../moved", "--checkpoint", "../moved.pt")
    assert script("unlearn", "--resume", "../run", "--steps", 3, *moved)[0] == 0
    assert script("unlearn", "--resume", "../run", "--steps", 4)[0] == 0  # it is known where they are now
    assert steps(tmp_path / "run") == 4


def test_the_weights_that_training_began_with_may_be_restated_and_are_no_others(script, tiny_checkpoint, tmp_path):
    shutil.copy(tiny_checkpoint, tmp_path / "begun.pt")
    begin = ("--preset", "mnist-tiny", "--data-root", "bundled", "--init", "begun.pt", "--steps")
    assert script("train_ddpm", *begin, 1, "--out", "run")[0] == 0
    assert script("train_ddpm", *begin, 2, "--resume", "run")[0] == 0 and steps(tmp_path / "run") == 2
    status, _, error = script("train_ddpm", "--resume", "run", "--steps", 3, "--init", "none")
    assert status == 2 and "was started with --init" in error


def test_two_processes_do_not_run_in_one_directory(unlearn, script, folder, tmp_path):
    assert unlearn("--forget", "b.png", "--steps", 1, "--out", "run")[0] == 0
    (tmp_path / "run/.unfinished-of-the-other").write_text("")
    other = directory.lock(tmp_path / "run")
    status, _, error = script("unlearn", "--resume", "run", "--steps", 2)
    assert status == 2 and "run: another process is running there" in error
    assert (tmp_path / "run/.unfinished-of-the-other").exists()
    os.close(other)
    assert script("unlearn", "--resume", "run", "--steps", 2)[0] == 0
    assert not (tmp_path / "run/.unfinished-of-the-other").exists()


def test_what_the_message_about_a_damaged_picture_advises_works(script, folder, tmp_path):
    Image.frombytes("L", (64, 64), bytes(i * i % 251 for i in range(4096))).save(folder / "c.png")
    whole = (folder / "c.png").read_bytes()
    (folder / "c.png").write_bytes(whole[: len(whole) // 2])  # its header is as it was
    network = ("--image-size", 16, "--image-channels", 3, "--batch-size", 5, "--steps", 6)
    data = ("--preset", "mnist-tiny", "--data", "pictures", "--data-root", "pictures")
    status, _, error = script("train_ddpm", *data, *network, "--out", "run")
    assert status == 2 and "c.png: not a readable picture" in error and "--skip-unreadable" in error
    status, _, error = script("train_ddpm", "--resume", "run", "--skip-unreadable")
    assert status == 0 and error.count("c.png") == 1
    assert script("train_ddpm", "--resume", "run", "--steps", 7)[0] == 0  # remembered


def test_what_a_model_has_forgotten_stays_forgotten(unlearn, folder, tmp_path, capsys):
    assert unlearn("--forget", "b.png", "--steps", 1, "--out", "first")[0] == 0
    status, said, error = unlearn("--forget", "c.png", "--steps", 1, "--out", "second", checkpoint="first/model.pt")
    assert status == 0 and "forgotten before, so not among the pictures to keep: b.png" in error
    assert "c.png noised to" in said and "forgotten before noised to" in said
    assert set(json.loads((tmp_path / "second/inputs.json").read_text())) == {*NAMES, "checkpoint"} - {"b.png"}
    third = checkpoint.load(tmp_path / "second/model.pt")
    assert third.forgotten == ["c.png", "b.png"]
    status, said, error = unlearn("--forget", "b.png", "--steps", 1, checkpoint="second/model.pt")  # once more
    assert status == 0 and "to keep: c.png" in error and "b.png noised to" in said


def test_it_does_so_however_its_names_were_spelled(unlearn, folder, tmp_path):
    assert unlearn("--forget", "./b.png", "--steps", 1, "--out", "first")[0] == 0
    status, _, error = unlearn("--forget", "c.png", "--steps", 1, "--out", "second", checkpoint="first/model.pt")
    assert status == 0 and "to keep: b.png" in error
    status, said, error = unlearn("--forget", "./b.png", "--steps", 1, checkpoint="second/model.pt")  # once more
    assert status == 0 and "to keep: c.png" in error and "b.png noised to" in said


@pytest.mark.parametrize("made_by", [{}, {"settings": 3}, {"settings": {"forget": "x"}}, {"base": 7}, {"settings": {"forget": [3], "method": 0}}])
def test_a_strangers_checkpoint_may_say_anything_of_how_it_was_made(made_by):
    assert checkpoint.Checkpoint(None, None, made_by, {}).forgotten == []


def test_inputs_that_are_no_json_are_one_line(tmp_path):
    (tmp_path / "inputs.json").write_text("[")
    with pytest.raises(UserError, match="inputs.json: not valid JSON"):
        directory.compare_inputs(tmp_path, {})
