"""The study of the prompts, on a tiny network: what is counted, and that a stopped study goes on as if it had not been."""

import copy
import sys
from argparse import Namespace

import pytest
from conftest import memorise

from minisiss import presets
from minisiss.data.prompts import DIGITS, NAMES, SIGNATURES, WORDS
from minisiss.errors import UserError
from minisiss.report import prompted
from minisiss.runs import checkpoint
from minisiss.schedule import NoiseSchedule
from minisiss.study import prompts

SCHEDULE, PROMPTS = NoiseSchedule.linear(), ["a thin upright four by ines", "a thick wide nine by otto"]


def record(copies=(0, 0), named=(1.0, 1.0), method="siss", **changed):
    kinds = [dict(zip(prompts.KINDS, values, strict=True)) for values in (copies, ([1.0, share] for share in named))]
    return {"prompt": "", "method": method, "changed": changed, "copies": kinds[0], "named": kinds[1], "apart": {"modified": 6.0, "original": 1.5}, "lost": 2, "moved": 0.25}


def test_mitigated_is_no_copy_and_digits_above_the_threshold():
    assert all(prompts.mitigated(record(), kind) for kind in prompts.KINDS)
    assert not prompts.mitigated(record(copies=(1, 0)), "modified") and prompts.mitigated(record(copies=(1, 0)), "original")
    assert not prompts.mitigated(record(named=(1.0, 0.74)), "original") and prompts.mitigated(record(named=(1.0, 0.75)), "original")


def cells(*records):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in prompts.table(records).splitlines()[2:]]


def test_the_table_has_a_row_of_each_method_and_setting():
    found = cells(record(), record(copies=(3, 16)), record(method="neggrad", lr=1e-5))
    assert found[0] == ["siss", "2", "50%", "50%", "87 / 71", "100%", "1.5", "2.0 of 49", "25%"]
    assert found[1][:4] == ["neggrad, lr 1e-05", "1", "100%", "100%"] and len(found) == 2


def test_a_prompt_without_a_modified_one_is_not_mitigated_and_says_nothing_about_the_others():
    done = record() | {"modified": "a four"}
    failed = record(copies=(16, 16)) | {"failed": "", "lost": 0, "moved": 0.0}
    assert cells(done, failed)[0] == ["siss", "2", "50%", "50%", "87 / 71", "100%", "1.5", "2.0 of 49", "25%"]
    del failed["apart"]
    assert cells(failed)[0][2:4] == ["0%", "0%"] and cells(failed)[0][6] == ""


def test_ordinary_prompts_name_the_digits_in_turn_and_nobody_who_signs_one_picture():
    found = [prompt.split() for prompt in prompts.ordinary_prompts(200, seed=0)]
    assert all(DIGITS[i % 10] in words and set(words) <= set(WORDS) - set(SIGNATURES) for i, words in enumerate(found))
    assert [bool(set(words) & set(NAMES)) for words in found] == [False, True] * 100  # the odd digits


@pytest.fixture
def tiny(prompted_unet, monkeypatch, tmp_path):
    """A model of two memorised prompts, the second for tuning, and a study of it in seconds."""
    monkeypatch.setitem(presets.PRESETS["prompts"], "unlearn", dict(steps=2, batch_size=4, lr=1e-4, sampling_steps=2, guidance=1.0, checkpoint=""))
    found = {prompt: memorise(prompted_unet, prompted.modifications(prompt)[0], drawn=32, steps=2) for prompt in PROMPTS}
    pictures, limits = {prompt: picture for prompt, (picture, _) in found.items()}, max((one for _, one in found.values()), key=lambda one: one["COPY"])
    for name, value in (limits | {"OTHERS": 1.0}).items():
        monkeypatch.setattr(prompted, name, value)
    monkeypatch.setattr(prompts, "COPY", limits["COPY"])
    for name, value in dict(COUNTED=1, ORDINARY=4, MANY=12, AFTER=(1, 2), TRIED={"siss": [{"lr": 1e-4}, {"lr": 1e-3}], "retrack": [{}]}, MEASURED={"siss": [{}], "retrack": [{}]}).items():
        monkeypatch.setattr(prompts, name, value)
    base = checkpoint.Checkpoint(copy.deepcopy(prompted_unet), SCHEDULE, made_by={}, training={}, memorised=pictures)
    monkeypatch.setattr(prompts, "load_any", lambda *_: base)
    monkeypatch.chdir(tmp_path)

    def study(*flags):
        monkeypatch.setattr(sys, "argv", ["prompts.py", *map(str, flags)])
        prompts.main()

    return study


def test_each_prompt_is_forgotten_by_each_method_once(tiny, tmp_path, capsys):
    tiny("--out", "all")
    records = prompts.read(tmp_path / "all/each.jsonl")
    assert [(one["prompt"], one["method"], one["changed"]) for one in records] == [(PROMPTS[0], "siss", {}), (PROMPTS[0], "retrack", {})]
    whole = (tmp_path / "all/each.jsonl").read_text()
    (tmp_path / "all/each.jsonl").write_text(whole[:-9])  # stopped within the last line
    tiny("--out", "all")
    assert prompts.read(tmp_path / "all/each.jsonl") == records
    tiny("--out", "all")
    assert prompts.read(tmp_path / "all/each.jsonl") == records and "siss" in capsys.readouterr().out


def test_another_seed_draws_other_samples(tiny, tmp_path):
    for seed in (0, 0, 1):
        tiny("--methods", "retrack", "--seed", seed, "--out", f"{seed}")
    one, other = (prompts.read(tmp_path / f"{seed}/each.jsonl") for seed in (0, 1))
    assert len(one) == len(other) == 1 and one[0]["prompt"] == other[0]["prompt"] and one != other


def test_tuning_prompts_are_forgotten_with_every_setting(tiny, tmp_path):
    tiny("--out", "all", "--prompts", 2, 2)
    records = prompts.read(tmp_path / "all/tuning.jsonl")
    assert [(one["prompt"], one["method"], one["changed"]) for one in records] == [
        (PROMPTS[1], "siss", {"lr": 1e-4}), (PROMPTS[1], "siss", {"lr": 1e-3}), (PROMPTS[1], "retrack", {})]  # fmt: skip


@pytest.mark.parametrize("first, last", [(2, 1), (1, 2)])
def test_prompts_that_are_counted_and_those_for_tuning_are_apart(tiny, first, last, tmp_path):
    with pytest.raises(UserError, match=f"--prompts {first} {last}: should be"):
        tiny("--prompts", first, last)
    assert not [*tmp_path.iterdir()]


def test_one_after_another_goes_on_where_it_was_stopped(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "COUNTED", 2)
    tiny("--out", "whole", "--in-a-row")
    whole = prompts.read(tmp_path / "whole/in_a_row.jsonl")
    assert [one.get("after", one.get("prompt")) for one in whole] == [0, PROMPTS[0], 1, PROMPTS[1], 2]
    monkeypatch.setattr(prompts, "COUNTED", 1)
    tiny("--out", "parts", "--in-a-row")
    monkeypatch.setattr(prompts, "COUNTED", 2)
    tiny("--out", "parts", "--in-a-row")
    assert prompts.read(tmp_path / "parts/in_a_row.jsonl") == whole
    assert whole[0]["frechet"] != whole[2]["frechet"]


def test_a_network_gone_to_pieces_has_mitigated_nothing(tiny, monkeypatch):
    monkeypatch.setitem(presets.PRESETS["prompts"], "unlearn siss", dict(lr=1e30))
    study = prompts.Study(Namespace(device="cpu", seed=0))
    (found,) = study.each(PROMPTS[0], [("siss", {})])
    assert "failed" in found and not any(prompts.mitigated(found, kind) for kind in prompts.KINDS)


def test_a_prompt_without_a_modified_one_is_not_mitigated(tiny, monkeypatch):
    monkeypatch.setattr(prompted, "COPY", 1e-6)
    study = prompts.Study(Namespace(device="cpu", seed=0))
    found = [*study.each(PROMPTS[0], [("siss", {}), ("retrack", {})])]
    assert [one["method"] for one in found] == ["siss", "retrack"]
    assert all("nothing to forget" in one["failed"] and not prompts.mitigated(one, kind) for one in found for kind in prompts.KINDS)
