"""Saving and loading what is whole; what is not is in test_hostile_files.py."""

import os
from argparse import Namespace

import pytest
import torch

from minisiss import presets
from minisiss.data.prompts import WORDS
from minisiss.errors import UserError
from minisiss.runs import checkpoint, files
from minisiss.schedule import NoiseSchedule
from minisiss.unet import UNet, UNetConfig

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


PICTURE = torch.arange(784, dtype=torch.int32).remainder(256).to(torch.uint8).reshape(1, 28, 28)
TINY = presets.PRESETS["mnist-tiny"]["unet"]


def test_memorised_pictures_come_back_by_their_prompts(prompted_unet, tmp_path):
    checkpoint.save(tmp_path / "model.pt", prompted_unet, SCHEDULE, {}, memorised={"a four by ines": PICTURE})
    found = checkpoint.load(tmp_path / "model.pt")
    assert list(found.memorised) == ["a four by ines"] and torch.equal(found.memorised["a four by ines"], PICTURE)
    assert found.model.config.vocabulary == len(WORDS)


def test_a_checkpoint_from_before_there_were_prompts_loads_bit_for_bit(tiny_unet, tmp_path):
    checkpoint.save(tmp_path / "model.pt", tiny_unet, SCHEDULE, {})
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    del state["config"]["vocabulary"], state["memorised"]
    torch.save(state, tmp_path / "old.pt")
    found = checkpoint.load(tmp_path / "old.pt")
    assert found.model.config == tiny_unet.config and found.memorised == {}
    assert all(torch.equal(value, tiny_unet.state_dict()[name]) for name, value in found.model.state_dict().items())


@pytest.mark.parametrize("words, memorised, reason", [
    (len(WORDS) + 1, {}, f"its vocabulary has {len(WORDS) + 1} words; expected {len(WORDS)}"),
    (len(WORDS), {"a four by nemo": PICTURE}, "prompt 'a four by nemo' is not of words"),
    (len(WORDS), {3: PICTURE}, "prompt '3' is not of words"),
    (len(WORDS), {"a four": PICTURE.float()}, "picture of 'a four' is none"),
    (len(WORDS), {"a four": PICTURE[0]}, "picture of 'a four' is none"),
    (len(WORDS), {"a four": "a four"}, "picture of 'a four' is none"),
    (len(WORDS), ["a four"], "should be a dict of pictures"),
    (len(WORDS), {str(i): PICTURE for i in range(10_000)}, "should be a dict of pictures"),  # more than the file has bytes for
])  # fmt: skip
def test_another_vocabulary_or_pictures_that_are_none_are_refused(words, memorised, reason, tmp_path):
    path = tmp_path / "model.pt"
    checkpoint.save(path, UNet(UNetConfig(**TINY, vocabulary=words)), SCHEDULE, {}, memorised=memorised)
    with pytest.raises(UserError, match=f"model.pt: the checkpoint does not fit together: .*{reason}"):
        checkpoint.load(path)


def begun(path, **changes):
    """The network that `train_ddpm.py --init` begins with."""
    settings = {**vars(UNetConfig(**TINY, vocabulary=len(WORDS))), "seed": 0, "checkpoint_activations": False}
    return checkpoint.untrained(Namespace(**{**settings, "data": "prompts", "init": str(path), **changes}))


def test_training_begins_with_the_weights_of_init_and_only_the_vocabulary_may_be_new(tiny_checkpoint, prompted_unet, tmp_path):
    given, random = checkpoint.load(tiny_checkpoint).model.state_dict(), begun("none").state_dict()
    for name, value in begun(tiny_checkpoint).state_dict().items():
        assert torch.equal(value, random[name] if name.startswith("prompt.") else given[name])
    checkpoint.save(tmp_path / "model.pt", prompted_unet, SCHEDULE, {})
    model = begun(tmp_path / "model.pt")
    assert all(torch.equal(value, prompted_unet.state_dict()[name]) for name, value in model.state_dict().items())
    with pytest.raises(UserError, match="--init bundled: its network is another one"):
        begun("bundled")
    with pytest.raises(UserError, match="--init .*model.pt: its network is another one"):
        begun(tmp_path / "model.pt", vocabulary=0, data="mnist")


@pytest.mark.parametrize("data, vocabulary, has", [("mnist", 94, 0), ("pictures", 3, 0), ("prompts", 0, len(WORDS)), ("prompts", 12, len(WORDS))])
def test_a_vocabulary_that_is_not_that_of_the_data_is_refused(data, vocabulary, has):
    with pytest.raises(UserError, match=f"--vocabulary {vocabulary}: --data {data} has {has} words"):
        begun("none", data=data, vocabulary=vocabulary)
