"""Saving and loading what is whole; what is not is in test_hostile_files.py."""

import os

import pytest
import torch

from minisiss.errors import UserError
from minisiss.runs import checkpoint, files
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


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_of_a_wrapped_or_compiled_model(tiny_unet, tmp_path, prefix):
    path = tmp_path / "model.pt"
    checkpoint.save(path, tiny_unet, SCHEDULE, {}, {name: value / 2 for name, value in tiny_unet.state_dict().items()})
    state = torch.load(path, weights_only=True)
    for part in ("weights", "ema"):
        state[part] = {prefix + name: value for name, value in state[part].items()}
    torch.save(state, path)
    found = checkpoint.load(path).model.state_dict()
    assert all(torch.equal(found[name], value / 2) for name, value in tiny_unet.state_dict().items())


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


def test_a_disk_that_fills_up_inside_torchs_writer_is_called_that(tiny_unet, tmp_path, monkeypatch):
    def full_disk(state, file):
        try:
            raise OSError(28, "No space left on device")
        finally:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(UserError, match="model.pt: could not be written .No space left on device"):
        checkpoint.save(tmp_path / "model.pt", tiny_unet, SCHEDULE, {})


def test_a_file_that_may_not_be_read_is_not_called_damaged(tiny_checkpoint, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(files.zipfile, "ZipFile", refuse)  # root may read everything
    with pytest.raises(UserError, match="model.pt: cannot be read .Permission denied.$"):
        checkpoint.load(tiny_checkpoint)


def test_the_new_file_is_whole_before_it_takes_the_old_ones_place(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    replace, seen = os.replace, []
    monkeypatch.setattr(files.os, "replace", lambda new, old: seen.append((open(new, "rb").read(), path.read_bytes())) or replace(new, old))
    files.write_atomically(path, lambda file: file.write(b"new"))
    assert seen == [(b"new", b"old")] and path.read_bytes() == b"new"
