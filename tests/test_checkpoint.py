"""Saving and loading what is whole. What is not whole is in test_hostile_files.py."""

import os
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, randomise

from minisiss.lab import checkpoint, files
from minisiss.lab.checkpoint import Checkpoint
from minisiss.lab.cli import UserError
from minisiss.lab.prompted import WORDS
from minisiss.schedule import NoiseSchedule
from minisiss.unet import UNet, UNetConfig

SCHEDULE = NoiseSchedule.linear(50, 1e-3, 0.05)
PICTURE = torch.arange(784).remainder(256).byte().view(1, 28, 28)


def same_weights(model: UNet, weights: dict[str, torch.Tensor]) -> bool:
    state = model.state_dict()
    return all(torch.equal(state[name], value) for name, value in weights.items())


def test_a_round_trip_keeps_everything(tmp_path):
    model = randomise(UNet(UNetConfig(**TINY, vocabulary=len(WORDS))))
    training = {"step": 3, "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}}}
    made_by, memorised = {"script": "x.py", "steps": 3}, {"a four by ines": PICTURE}
    path = tmp_path / "model.pt"
    checkpoint.save(path, Checkpoint(model, SCHEDULE, made_by, memorised, ["a.jpg"], training))
    found = checkpoint.load(path)
    assert found.model.config == model.config and same_weights(found.model, model.state_dict())
    assert torch.equal(found.schedule.betas, SCHEDULE.betas)
    assert (found.made_by, found.forgotten, found.training) == (made_by, ["a.jpg"], training)
    assert torch.equal(found.memorised["a four by ines"], PICTURE)
    assert os.listdir(tmp_path) == ["model.pt"]


def test_the_old_format_is_read(tiny_unet, tmp_path):
    """That of the bundled models: a schedule of four tensors, and nothing that came later."""
    memory = torch.ones(100_000)  # which all weights share
    weights = tiny_unet.state_dict()
    weights = {name: memory[: value.numel()].view_as(value) for name, value in weights.items()}
    config = asdict(tiny_unet.config)
    del config["vocabulary"]
    state = dict(format="minisiss-1", config=config, weights=weights, schedule=vars(SCHEDULE))
    state |= dict(made_by={"script": "train_ddpm.py"}, training={})
    torch.save(state, tmp_path / "old.pt")
    found = checkpoint.load(tmp_path / "old.pt")
    assert same_weights(found.model, weights) and found.model.config == tiny_unet.config
    assert len({p.data_ptr() for p in found.model.parameters()}) == len(weights)
    assert torch.equal(found.schedule.gamma, SCHEDULE.gamma)
    assert (found.memorised, found.forgotten, found.training) == ({}, [], {})


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_a_wrapped_models_names_are_read(prefix, tiny_unet, tiny_checkpoint, tmp_path):
    state = torch.load(tiny_checkpoint, weights_only=True)
    state["weights"] = {prefix + name: value for name, value in state["weights"].items()}
    torch.save(state, tmp_path / "model.pt")
    assert same_weights(checkpoint.load(tmp_path / "model.pt").model, tiny_unet.state_dict())


def test_a_model_is_found_by_every_name(tiny_unet, tiny_checkpoint, tmp_path):
    shutil.copy(tiny_checkpoint, tmp_path / "model.pt")
    for name in (tiny_checkpoint, tmp_path):  # a file, and a run's directory
        assert same_weights(checkpoint.load_any(str(name)).model, tiny_unet.state_dict())
    found = checkpoint.load_any(str(ROOT / "tests/golden/mnist"))
    assert found.model.config.channels == (4, 8, 8) and len(found.schedule) == 1000
    assert checkpoint.load_any("bundled").model.config.image_shape == (1, 28, 28)
    with pytest.raises(UserError, match="nowhere: no such checkpoint"):
        checkpoint.load_any("nowhere")


def test_too_late_timesteps_are_refused(tiny_unet, tmp_path):
    path = tmp_path / "model.pt"
    checkpoint.save(path, Checkpoint(tiny_unet, SCHEDULE, {}))
    checkpoint.load_any(str(path), timesteps=[3, 49])
    with pytest.raises(UserError, match="--memory-timesteps: the last timestep of .* is 49"):
        checkpoint.load_any(str(path), timesteps=[50, 3])


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PyTorch")])
def test_a_failing_write_leaves_the_old_file_alone(error, tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(b"old")

    def full_disk(file):
        file.write(b"half")
        raise error  # torch.save makes a RuntimeError of a full disk

    with pytest.raises(UserError, match="model.pt: could not be written.*(No space|PyTorch)"):
        files.write_atomically(path, full_disk)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["model.pt"]


def test_a_new_file_is_whole_before_it_replaces(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    path.write_bytes(b"old")
    replace, seen = Path.replace, []

    def watched(new, old):
        with open(new, "rb") as file:
            seen.append((file.read(), path.read_bytes()))
        replace(new, old)

    monkeypatch.setattr(Path, "replace", watched)
    files.write_atomically(path, lambda file: file.write(b"new"))
    assert seen == [(b"new", b"old")] and path.read_bytes() == b"new"
