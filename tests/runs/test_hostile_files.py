"""Files from strangers: loading one runs nothing in it, takes no memory that it merely claims, and follows no link out of it.

The promise about damage is: a byte that is missing or changed is noticed at load, or else nothing reads it.
"""

import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from conftest import ROOT, randomise

from minisiss import presets
from minisiss.errors import UserError
from minisiss.metrics.classifier import BUNDLED_CLASSIFIER
from minisiss.report import evaluation
from minisiss.runs import checkpoint, directory, pretrained
from minisiss.schedule import NoiseSchedule
from minisiss.unet import UNet, UNetConfig

NO_CHECKPOINT = "not a readable checkpoint"
CLAIM = b"J" + (2**29 - 1).to_bytes(4, "little")  # a number of float32 numbers, in a pickle
SMALL = {**presets.PRESETS["mnist-tiny"]["unet"], "channels": (4,), "norm_groups": 2}
ENORMOUS = {**presets.PRESETS["mnist-tiny"]["unet"], "image_size": 64, "channels": (1024,) * 3}  # 1.2 GB of weights


class Exploit:
    """Unpickled by a reader that runs what it is told to, this leaves a mark."""

    def __reduce__(self):
        return exec, ("import sys; sys.exploited = True",)


class Allocation:
    """2 GB out of a few bytes, by a function that torch.load trusts."""

    def __reduce__(self):
        return bytearray, (2**31,)


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    """A checkpoint with everything that one can hold: averaged weights, and the optimizer's state for --resume."""
    model = randomise(UNet(UNetConfig(**SMALL)))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    averaged = {name: value / 2 for name, value in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    training = {"step": 1, "seconds": 0.5, "optimizer": optimizer.state_dict()}
    path = tmp_path_factory.mktemp("whole") / "model.pt"
    checkpoint.save(path, model, NoiseSchedule.linear(), {"script": "train_ddpm.py"}, averaged, training)
    return path


@pytest.fixture(scope="session")
def files(tiny_checkpoint) -> dict[str, dict[str, bytes]]:
    return corpus(tiny_checkpoint)


def saved(state, **options) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that sparse tensors are in beta
        torch.save(state, file, **options)
    return file.getvalue()


def zipped(records: dict[str, bytes], bombs: dict[str, bytes] | None = None, copies: int = 1) -> bytes:
    """An archive of these records, in which the directory lists the last one several times.

    bombs: further records, compressed, of which the directory says that they are a hundred bytes long.
    """
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content)
        for name, content in (bombs or {}).items():
            archive.writestr(name, content, zipfile.ZIP_BZIP2, 1)  # which zipfile unpacks without a bound
            archive.filelist[-1].file_size = 100
        archive.filelist += archive.filelist[-1:] * (copies - 1)
    return file.getvalue()


def unzipped(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def scripted(network: torch.nn.Module) -> bytes:
    """A TorchScript file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would rather have torch.export
        return torch.jit.script(network).save_to_buffer()


def claiming(state: dict) -> bytes:
    """`state` as saved, but with a claim of 2 GB wherever the pickle speaks of 77 numbers: as a storage and as a size."""
    records = unzipped(saved(state))
    (name,) = (name for name in records if name.endswith("data.pkl"))
    records[name], found = re.subn(rb"K\x4d(?=t|\x85)", lambda match: CLAIM, records[name])
    assert found >= 2
    return zipped(records)


def corpus(good: Path) -> dict[str, dict[str, bytes]]:
    """What is no whole checkpoint, by name, under words that the error should have; made from a good one."""
    content, state = good.read_bytes(), torch.load(good, weights_only=True)
    records, weights, schedule, key = unzipped(content), state["weights"], state["schedule"], "conv_in.bias"

    def changed(part: str, **values) -> bytes:
        return saved({**state, part: {**state[part], **values}})

    def configured(name: str, value) -> bytes:
        return saved({**state, "weights": {}, "config": {**state["config"], name: value}})

    def without(old: dict, name: str) -> dict:
        return {key: value for key, value in old.items() if key != name}

    covered, endless, circular = OrderedDict(weights), [], {}
    covered.__dict__["keys"] = 1  # survives a pickle, and hides the dict's own
    for _ in range(40):
        endless = [endless, endless]
    circular["again"] = circular
    shapes = {name: value.shape for name, value in on_meta(ENORMOUS).state_dict().items()}
    one = torch.zeros(1)
    more = "archive/data/more"

    bad_configs = {
        "image_size": [0, -28, 10**9, 27.0, "28", None, True, [28]],
        "image_channels": [0, -1, 10**6, "1", None, True],
        "channels": [(), (8, -16), (8, 0), (8, 10**6), (8, 16.0), (True, 16), ("8", "16"), "88", 8, None, (8,) * 5000, (7, 14), (8, 18), ((8, 16),)],
        "layers_per_block": [0, -1, 10**6, 1.0, "1", None, True, (1, 1)],
        "attention_levels": [(2,), (-1,), (True,), (0.0,), ("0",), None, 0, "0", {0: 0}, (0,) * 5000],
        "head_channels": [0, -8, 3, 10**6, 8.0, "8", True],
        "norm_groups": [0, -4, 3, 10**6, 4.0, "4", None, True],
        "norm_eps": [0.0, -1e-5, float("nan"), float("inf"), 10.0, 1, "1e-5", None],
        "downsample_padding": [-1, 2, True, None],
        "flip_sin_to_cos": [2, "yes", None],
        "freq_shift": [-1, 2, 0.5, None],
    }
    rows = {
        "short": torch.full((3,), 0.5), "of integers": torch.ones(1000, dtype=torch.int64), "in float64": schedule["gamma"].double(),
        "not finite": torch.full((1000,), float("nan")), "two-dimensional": schedule["gamma"][:, None], "no tensor": [0.5] * 1000,
        "not from the betas": schedule["gamma"].flip(0), "expanded": torch.full((1,), 0.5).expand(2**29),
    }  # fmt: skip
    many = torch.full((100_001,), 1e-6)
    return {
        NO_CHECKPOINT: {
            **{f"cut off at {tenth} tenths": content[: len(content) * tenth // 10] for tenth in range(10)},
            "cut off by a byte": content[:-1],
            "without its beginning": content[1000:],
            "text": b"not a checkpoint",
            "JSON": b'{"format": "minisiss-1"}',
            "a picture": (ROOT / "minisiss/assets/tshirt.png").read_bytes(),
            "an empty archive": zipped({}),
            "an archive of text": zipped({"a.txt": b"b"}),
            "without a record of weights": zipped({name: content for name, content in records.items() if not name.endswith("data/7")}),
            "without the pickle": zipped({name: content for name, content in records.items() if not name.endswith("data.pkl")}),
            "with a second pickle": zipped({**records, "archive/DATA.PKL": pickle.dumps(0, 2)}),
            "with half a pickle": zipped({name: content[: len(content) // (1 + name.endswith("data.pkl"))] for name, content in records.items()}),
            "TorchScript": scripted(torch.nn.Identity()),
            "a whole module": saved(torch.nn.Linear(2, 2)),
            "a pickle": pickle.dumps({"format": "minisiss-1"}),
            "torch's old format": saved(state, _use_new_zipfile_serialization=False),
            "code, a pickle": pickle.dumps(Exploit()),
            "code, in torch's old format": saved(Exploit(), _use_new_zipfile_serialization=False),
            "code, beside a checkpoint": saved({**state, "made_by": Exploit()}),
            "code, among the weights": changed("weights", **{key: Exploit()}),
            "code, as a key": saved({**state, Exploit(): 0}),
            "bomb, compressed": zipped(records, {more: bytes(2**27)}),
            "bomb, one record many times": zipped({**records, more: bytes(2**20)}, copies=2000),
            "bomb, allocated by the pickle": saved({**state, "made_by": Allocation()}),
            "bomb, a size that is claimed": claiming({**state, "made_by": {"a": torch.zeros(77)}}),
            "bomb, claimed in torch's old format": saved({"a": torch.zeros(77)}, _use_new_zipfile_serialization=False).replace(b"K\x4d", CLAIM),
            "a sparse tensor": changed("weights", **{key: torch.zeros(8).to_sparse()}),
            "a tensor without numbers": changed("weights", **{key: torch.zeros(8, device="meta")}),
        },
        "not a minisiss checkpoint": {
            "a tensor": saved(torch.zeros(3)),
            "a list": saved([state]),
            "another format": saved({**state, "format": "minisiss-2"}),
            "a format that is a tensor": saved({**state, "format": torch.zeros(3)}),
            "another program's checkpoint": saved({"state_dict": weights, "epoch": 3, "optimizer_states": []}),
            "weights alone": saved(weights),
            "the classifier": BUNDLED_CLASSIFIER.read_bytes(),
        },
        "missing, or no dict": {
            f"{part} is {value}": saved({**state, part: value} if value is not ... else without(state, part))
            for part in ("config", "weights", "schedule", "made_by", "training")
            for value in (None, [], 3, ...)
        } | {"ema is a tensor": saved({**state, "ema": torch.zeros(3)}), "ema is text": saved({**state, "ema": "weights"})},
        "does not fit together": {
            "an unknown config": changed("config", depth=3),
            "a config without text for names": saved({**state, "config": {3: 3}}),
            "weights whose methods are covered up": saved({**state, "weights": covered}),
            "made by a tensor": changed("made_by", a=torch.zeros(1)),
            "made by itself": saved({**state, "made_by": circular}),
            "bomb, made by lists in lists": changed("made_by", a=endless),
        },
        "lacks conv_in.bias, of shape [8]": {
            "a key missing": saved({**state, "weights": without(weights, key)}),
            "a key missing of the average": saved({**state, "ema": without(weights, key)}),
        },
        "holds more, for which": {"a key left over": changed("weights", more=torch.zeros(1)), "a key left over in the average": saved({**state, "ema": {**weights, "more": 0}})},
        "conv_in.bias has shape": {
            "a wrong shape": changed("weights", **{key: torch.zeros(99)}),
            "a wrong number of dimensions": changed("weights", **{key: torch.zeros(8, 1)}),
            "no dimensions": changed("weights", **{key: torch.tensor(1.0)}),
            "bomb, a number many times": changed("weights", **{key: one.expand(2**29)}),
        },
        "conv_in.bias is no tensor of floating-point numbers": {
            f"weights of type {value.dtype if isinstance(value, torch.Tensor) else value}": changed("weights", **{key: value})
            for value in (weights[key].int(), weights[key].to(torch.complex64), weights[key].bool(), "text", None, [0.0] * 8)
        },
        "conv_in.bias holds numbers that are not finite": {
            "weights NaN": changed("weights", **{key: torch.full((8,), float("nan"))}),
            "weights infinite": changed("weights", **{key: torch.full((8,), float("-inf"))}),
            "weights too large for float32": changed("weights", **{key: torch.full((8,), 1e300, dtype=torch.float64)}),
            "an average that is NaN": saved({**state, "ema": {**weights, key: torch.full((8,), float("nan"))}}),
        },
        "too small for the": {
            "bomb, an enormous network": saved({**state, "config": ENORMOUS}),
            "bomb, an enormous network whose weights are one number": saved(
                {**state, "config": ENORMOUS, "ema": None, "weights": {name: one.expand(shape) for name, shape in shapes.items()}}
            ),
        },
        **{name: {f"{name} = {value!r}"[:60]: configured(name, value) for value in values} for name, values in bad_configs.items()},
        "betas should be": {
            "no betas": saved({**state, "schedule": without(schedule, "betas")}),
            "betas above 1": changed("schedule", betas=torch.full((1000,), 1.5)),
            "betas 0": changed("schedule", betas=torch.zeros(1000)),
            "betas NaN": changed("schedule", betas=torch.full((1000,), float("nan"))),
            "betas in a square": changed("schedule", betas=torch.full((10, 10), 0.1)),
            "betas none": changed("schedule", betas=torch.zeros(0)),
            "betas integers": changed("schedule", betas=torch.ones(1000, dtype=torch.int64)),
            "betas too many": saved({**state, "schedule": vars(NoiseSchedule.from_betas(many))}),
            "bomb, betas a number many times": changed("schedule", betas=torch.full((1,), 0.5).expand(2**29)),
        },
        "nothing of the image": {"betas that leave nothing": changed("schedule", betas=torch.full((1000,), 0.9))},
        "schedule should hold": {"a row missing": saved({**state, "schedule": without(schedule, "gamma")}), "a row left over": changed("schedule", more=0)},
        "gamma do not follow": {f"a row {name}": changed("schedule", gamma=row) for name, row in rows.items()},
    }  # fmt: skip


def on_meta(config: dict) -> UNet:
    with torch.device("meta"):
        return UNet(UNetConfig(**config))


def one_line(error: UserError, path: Path, *words: str) -> bool:
    """Whether an error is a line of sensible length that begins with the file, or the one in the directory, and has these words."""
    line = " ".join(str(error).split())
    start, _, reason = line.partition(": ")
    return start.startswith(str(path)) and 10 < len(reason) < 400 and all(word in reason for word in words)


def wrong_among(files: dict[str, dict[str, bytes]], path: Path, load) -> dict[str, str]:
    """Those of the files, written to `path`, that `load` takes, or refuses in other words than it should."""
    wrong = {}
    for words, contents in files.items():
        for name, content in contents.items():
            path.write_bytes(content)
            try:
                load(path)
                wrong[name] = "loaded"
            except UserError as error:
                if not one_line(error, path, words):
                    wrong[name] = str(error)
    return wrong


def test_what_is_no_whole_checkpoint_is_refused_in_a_line_that_says_why(files, tmp_path):
    assert wrong_among(files, tmp_path / "bad.pt", checkpoint.load) == {}
    assert not hasattr(sys, "exploited")


def test_the_exploit_would_be_one(tmp_path):
    """Else the test above shows nothing."""
    pickle.loads(pickle.dumps(Exploit()))
    assert sys.exploited
    del sys.exploited


def alike(a, b) -> bool:
    """Whether two checkpoints, or parts of them, are exactly the same."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


def parts(path: Path) -> dict:
    """All that there is in a checkpoint."""
    found = checkpoint.load(path)
    return {**vars(found), "model": found.model.state_dict(), "config": found.model.config, "schedule": vars(found.schedule)}


def contents(path: Path) -> list[range]:
    """The places of a zip file in which its records' contents lie; between them are headers and padding."""
    places = []
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for record in archive.infolist():
            file.seek(record.header_offset + 26)
            name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
            begin = record.header_offset + 30 + name + extra
            places.append(range(begin, begin + record.file_size))
    return places


def test_a_bit_flipped_in_what_is_read_is_an_error_and_elsewhere_changes_nothing_at_all(whole, tmp_path):
    """Elsewhere is: the padding between records, and fields of the zip format such as dates, which torch does not look at."""
    original, content, path = parts(whole), whole.read_bytes(), tmp_path / "flipped.pt"
    loaded = []
    for place in torch.randint(8 * len(content), (200,), generator=torch.Generator().manual_seed(0)).tolist():
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            found = parts(path)
        except UserError as error:
            assert one_line(error, path)
        else:
            loaded.append(place // 8)
            assert alike(found, original), place
    read = contents(whole)
    assert 0 < len(loaded) < 60 and not any(place in record for place in loaded for record in read)


def test_weights_that_share_memory_in_the_file_do_not_in_the_model(whole, tmp_path):
    state = torch.load(whole, weights_only=True)
    state["weights"]["conv_in.bias"] = state["weights"]["up.0.blocks.0.0.norm2.bias"]
    state["ema"] = None
    torch.save(state, tmp_path / "model.pt")
    model = checkpoint.load(tmp_path / "model.pt").model
    assert torch.equal(model.conv_in.bias, model.up[0]["blocks"][0][0].norm2.bias)
    storages = [parameter.untyped_storage() for parameter in model.parameters()]
    assert len({storage.data_ptr() for storage in storages}) == len(storages)
    assert all(storage.nbytes() == 4 * p.numel() for storage, p in zip(storages, model.parameters(), strict=True))


def test_a_file_that_changes_after_it_was_loaded_changes_nothing(whole, tmp_path):
    path = Path(shutil.copy(whole, tmp_path))
    original, found = parts(whole), checkpoint.load(path)
    moments = checkpoint.load_training(path, found.model, 1)["moments"]
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert alike(found.model.state_dict(), original["model"]) and alike(vars(found.schedule), original["schedule"])
    assert alike(moments, original["training"]["optimizer"]["state"])


# The part for --resume.


def broken_training(whole: Path) -> dict[str, dict[str, bytes]]:
    """Checkpoints that load, and cannot be continued; by name, under words that the error should have."""
    state = torch.load(whole, weights_only=True)
    training = state["training"]
    optimizer = training["optimizer"]

    def changed(**values) -> bytes:
        return saved({**state, "training": {key: value for key, value in {**training, **values}.items() if value is not ...}})

    def moment(place, name: str, value) -> bytes:
        return changed(optimizer={**optimizer, "state": {**optimizer["state"], place: {**optimizer["state"][0], name: value}}})

    large, nan = optimizer["state"][0]["exp_avg"].shape, torch.full((4,), float("nan"))
    return {
        "cannot be continued, it holds no optimizer state": {
            "nothing": saved({**state, "training": {}}),
            **{f"no {name}": changed(**{name: ...}) for name in training},
            **{f"optimizer {value}": changed(optimizer=value) for value in (None, [], 3, torch.zeros(3))},
        },
        "no numbers of steps": {
            **{f"step {value}": changed(step=value) for value in (-1, 1.0, True, None, "1", torch.tensor(1))},
            **{f"seconds {value}": changed(seconds=value) for value in (-1.0, float("nan"), float("inf"), None, "1", torch.tensor(1.0))},
        },
        "none of AdamW's": {
            **{f"optimizer {value}": changed(optimizer=value) for value in ({}, {"state": None}, {"state": [1]})},
            "a state of numbers": changed(optimizer={"state": {0: 1}}),
        },
        "lacks step of parameter 0": {"step without state": changed(optimizer={"state": {}}), "a state by name": changed(optimizer={"state": {"weight": {}}})},
        "lacks exp_avg of parameter 1": {"half a state": changed(optimizer={"state": {0: optimizer["state"][0], 1: {"step": torch.tensor(1.0)}}})},
        "of parameter 999, for which": {"a parameter left over": moment(999, "step", torch.tensor(1.0))},
        "holds max_exp_avg_sq of parameter 0": {"another optimizer": moment(0, "max_exp_avg_sq", torch.zeros(large))},
        "exp_avg of parameter 0 has shape": {"a wrong shape": moment(0, "exp_avg", torch.zeros(3)), "bomb": moment(0, "exp_avg", torch.zeros(1).expand(2**29))},
        "step of parameter 0 has shape [1]": {"a step in a list": moment(0, "step", torch.zeros(1))},
        "exp_avg of parameter 0 is no tensor": {f"exp_avg of type {type(value)}": moment(0, "exp_avg", value) for value in (None, 0.0, "0", torch.zeros(large).int())},
        "step of parameter 0 is no tensor": {"a step that is a number": moment(0, "step", 1)},
        "conv_in.bias holds numbers that are not": {"NaN beside a good average": saved({**state, "weights": {**state["weights"], "conv_in.bias": nan}})},
        "exp_avg_sq of parameter 0 holds numbers that are not": {"NaN": moment(0, "exp_avg_sq", torch.full(large, float("nan")))},
    }  # fmt: skip


def test_a_checkpoint_that_cannot_be_continued_is_refused_in_a_line_that_says_why(whole, tmp_path):
    model = on_meta(SMALL)
    assert wrong_among(broken_training(whole), tmp_path / "bad.pt", lambda path: checkpoint.load_training(path, model, 100)) == {}
    other = on_meta({**presets.PRESETS["mnist-tiny"]["unet"], "channels": (8, 8)})
    with pytest.raises(UserError, match="its network is not the one"):
        checkpoint.load_training(whole, other, 100)


def test_the_optimizers_state_comes_back_as_it_was_in_memory_of_its_own(whole):
    state = torch.load(whole, weights_only=True)
    moments = checkpoint.load_training(whole, on_meta(SMALL), 1)["moments"]
    assert alike(moments, state["training"]["optimizer"]["state"])
    storages = [tensor.untyped_storage() for tensors in moments.values() for tensor in tensors.values()]
    assert len({storage.data_ptr() for storage in storages}) == len(storages) and all(storage.nbytes() < 10**6 for storage in storages)


# Directories in diffusers' format. What their configs may say is in test_pretrained.py.


@pytest.fixture
def published(tiny_unet, tmp_path) -> Path:
    pretrained.save_pretrained(tmp_path / "published", tiny_unet, NoiseSchedule.linear())
    return tmp_path / "published"


def published_corpus(weights_file: Path) -> dict[str, dict[str, bytes]]:
    """What is no file of weights in diffusers' names, by name, under words that the error should have."""
    content, weights = weights_file.read_bytes(), torch.load(weights_file, weights_only=True)
    records, key = unzipped(content), "conv_in.bias"
    more = next(iter(records)).split("/")[0] + "/data/more"
    return {
        "not a readable file of weights": {
            **{f"cut off at {tenth} tenths": content[: len(content) * tenth // 10] for tenth in range(10)},
            "code, a pickle": pickle.dumps(Exploit()),
            "code, in torch's old format": saved({**weights, key: Exploit()}, _use_new_zipfile_serialization=False),
            "code, among the weights": saved({**weights, key: Exploit()}),
            "TorchScript": scripted(torch.nn.Identity()),
            "torch's old format": saved(weights, _use_new_zipfile_serialization=False),
            "bomb, compressed": zipped(records, {more: bytes(2**27)}),
            "bomb, one record many times": zipped({**records, more: bytes(2**20)}, copies=2000),
            "bomb, allocated by the pickle": saved({**weights, "more": Allocation()}),
            "bomb, a size that is claimed": claiming({**weights, key: torch.zeros(77)}),
            "a sparse tensor": saved({**weights, key: torch.zeros(8).to_sparse()}),
        },
        "conv_in.bias has shape": {"bomb, a number many times": saved({**weights, key: torch.zeros(1).expand(2**29)})},
        "conv_in.bias holds numbers that are not finite": {"NaN": saved({**weights, key: torch.full((8,), float("nan"))})},
        "conv_in.bias is no tensor": {"complex": saved({**weights, key: weights[key].to(torch.complex64)})},
    }


def test_weights_that_are_none_are_refused_in_a_line_that_says_why(published):
    path = published / "diffusion_pytorch_model.bin"
    files = published_corpus(path)

    def load(path: Path) -> None:
        pretrained.load_pretrained(published)

    assert wrong_among(files, path, load) == {}
    assert not hasattr(sys, "exploited")


def test_a_bit_flipped_in_published_weights_is_an_error_or_changes_nothing(published):
    path = published / "diffusion_pytorch_model.bin"
    original, content = pretrained.load_pretrained(published)[0].state_dict(), path.read_bytes()
    for place in torch.randint(8 * len(content), (40,), generator=torch.Generator().manual_seed(1)).tolist():
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            assert alike(pretrained.load_pretrained(published)[0].state_dict(), original)
        except UserError as error:
            assert one_line(error, path)


@pytest.mark.parametrize(
    "file, text, word",
    [
        ("config.json", "[" * 100_000, ""),
        ("config.json", '{"sample_size": ' + "9" * 5000 + "}", ""),
        ("config.json", {"norm_eps": float("nan")}, "norm_eps"),
        ("config.json", {"norm_eps": -1.0}, "norm_eps"),
        ("config.json", {"sample_size": 10**9}, "sample_size"),
        ("config.json", {"sample_size": -28}, "sample_size"),
        ("config.json", {"block_out_channels": [4096] * 5000}, "at most 13"),
        ("config.json", {"block_out_channels": [8, 10**9]}, "channels"),
        ("config.json", {"layers_per_block": 17}, "layers_per_block"),
        ("scheduler_config.json", "[" * 100_000, ""),
        ("scheduler_config.json", {"num_train_timesteps": 10**9}, "num_train_timesteps"),
        ("scheduler_config.json", {"beta_start": float("nan")}, "beta_start"),
        ("scheduler_config.json", {"beta_start": 0.9, "beta_end": 0.9}, "nothing of the image"),
    ],
)
def test_absurd_values_in_published_configs_are_one_line(published, file, text, word):
    if isinstance(text, dict):
        text = json.dumps(json.loads((published / file).read_text()) | text)
    (published / file).write_text(text)
    with pytest.raises(UserError) as caught:
        pretrained.load_pretrained(published)
    assert one_line(caught.value, published / file, word), caught.value


@pytest.mark.parametrize("linked", ["unet", "unet/config.json", "unet/diffusion_pytorch_model.bin", "unet/scheduler_config.json", "scheduler"])
def test_a_link_out_of_the_directory_is_not_followed(published, linked, tmp_path):
    """One within the directory is, and the directory may itself be a link."""
    model = tmp_path / "model"
    model.mkdir()
    shutil.move(published, model / "unet")
    if linked == "scheduler":
        (model / "scheduler").mkdir()
        (model / "unet/scheduler_config.json").rename(model / "scheduler/scheduler_config.json")
    for target in (model / "elsewhere", tmp_path / "elsewhere"):
        path = model / linked
        path.resolve().rename(target)
        path.unlink(missing_ok=True)
        path.symlink_to(target)
        if target.parent == model:
            (tmp_path / "link").symlink_to(model)
            pretrained.load_pretrained(tmp_path / "link")
    with pytest.raises(UserError) as caught:
        pretrained.load_pretrained(model)
    assert one_line(caught.value, path, "is a link out of"), caught.value


@pytest.mark.parametrize("linked", ["scheduler", "scheduler/scheduler_config.json"])
def test_a_link_out_of_the_folder_with_the_schedule_beside_the_network_is_not_followed(published, linked, tmp_path):
    """And the weights stay in the directory that was given, as ever."""
    model = tmp_path / "model"
    (model / "scheduler").mkdir(parents=True)
    shutil.move(published, model / "unet")
    (model / "unet/scheduler_config.json").rename(model / "scheduler/scheduler_config.json")
    pretrained.load_pretrained(model / "unet")
    path = model / linked
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError) as caught:
        pretrained.load_pretrained(model / "unet")
    assert one_line(caught.value, model / "scheduler/scheduler_config.json", "is a link out of"), caught.value
    path.unlink()
    (model / "unet/config.json").rename(model / "config.json")
    (model / "unet/config.json").symlink_to(model / "config.json")
    with pytest.raises(UserError) as caught:
        pretrained.load_pretrained(model / "unet")
    assert one_line(caught.value, model / "unet/config.json", "is a link out of"), caught.value


# Memory, and the scripts.


def test_nothing_takes_the_memory_that_it_claims(whole, files, published, tmp_path):
    """In a program of its own, whose most memory is only that of loading these files: each claims at least 128 MB."""
    bombs = {name: content for contents in files.values() for name, content in contents.items() if name.startswith("bomb")}
    assert len(bombs) > 9
    paths = [published, whole]
    for number, content in enumerate(bombs.values()):
        paths.append(tmp_path / f"bomb-{number}.pt")
        paths[-1].write_bytes(content)
    for name, content in published_corpus(published / "diffusion_pytorch_model.bin")["not a readable file of weights"].items():
        if name.startswith("bomb"):
            paths.append(Path(shutil.copytree(published, tmp_path / name)))
            (paths[-1] / "diffusion_pytorch_model.bin").write_bytes(content)
    enormous = Path(shutil.copytree(published, tmp_path / "enormous"))
    config = json.loads((enormous / "config.json").read_text())
    config |= {"sample_size": 64, "block_out_channels": [1024] * 3, "down_block_types": ["DownBlock2D"] * 3, "up_block_types": ["UpBlock2D"] * 3}
    (enormous / "config.json").write_text(json.dumps(config))
    paths.append(enormous)
    program = """
import sys, torch
from minisiss.runs import checkpoint, pretrained
from minisiss.study.bench import peak_bytes  # not the portable figure alone, which can start from that of the parent
from minisiss.errors import UserError
cpu = torch.device("cpu")
for path in sys.argv[1:]:
    try:
        (checkpoint.load if path.endswith(".pt") else pretrained.load_pretrained)(path)
        before = peak_bytes(cpu)
    except UserError:
        print("refused")
print(peak_bytes(cpu) - before)
"""
    done = subprocess.run([sys.executable, "-c", program, *map(str, paths)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *refused, more = done.stdout.split()
    assert refused == ["refused"] * (len(paths) - 2) and int(more) < 64 * 2**20


SOME = [
    ("unlearn", "cut off at 5 tenths"),
    ("unlearn", "code, beside a checkpoint"),
    ("unlearn", "torch's old format"),
    ("unlearn", "bomb, one record many times"),
    ("unlearn", "weights NaN"),
    ("unlearn", "a wrong shape"),
    ("unlearn", "bomb, an enormous network"),
    ("eval", "TorchScript"),
    ("eval", "norm_groups = 0"),
    ("eval", "layers_per_block = 1000000"),
    ("eval", "a row short"),
    ("eval", "another program's checkpoint"),
    ("eval", "made by itself"),
]


@pytest.mark.parametrize("name, bad", SOME)
def test_the_scripts_say_it_in_one_line_and_leave_nothing_behind(name, bad, files, script, tmp_path):
    (tmp_path / "bad.pt").write_bytes(next(contents[bad] for contents in files.values() if bad in contents))
    status, _, error = script(name, "--checkpoint", "bad.pt")
    assert status == 2 and error.count("\n") == 1 and "error: bad.pt: " in error, error
    assert os.listdir(tmp_path) == ["bad.pt"]


@pytest.fixture
def run(whole, tmp_path):
    """The directory of a run of a script as a stranger may have left it: run("unlearn", model.pt's content)."""

    def make(name: str, content: bytes | None = None) -> Path:
        preset = presets.PRESETS["mnist-tiny"]
        config = {"preset": "mnist-tiny", "data_root": "bundled", "seed": 0}
        config |= SMALL | preset["train"] if name == "train_ddpm" else preset["unlearn"] | {"checkpoint": str(whole)}
        (tmp_path / "run").mkdir()
        (tmp_path / "run/config.json").write_text(json.dumps(config))
        (tmp_path / "run/model.pt").write_bytes(content or whole.read_bytes())
        return tmp_path / "run"

    return make


@pytest.mark.parametrize("name, bad", [("train_ddpm", "half a state"), ("train_ddpm", "a wrong shape"), ("unlearn", "seconds -1.0"), ("unlearn", "NaN")])
def test_a_run_that_cannot_be_continued_is_one_line_and_stays_as_it_was(name, bad, whole, run, script):
    content = next(contents[bad] for contents in broken_training(whole).values() if bad in contents)
    directory = run(name, content)
    status, _, error = script(name, "--resume", "run")
    assert status == 2 and error.count("\n") == 1 and "error: run/model.pt: " in error, error
    assert sorted(os.listdir(directory)) == ["config.json", "model.pt"] and (directory / "model.pt").read_bytes() == content


@pytest.mark.parametrize("name", ["train_ddpm", "unlearn"])
def test_a_run_is_not_continued_to_before_where_it_is(name, whole, run, script):
    state = torch.load(whole, weights_only=True)
    run(name, saved({**state, "training": {**state["training"], "step": 5}}))
    status, _, error = script(name, "--resume", "run", "--steps", 4)
    assert status == 2 and error.count("\n") == 1 and "--steps 4: run/model.pt has taken 5 already" in error, error


@pytest.mark.parametrize("text", ['{"step": 1}\n{"step": \n', "[1]\n", "3\n", '{"step": "1"}\n', '{"loss": 1}\n', "[" * 10**5 + "\n"])
def test_metrics_that_are_none_are_one_line_too(text, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError) as caught:
        directory.read_metrics(tmp_path)
    assert one_line(caught.value, tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("name", ["train_ddpm", "unlearn"])
def test_metrics_that_are_none_stop_a_run_before_it_goes_on(name, run, script):
    path = run(name) / "metrics.jsonl"
    path.write_text("no JSON\n")
    status, _, error = script(name, "--resume", "run")
    assert status == 2 and error.count("\n") == 1 and "run/metrics.jsonl: " in error, error
    assert path.read_text() == "no JSON\n"


def test_a_last_line_of_metrics_that_was_cut_off_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert directory.read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]
    directory.cut_metrics(tmp_path, 1)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


# What eval.py reads besides.


@pytest.mark.parametrize(
    "change",
    [
        {"settings": []}, {"settings": {}}, {"settings": {"steps": "20", "method": "siss"}}, {"settings": {"steps": 20, "method": ["siss"]}},
        {"settings": {"steps": 20}}, {"steps": "20"}, {"steps": None}, {"seconds": "1"}, {"script": ...},
    ],
)  # fmt: skip
def test_a_run_that_does_not_say_how_it_was_made_is_refused(change, whole, run):
    state = torch.load(whole, weights_only=True)
    made_by = {"script": "unlearn.py", "settings": {"steps": 20, "method": "siss"}, "steps": 20, "seconds": 1.0} | change
    made_by = {name: value for name, value in made_by.items() if value is not ...}
    directory = run("unlearn", saved({**state, "made_by": made_by}))
    with pytest.raises(UserError, match="model.pt: does not say how it was made"):
        evaluation.find_run(str(directory), [500])


@pytest.mark.parametrize("bad", [torch.zeros(2, 1, 28, 28, dtype=torch.uint8), torch.zeros(4, 1, 28, 28), [1], Exploit(), Allocation(), None])
def test_samples_in_a_runs_directory_that_are_not_what_they_should_be_are_drawn_again(bad, run):
    directory = run("unlearn")
    found = evaluation.Run("run", directory, (1, 28, 28), "run/model.pt", "digest", {}, 1, 1.0)
    args = Namespace(samples=4, sampling_steps=1, eta=0.0, seed=0, precision="fp32")

    def draw() -> torch.Tensor:
        return evaluation.kept_samples(args, found, lambda x, timesteps: x / 2, NoiseSchedule.linear())

    samples = draw()
    (path,) = directory.glob("samples-*.pt")
    path.write_bytes(saved(bad) if bad is not None else saved(samples)[:500])
    assert torch.equal(draw(), samples) and not hasattr(sys, "exploited")
    assert torch.load(path, weights_only=True).shape == (4, 1, 28, 28)


# TorchScript is code. What else is wrong with such files is in test_eval.py.


def test_torchscript_is_loaded_for_its_flags_only_and_the_help_says_what_it_is(files, published, script, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: loaded.append(1))
    (tmp_path / "network.pt").write_bytes(scripted(torch.nn.Identity()))
    shutil.copy(tmp_path / "network.pt", published / "diffusion_pytorch_model.bin")
    for path in ("network.pt", "published"):
        status, _, error = script("eval", "--checkpoint", path)
        assert status == 2 and error.count("\n") == 1 and "not a readable" in error
    assert not loaded
    _, said, _ = script("eval", "--help")
    assert " ".join(said.split()).count("TorchScript file") == 2 and "is code, take it only from whom you trust" in " ".join(said.split())


@pytest.mark.parametrize("flag", ["--sscd", "--inception"])
@pytest.mark.parametrize("tenths", [0, 3, 9])
def test_torchscript_that_is_cut_off_is_one_line(flag, tenths, script, tmp_path):
    content = scripted(torch.nn.Linear(20, 20))
    (tmp_path / "network.pt").write_bytes(content[: len(content) * tenths // 10])
    status, _, error = script("eval", "bundled", flag, "network.pt", "--samples", 10)
    assert status == 2 and error.count("\n") == 1 and f"{flag} network.pt: not a TorchScript file" in error, error
    assert os.listdir(tmp_path) == ["network.pt"]
