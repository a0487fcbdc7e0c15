import os
import pickle
import zipfile

import pytest
import torch

from minisiss import checkpoint, files
from minisiss.cli import UserError
from minisiss.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule.linear(50, 1e-3, 0.05)


def test_a_round_trip_keeps_network_schedule_and_origin(tiny_unet, tmp_path):
    checkpoint.save(tmp_path / "model.pt", tiny_unet, SCHEDULE, {"script": "x.py", "steps": 3}, training={"step": 3})
    found = checkpoint.load(tmp_path / "model.pt")
    assert found.model.config == tiny_unet.config
    assert all(torch.equal(value, tiny_unet.state_dict()[name]) for name, value in found.model.state_dict().items())
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(vars(found.schedule).values(), vars(SCHEDULE).values(), strict=True))
    assert found.made_by == {"script": "x.py", "steps": 3} and found.training["step"] == 3
    assert os.listdir(tmp_path) == ["model.pt"]


def test_averaged_weights_are_the_ones_that_are_used(tiny_unet, tmp_path):
    ema = {name: torch.zeros_like(value) for name, value in tiny_unet.state_dict().items()}
    checkpoint.save(tmp_path / "model.pt", tiny_unet, SCHEDULE, {}, ema=ema)
    assert all(not value.any() for value in checkpoint.load(tmp_path / "model.pt").model.state_dict().values())


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(tiny_unet, tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    checkpoint.save(path, tiny_unet, SCHEDULE, {"steps": 1})
    before = path.read_bytes()

    def full_disk(state, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(UserError, match="model.pt.*No space left"):
        checkpoint.save(path, tiny_unet, SCHEDULE, {"steps": 2})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["model.pt"]


def test_the_new_file_is_whole_before_it_takes_the_old_ones_place(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    replace, seen = os.replace, []
    monkeypatch.setattr(files.os, "replace", lambda new, old: seen.append((open(new, "rb").read(), path.read_bytes())) or replace(new, old))
    files.write_atomically(path, lambda file: file.write(b"new"))
    assert seen == [(b"new", b"old")] and path.read_bytes() == b"new"


class Exploit:
    def __reduce__(self):
        return os.system, ("touch /tmp/minisiss-was-exploited",)


def corrupt(name, whole, path):
    if name == "missing":
        return
    state = torch.load(whole, weights_only=True)
    if name == "truncated":
        path.write_bytes(whole.read_bytes()[:-1000])
    elif name == "empty":
        path.write_bytes(b"")
    elif name == "text":
        path.write_text("not a checkpoint")
    elif name == "foreign":
        torch.save({"state_dict": state["weights"]}, path)
    elif name == "tensor":
        torch.save(torch.zeros(3), path)
    elif name == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.txt", "b")
    elif name == "bomb":  # a few bytes that unpack to many
        with zipfile.ZipFile(whole) as good, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for record in good.namelist():
                archive.writestr(record, bytes(10**7) if record.endswith("/data/0") else good.read(record))
    elif name == "pickle":
        path.write_bytes(pickle.dumps(Exploit()))
    elif name == "exploit":
        torch.save({**state, "made_by": Exploit()}, path)
    else:
        change = {
            "key missing": {"weights": {k: v for k, v in state["weights"].items() if k != "conv_in.bias"}},
            "key left over": {"weights": {**state["weights"], "more": torch.zeros(1)}},
            "wrong shape": {"weights": {**state["weights"], "conv_in.bias": torch.zeros(99)}},
            "unknown config": {"config": {**state["config"], "depth": 3}},
            "negative channels": {"config": {**state["config"], "channels": (8, -16)}},
            "weights not finite": {"weights": {**state["weights"], "conv_in.bias": torch.full((8,), float("nan"))}},
            "no schedule": {"schedule": None},
            "half a schedule": {"schedule": {**state["schedule"], "gamma": torch.zeros(3)}},
        }
        torch.save({**state, **change[name]}, path)


BROKEN = [
    "missing", "truncated", "empty", "text", "foreign", "tensor", "zip", "pickle", "exploit", "key missing",
    "key left over", "wrong shape", "unknown config", "negative channels", "no schedule",
    "half a schedule", "weights not finite", "bomb",
]  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_is_no_whole_checkpoint_is_refused_by_name(name, tiny_checkpoint, tmp_path):
    path = tmp_path / "bad.pt"
    corrupt(name, tiny_checkpoint, path)
    with pytest.raises(UserError, match="bad.pt"):
        checkpoint.load(path)
    assert not os.path.exists("/tmp/minisiss-was-exploited")


def test_a_flipped_bit_is_noticed_or_changes_nothing(tiny_unet, tiny_checkpoint, tmp_path):
    whole, path = tiny_checkpoint.read_bytes(), tmp_path / "flipped.pt"
    refused = 0
    for place in torch.randint(8 * len(whole), (60,), generator=torch.Generator().manual_seed(0)).tolist():
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            weights = checkpoint.load(path).model.state_dict()
        except UserError as error:
            assert "flipped.pt" in str(error)
            refused += 1
        else:  # in the padding between the records
            assert all(torch.equal(weights[name], value) for name, value in tiny_unet.state_dict().items())
    assert refused > 30
