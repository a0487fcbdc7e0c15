"""Files from strangers, and damaged ones: reading one runs nothing in it, and is one line."""

import io
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, randomise

from minisiss.lab import checkpoint, published
from minisiss.lab.checkpoint import Checkpoint
from minisiss.lab.cli import UserError
from minisiss.schedule import NoiseSchedule
from minisiss.unet import UNet, UNetConfig

KEY = "conv_in.bias"  # of 4 numbers; the network of diffusers has the same name for it
NAN = float("nan")


class Exploit:
    """Unpickled by a reader that runs what it is told to, this leaves a mark."""

    def __reduce__(self):
        return exec, ("import sys; sys.exploited = True",)


class File:
    """A good file: a checkpoint of ours, or weights as diffusers names them."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.ours = kind == "ours"
        if self.ours:
            self.path = folder / "model.pt"
            model = randomise(UNet(UNetConfig(**TINY | dict(channels=(4, 8), norm_groups=2))))
            checkpoint.save(self.path, Checkpoint(model, NoiseSchedule.linear(), {}))
        else:
            shutil.copytree(ROOT / "tests/golden/mnist/unet", folder, dirs_exist_ok=True)
            self.path = folder / "diffusion_pytorch_model.bin"
        self.content = self.path.read_bytes()
        self.state = torch.load(self.path, weights_only=True)

    def load(self) -> dict[str, torch.Tensor]:
        if self.ours:
            return checkpoint.load(self.path).model.state_dict()
        return published.load(self.path.parent)[0].state_dict()

    def assert_refused(self, content: bytes) -> str:
        """With this content the file is refused in a line that names it, and runs nothing."""
        self.path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            self.load()
        line = str(caught.value)
        assert line.startswith(f"{self.path}: ") and "\n" not in line
        assert 10 < len(line) - len(str(self.path)) < 300
        assert not hasattr(sys, "exploited")
        return line


@pytest.fixture(params=["ours", "published"])
def file(request, tmp_path) -> File:
    return File(request.param, tmp_path)


def saved(state: object, save: Callable = torch.save, **options) -> bytes:
    file = io.BytesIO()
    save(state, file, **options)
    return file.getvalue()


def without_record(content: bytes, ending: str) -> bytes:
    """A zip file that lacks one of the records of another."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            if not name.endswith(ending):
                new.writestr(name, old.read(name))
    return file.getvalue()


def test_the_exploit_would_be_one():
    pickle.loads(pickle.dumps(Exploit()))
    assert sys.exploited  # else the tests below show nothing
    del sys.exploited


CONTENTS = {  # made of a good file's
    "empty": lambda good: b"",
    "cut in half": lambda good: good[: len(good) // 2],
    "without a record": lambda good: without_record(good, "data/0"),
    "without its pickle": lambda good: without_record(good, "data.pkl"),
    "text": lambda good: b"not a checkpoint",
    "a list": lambda good: saved([1, 2]),
    "another program's": lambda good: saved({"state_dict": {}, "epoch": 3}),
    "a Git LFS pointer": lambda good: b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
    "code, a pickle": lambda good: pickle.dumps(Exploit()),
    "code, by torch": lambda good: saved(Exploit()),
    "code, by old torch": lambda good: saved(Exploit(), _use_new_zipfile_serialization=False),
    "code, as a key": lambda good: saved({Exploit(): 0}),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_a_file_that_is_none_is_refused(name, file):
    file.assert_refused(CONTENTS[name](file.content))


@pytest.mark.filterwarnings("ignore")  # torch would rather have torch.export
def test_torchscript_is_refused_as_code(file):
    content = saved(torch.jit.script(torch.nn.Identity()), torch.jit.save)
    assert "which is code" in file.assert_refused(content)


WRONG_WEIGHTS = {
    "missing": {KEY: ...},
    "one more": {"more": torch.zeros(1)},
    "without a name": {3: torch.zeros(1)},
    "of another size": {KEY: torch.zeros(99)},
    "without numbers": {KEY: torch.zeros(4, device="meta")},
    "NaN": {KEY: torch.tensor([0, 0, 0, NAN])},
    "infinite": {KEY: torch.full((4,), float("-inf"))},
    "too large for float32": {KEY: torch.full((4,), 1e300, dtype=torch.float64)},
    "text": {KEY: "text"},
    "None": {KEY: None},
    "code": {KEY: Exploit()},
}


@pytest.mark.parametrize("name", WRONG_WEIGHTS)
def test_weights_that_do_not_fit_are_refused(name, file):
    weights = file.state["weights"] if file.ours else file.state
    weights |= WRONG_WEIGHTS[name]
    if weights.get(KEY) is ...:
        del weights[KEY]
    file.assert_refused(saved(file.state))


PARTS = ["config", "weights", "schedule", "made_by", "training"]
WRONG_STATES = [(part, value) for part in PARTS for value in (None, 3, ...)]
WRONG_STATES += [("weights", {}), ("schedule", {}), ("made_by", {"a": Exploit()})]
BETAS = [[], [0.0, 0.1], [0.1, 1.0], [-0.1], [1.5], [NAN], [[0.1, 0.2]], [0.9] * 1000]
WRONG_STATES += [("schedule", {"betas": torch.tensor(row)}) for row in BETAS]
WRONG_CONFIG = dict(
    image_size=["28", None, 27], image_channels=["1", None, 3], depth=[3], vocabulary=[-1, 7],
    channels=[(), "48", 4, (4, 6), (4, 7), ((4, 8),)], attention_levels=[(2,), ("0",), None],
    layers_per_block=[0, 10**6, "1"], head_channels=[3, "4"], norm_groups=[0, 3, "2", None],
)  # fmt: skip
for field, values in WRONG_CONFIG.items():
    WRONG_STATES += [("config", {field: value}) for value in values]


@pytest.mark.parametrize("part, value", WRONG_STATES, ids=lambda value: str(value)[:40])
def test_a_checkpoint_of_misfitting_parts_is_refused(part, value, tmp_path):
    file = File("ours", tmp_path)
    file.state[part] = value
    if part == "config" and isinstance(value, dict):
        file.state[part] = torch.load(file.path, weights_only=True)[part] | value
    if value is ...:
        del file.state[part]
    file.assert_refused(saved(file.state))


def test_a_flipped_bit_is_noticed_or_not_read(file):
    good, loaded = file.load(), 0
    generator = torch.Generator().manual_seed(0)
    for place in torch.randint(8 * len(file.content), (40,), generator=generator).tolist():
        flipped = bytearray(file.content)
        flipped[place // 8] ^= 1 << place % 8
        file.path.write_bytes(flipped)
        try:
            found = file.load()
        except UserError as error:
            assert str(error).startswith(f"{file.path}: ") and "\n" not in str(error)
        else:
            loaded += 1
            assert all(torch.equal(found[name], value) for name, value in good.items())
    assert loaded < 20  # nothing reads the padding in a zip file, for one
