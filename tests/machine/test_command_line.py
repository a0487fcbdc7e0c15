"""Every flag of every script, and what it says to what it does not take: one line, status 2, and nothing left behind."""

import argparse
import dataclasses
import importlib
import io
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from minisiss import errors, presets, unet, unlearning
from minisiss.machine import command_line, device, ranks

SCRIPTS = ["train_ddpm", "unlearn", "eval", "minisiss.study.bench", "minisiss.study.train_classifier"]

# flag: (values that are taken, the least and the most among them; values that are not). "" and "-", which are nobody's
# value, and a flag without its value are tried with every flag.
NUMBERS = ["many", "nan", "inf", "-inf", "1e400", "0x10", "1\n2", "½"]
INTEGERS = [*NUMBERS, "1.5", "1e3", "-1", str(10**400)]
FLAGS = {
    # of several scripts
    "--preset": (list(presets.PRESETS), ["imagenet", "mnist-SMALL"]),
    "--data-root": (["bundled", "data"], ["\0"]),
    "--data": (["mnist", "prompts", "pictures"], ["MNIST", "cifar"]),
    "--forget": (["names.jpg"], ["\0", "names.jpg", "names.txt"]),
    "--skip-unreadable": ([], []),
    "--checkpoint-activations": ([], []),
    "--checkpoint": (["bundled", "runs/siss-1/model.pt"], ["\0"]),
    "--steps": (["1", "1000000000"], ["0", "1000000001", *INTEGERS]),
    "--batch-size": (["1", "65536"], ["0", "65537", "1000000000", *INTEGERS]),
    "--lr": (["1e-9", "10"], ["0", "-1", "1e-400", *NUMBERS]),
    "--save-every": (["1", "1000000000"], ["0", *INTEGERS]),
    "--samples": (["0", "1000000"], ["1000001", "10000000", *INTEGERS]),
    "--sampling-steps": (["1", "1000000000"], ["0", *INTEGERS]),
    "--eta": (["0", "1"], ["-0.1", "1.1", *NUMBERS]),
    "--draws": (["1", "4096"], ["0", "4097", "1000000000", *INTEGERS]),
    "--memory-timesteps": (["0", "99999"], ["100000", *INTEGERS]),
    "--seed": (["0", str(2**63 - 1)], [str(2**63), *INTEGERS]),
    "--device": (["auto", "cpu", "cuda:1"], ["toaster", "cuda:-1", "cuda:99999", "meta", "cpu cpu"]),
    "--precision": (["auto", "bf16", "fp32"], ["fp64", "BF16"]),
    "--out": (["runs/here"], ["\0"]),
    "--resume": ([], ["\0"]),
    # of train_ddpm.py
    "--exclude-forget": ([], []),
    "--warmup": (["0", "1000000000"], [str(10**10), *INTEGERS]),
    "--ema": (["0", "0.9999"], ["-0.1", "1", *NUMBERS]),
    "--sample-every": (["1", "1000000000"], ["0", *INTEGERS]),
    "--image-size": (["1", "4096"], ["0", "4097", "1000000000", *INTEGERS]),
    "--image-channels": (["1", "4096"], ["0", "4097", "1000000000", *INTEGERS]),
    "--channels": (["2", "4096"], ["0", "4097", "25", "1000000000", *INTEGERS]),
    "--layers-per-block": (["1", "16"], ["0", "17", "1000000", *INTEGERS]),
    "--attention-levels": (["0", "2"], ["3", "13", *INTEGERS]),
    "--head-channels": (["1", "4096"], ["0", "7", "4097", *INTEGERS]),
    "--norm-groups": (["1", "4096"], ["0", "5", "4097", *INTEGERS]),
    "--norm-eps": (["1e-12", "1"], ["0", "-1", "1e-13", "2", *NUMBERS]),
    "--downsample-padding": (["0", "1"], ["2", *INTEGERS]),
    "--flip-sin-to-cos": (["0", "1"], ["2", "yes", *INTEGERS]),
    "--freq-shift": (["0", "1"], ["2", *INTEGERS]),
    "--vocabulary": (["0", "4096"], ["4097", *INTEGERS]),
    "--init": (["none", "bundled", "runs/train-1/model.pt"], ["\0"]),
    # of unlearn.py
    "--prompt": (["a thin four by ines"], []),
    "--fixed-prompt": (["original", "modified"], ["both", "ORIGINAL"]),
    "--hold": (["0", "10"], ["-0.1", *NUMBERS]),
    "--guidance": (["0", "1.5", "100"], ["-1", "101", *NUMBERS]),
    "--method": (["siss", "neggrad"], ["prayer", "SISS", "../siss"]),
    "--lam": (["0", "1"], ["-0.1", "1.5", *NUMBERS]),
    "--grad-ratio": (["0", "1e9"], ["-1", *NUMBERS]),
    "--superfactor": (["0", "1e9"], ["-1", *NUMBERS]),
    "--ceiling": (["0", "1e9"], ["-1", *NUMBERS]),
    "--retrack-weight": (["0", "1"], ["-0.1", "1.5", *NUMBERS]),
    "--unseen-weight": (["0", "1e9"], ["-1", *NUMBERS]),
    "--neighbours": (["0", "1000000000"], ["-1", *INTEGERS]),
    "--erasediff-eta": (["0", "1e9"], ["-1", *NUMBERS]),
    "--draw-x": (["all", "rest"], ["none"]),
    "--accumulate": (["1", "1000000000"], ["0", *INTEGERS]),
    "--evaluate-every": (["1", "1000000000"], ["0", *INTEGERS]),
    # of eval.py
    "RUN": (["bundled", "runs/siss-1"], ["\0"]),
    "--sscd": ([], ["\0", "network.pt"]),
    "--inception": ([], ["\0", "network.pt"]),
    # of python -m minisiss.study.bench
    "--presets": (["mnist-small", "celebahq"], ["imagenet"]),
    "--repeats": (["1", "1000000000"], ["0", *INTEGERS]),
    "--quick": ([], []),
    "--compile": ([], []),
    "--scaling": (["1", "1024"], ["0", "1025", *INTEGERS]),
}


def parser_of(script):
    """The parser that a script's parse_arguments makes."""
    made = []
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(command_line.Parser, "parse_args", lambda parser: made.append(parser) or sys.exit())
        importlib.import_module(script).parse_arguments()
    return made[0]


def flags_of(script):
    """The flags of a script and its other arguments, by name."""
    return {(action.option_strings or [action.metavar])[0]: action for action in parser_of(script)._actions if action.dest != "help"}


EVERY = [(script, flag) for script in SCRIPTS for flag in flags_of(script)]


def typed(flag, *values):
    return list(values) if flag == "RUN" else [flag, *values]


def test_the_table_has_a_row_for_every_flag_of_every_script():
    assert {flag for _, flag in EVERY} == set(FLAGS)


def complaint(script, tmp_path, name, *arguments):
    """The one line in which a script refuses these arguments."""
    status, _, error = script(name, *arguments)
    assert status == 2 and error.count("\n") == 1 and error.endswith("\n") and "Traceback" not in error, (arguments, status, error)
    assert os.listdir(tmp_path) == [], arguments
    return error


@pytest.mark.parametrize("name, flag", EVERY)
def test_what_a_flag_does_not_take_is_one_line_that_names_the_flag(name, flag, script, tmp_path):
    action = flags_of(name)[flag]
    if action.nargs == 0:
        wrong = [[f"{flag}=yes"]]
    else:
        wrong = [typed(flag, value) for value in ["", "-", *FLAGS[flag][1]]]
        wrong += [[flag]] if action.nargs != "*" else []
    for arguments in wrong:
        error = complaint(script, tmp_path, name, *arguments)
        assert any(word in error for word in (flag, action.dest, f"unrecognized arguments: {arguments[-1]}")), (arguments, error)


@pytest.mark.parametrize("name, flag", EVERY)
def test_the_least_and_the_most_that_a_flag_takes(name, flag, monkeypatch):
    for value in FLAGS[flag][0]:
        monkeypatch.setattr(sys, "argv", [name, *typed(flag, value)])
        args = importlib.import_module(name).parse_arguments()
        found = getattr(args, flags_of(name)[flag].dest)
        assert str(found[0] if isinstance(found, list) else found) in (value, str(float(value)) if value[0].isdigit() else value)


def test_of_flags_that_take_each_others_place_one_has_a_value_also_where_a_preset_has_the_other(monkeypatch):
    for preset in ({"grad_ratio": 0.3}, {"superfactor": 9.0, "grad_ratio": None}):
        monkeypatch.setitem(command_line.PRESETS["mnist-tiny"], "unlearn siss", preset)
        for typed, found in (([], (preset.get("superfactor"), preset["grad_ratio"])), (["--grad-ratio", "0.2"], (None, 0.2)), (["--superfactor", "0"], (0.0, None))):
            monkeypatch.setattr(sys, "argv", ["unlearn.py", "--preset", "mnist-tiny", *typed])
            args = importlib.import_module("unlearn").parse_arguments()
            assert (args.superfactor, args.grad_ratio) == found, (preset, typed)


@pytest.mark.parametrize(
    "name, arguments, words",
    [
        ("unlearn", ("--superfactor", "1", "--grad-ratio", "0.2"), ["--superfactor", "--grad-ratio"]),
        ("unlearn", ("--out", "a", "--resume", "b"), ["--out", "--resume"]),
        ("train_ddpm", ("--out", "a", "--resume", "b"), ["--out", "--resume"]),
        ("train_ddpm", ("--preset", "mnist", "--head-channels", "7"), ["head_channels 7", "divide"]),
        ("train_ddpm", ("--channels", "4096", "4096", "4096"), ["--channels", "parameters"]),
        ("train_ddpm", ("--channels", *["4096"] * 1000), ["channels", "at most 13"]),
        ("train_ddpm", ("--channels", "8", "8", "8", "8"), ["image_size 28", "divisible"]),
        ("train_ddpm", ("--channels", "8", "--attention-levels", "1"), ["attention_levels", "0 … 0"]),
        ("eval", ("run", "--checkpoint", "model.pt"), ["--checkpoint", "without a RUN"]),
        ("eval", ("run", "--samples", "9"), ["--samples 9", "at least 10"]),
        ("eval", ("--sscd", "network.pt"), ["--sscd", "RUN"]),
        ("eval", ("--inception", "network.pt", "--checkpoint", "model.pt"), ["--inception", "RUN"]),
        *((name, ("--no-such-flag",), ["--no-such-flag"]) for name in SCRIPTS),
        *((name, ("--see",), ["unrecognized arguments: --see"]) for name in SCRIPTS),  # no abbreviations: a flag added later could change their meaning
        *((name, ("stray",), ["stray"]) for name in SCRIPTS if name != "eval"),
        *((name, ("--out", "x" * 5000), ["x" * 5000]) for name in ("unlearn", "eval")),
        ("unlearn", ("--checkpoint", "x" * 5000), ["x" * 5000]),
        ("unlearn", ("--data-root", "x" * 5000), ["x" * 5000]),
    ],
)
def test_contradictions_are_one_line(name, arguments, words, script, tmp_path):
    error = complaint(script, tmp_path, name, *arguments)
    assert all(word in error for word in words), error


@pytest.mark.parametrize(
    "config, words",
    [
        ({"steps": "many"}, ["--steps", "'many'"]),
        ({"steps": 1.5}, ["--steps", "'1.5'"]),
        ({"steps": None}, ["--steps", "'None'"]),
        ({"steps": [1]}, ["steps should be one value"]),
        ({"channels": 8}, ["channels should be a list"]),
        ({"channels": []}, ["--channels", "at least one"]),
        ({"channels": [8, "--lr"]}, ["--lr"]),
        ({"exclude_forget": "yes"}, ["yes"]),
        ({"precision": "fp64"}, ["--precision", "fp64"]),
        ({"lr": float("nan")}, ["--lr", "'nan'"]),
        ({"data_root": "\0"}, ["--data-root"]),
        ({"seed": {}}, ["--seed"]),
        ({"method": "siss"}, ["'method' is no setting of this script"]),  # a run of unlearn.py
        ({"help": True}, ["'help' is no setting of this script"]),
        ("[" * 100_000, ["not valid JSON"]),
        ("[]", ["one JSON object"]),
        ('{"steps": ' + "9" * 5000 + "}", ["not valid JSON"]),
        ("\udcff", ["not valid JSON"]),
    ],
)
def test_a_resumed_runs_settings_are_held_against_the_flags_too(config, words, script, tmp_path):
    (tmp_path / "run").mkdir()
    text = config if isinstance(config, str) else json.dumps(config)
    (tmp_path / "run/config.json").write_bytes(text.encode(errors="surrogateescape"))
    status, _, error = script("train_ddpm", "--resume", "run")
    assert status == 2 and error.count("\n") == 1 and all(word in error for word in ["run/config.json", *words]), error
    assert os.listdir(tmp_path) == ["run"] and os.listdir(tmp_path / "run") == ["config.json"]


def test_numbers_that_are_absurd_but_harmless_are_taken(script, tiny_checkpoint):
    absurd = [part for flag in ("--accumulate", "--evaluate-every", "--save-every", "--sampling-steps") for part in (flag, 10**9)]
    small = ("--preset", "mnist-tiny", "--steps", 1, "--samples", 0, "--draws", 1, "--memory-timesteps", 2)
    status, _, error = script("unlearn", *small, "--checkpoint", tiny_checkpoint, *absurd, "--seed", 2**63 - 1)
    assert (status, error) == (0, "")


@pytest.mark.parametrize(
    "error, status",
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), 2),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), 2),
        (MemoryError(), 2),
        (OSError(28, "No space left on device", "metrics.jsonl"), 2),
        (errors.Diverged("step 3"), 1),
    ],
)
def test_what_the_machine_lacks_is_one_line_too(error, status, capsys):
    def script():
        raise error

    with pytest.raises(SystemExit) as stopped:
        command_line.run(script)
    said = capsys.readouterr().err
    assert stopped.value.code == status and said.count("\n") == 1 and str(error)[-9:] in said


def test_a_mistake_of_ours_is_not_passed_off_as_the_users():
    def script():
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        command_line.run(script)


@pytest.mark.parametrize("script, module, record", [("unlearn", unlearning, "Settings"), ("train_ddpm", unet, "UNetConfig")])
def test_a_field_is_declared_once_and_its_flag_comes_from_there(script, module, record):
    found = command_line.declarations(module.__name__.removeprefix("minisiss."), record)
    fields = dataclasses.fields(getattr(module, record))
    assert {name: declared[-1] for name, declared in found.items()} == {field.name: field.default for field in fields}
    flags = flags_of(script)
    for name, (_, _, _, meaning, _) in found.items():
        assert flags[f"--{name.replace('_', '-')}"].help == meaning


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_says_every_flag(name, script):
    status, said, error = script(name, "--help")
    assert (status, error) == (0, "") and all(flag in said for flag in flags_of(name))


def test_what_a_terminal_cannot_show_is_escaped(monkeypatch):
    written = io.BytesIO()

    def script():
        print("ρ, \udcff")  # a name in a directory can be such: no UTF-8

    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    with pytest.raises(SystemExit) as stopped:
        command_line.run(script)
    sys.stdout.flush()
    assert stopped.value.code is None and written.getvalue() == b"\\u03c1, \\udcff\n"


@pytest.mark.parametrize("left", [
    {"WORLD_SIZE": "2"}, {"RANK": ""}, {"RANK": "1", "WORLD_SIZE": "2"}, {"LOCAL_RANK": "x", "LOCAL_WORLD_SIZE": ""},
    {"RANK": "", "WORLD_SIZE": "", "MASTER_ADDR": "", "MASTER_PORT": ""}, {"RANK": "1", "WORLD_SIZE": "two", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
])  # fmt: skip
def test_what_is_left_over_in_the_environment_makes_no_ranks(left, script, monkeypatch, tiny_checkpoint):
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    assert errors.rank() == 0 and ranks.start(torch.device("cpu")) is ranks.ALONE
    assert device.pick_device("cpu") == torch.device("cpu")


def test_commands_are_quoted_and_say_what_the_data_is():
    args = argparse.Namespace(preset="faces-64", data="pictures", data_root="my faces", forget=["a b.jpg", "c.jpg"], skip_unreadable=True)
    assert command_line.command("eval.py", args, checkpoint="a run/model.pt").split(" ", 2)[2] == (
        "--preset faces-64 --data pictures --data-root 'my faces' --forget 'a b.jpg' c.jpg --skip-unreadable --checkpoint 'a run/model.pt'")
    args = argparse.Namespace(preset="mnist-small", data="mnist", data_root="bundled", forget=[], skip_unreadable=False)
    assert command_line.command("eval.py", args, checkpoint="x").split(" ", 2)[2] == "--checkpoint x"


def test_help_and_typing_errors_do_not_wait_for_torch(tmp_path):
    """A program of its own, as this one has imported torch long since."""
    program = """
import sys
from minisiss import errors, presets
from minisiss.machine import command_line
for script in ("train_ddpm", "unlearn", "eval"):
    for arguments in (["--help"], ["--preset", "mnist", "--help"], ["--seed", "x"], ["--steps"], ["--no-such-flag"]):
        sys.argv = [script, *arguments]
        try:
            command_line.run(__import__(script).main)
        except SystemExit as stopped:
            print(script, *arguments, stopped.code, "torch" in sys.modules, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    ends = [line.split()[-2:] for line in done.stderr.splitlines() if "error:" not in line]
    assert len(ends) == 15 and {status for status, _ in ends} == {"0", "2"}, done.stderr
    assert all(imported == "False" for _, imported in ends), done.stderr
