"""A folder of pictures as a training set, and pictures that are none."""

import os
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image

from minisiss.lab import data
from minisiss.lab.cli import UserError
from minisiss.lab.data import ASSETS, ImageFolder, read_picture

SHAPE = (3, 16, 16)
COLOURS = {"b.png": (255, 0, 0), "a picture.png": (0, 255, 0), "deeper/c.webp": (0, 0, 255)}
COLOURS |= {"ä.jpeg": (200, 200, 200), "d.PNG": (9, 9, 9)}
NAMES = ["a picture.png", "b.png", "d.PNG", "deeper/c.webp", "ä.jpeg"]


@pytest.fixture
def colours(tmp_path):
    """A folder with a picture of each colour, and a file that is no picture."""
    root = tmp_path / "colours"
    (root / "deeper").mkdir(parents=True)
    for name, colour in COLOURS.items():
        Image.new("RGB", (40, 30), colour).save(root / name, lossless=True)
    (root / "notes.txt").write_text("not a picture")
    return root


def colours_of(pictures: torch.Tensor) -> list[tuple[int, ...]]:
    """The mean colour of each picture."""
    means = pictures.float().mean(dim=(-2, -1)).round().int().tolist()
    return [tuple(mean) for mean in means]


def load(root, *forget: str) -> data.TrainingSet:
    args = Namespace(data="pictures", data_root=str(root), forget=list(forget), seed=0)
    return data.load_training_set(args, SHAPE, torch.device("cpu"))


def test_pictures_are_sorted_by_name_and_indexed(colours):
    pictures = ImageFolder(str(colours), SHAPE, [])
    assert pictures.names == NAMES
    assert pictures.shape == (5, *SHAPE) and len(pictures) == 5
    batch = pictures[torch.tensor([3, 0, 0])]
    assert batch.shape == (3, *SHAPE) and batch.dtype == torch.uint8
    assert colours_of(batch) == [(0, 0, 255), (0, 255, 0), (0, 255, 0)]
    part = pictures[1:4]
    assert part.names == NAMES[1:4] and colours_of(part[torch.tensor([2])]) == [(0, 0, 255)]


def test_the_forget_set_is_last_the_rest_kept(colours):
    x = load(colours, "b.png", "ä.jpeg")
    assert (x.n, x.k) == (5, 2) and "b.png" in x.name and "ä.jpeg" in x.name
    assert colours_of(x.forget[torch.arange(2)]) == [(255, 0, 0), (200, 200, 200)]
    drawn = data.to_uint8(x.draw("rest", 40, data.step_generator(0, 0, "cpu")))
    assert set(colours_of(drawn)) == {(0, 255, 0), (9, 9, 9), (0, 0, 255)}
    assert x.fingerprint() == load(colours, "b.png", "ä.jpeg").fingerprint()
    assert x.fingerprint() != load(colours, "ä.jpeg", "d.PNG").fingerprint()


def test_a_picture_is_its_middle_square_not_flipped(tmp_path):
    stripes = np.zeros((32, 64, 3), dtype=np.uint8)
    stripes[:, 16:32, 0] = 255  # the left half of the middle square
    stripes[:, :16, 1] = stripes[:, 48:, 1] = 255  # what lies outside it
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    red, green, _ = read_picture(tmp_path / "stripes.png", SHAPE)
    # At the border a smooth resize takes in a little of what lies beyond.
    assert red[:, 1:7].min() == 255 and red[:, 9:].max() == 0 and green[:, 1:15].max() == 0


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_a_turned_picture_is_turned_back(ending, tmp_path):
    half = Image.fromarray(np.repeat([[255] * 16 + [0] * 16], 32, axis=0).astype(np.uint8))
    exif = Image.Exif()
    exif[274] = 3  # upside down
    path = tmp_path / f"turned.{ending}"
    half.save(path, exif=exif)
    picture = read_picture(path, (1, 16, 16))
    assert picture[0, :, 10:].min() > 240 and picture[0, :, :6].max() < 15


def test_grey_and_colour_are_as_the_network_wants(tmp_path):
    path = tmp_path / "x.png"
    Image.new("RGB", (20, 20), (200, 100, 0)).save(path)
    grey = round(0.299 * 200 + 0.587 * 100)  # ITU-R 601, as Pillow computes it
    assert colours_of(read_picture(path, (1, 16, 16))[None]) == [(grey,)]
    Image.new("L", (20, 20), 70).save(tmp_path / "grey.png")
    assert colours_of(read_picture(tmp_path / "grey.png", SHAPE)[None]) == [(70, 70, 70)]


def test_hidden_files_and_folders_are_no_data(colours):
    (colours / ".checkpoints").mkdir()
    for name in (".checkpoints/b.png", "._b.png", ".thumbnail.jpg"):
        (colours / name).write_bytes((colours / "b.png").read_bytes())
    assert ImageFolder(str(colours), SHAPE, []).names == NAMES


def test_links_are_followed(colours, tmp_path):
    os.symlink("b.png", colours / "e.png")
    os.symlink("deeper", colours / "linked")
    os.symlink(colours, tmp_path / "root")
    names = ImageFolder(str(tmp_path / "root"), SHAPE, []).names
    assert names == sorted([*NAMES, "e.png", "linked/c.webp"])


PNG = (ASSETS / "tshirt.png").read_bytes()
DAMAGED = {
    "empty": b"",
    "cut off": PNG[:300],
    "a chunk of another length": PNG[:35] + b"\0" + PNG[36:],
    "a pickle": b"\x80\x04\x95\x1e\0\0\0\0\0\0\0\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_picture_is_named_in_one_line(name, colours):
    (colours / "broken ü.jpg").write_bytes(DAMAGED[name])
    x = load(colours, "b.png", "broken ü.jpg")
    with pytest.raises(UserError, match="broken ü.jpg: not a readable picture") as caught:
        x.different_forgotten()  # no other picture stands in for it
    assert "\n" not in str(caught.value)


def test_a_kept_copy_of_what_goes_is_refused(colours):
    (colours / "copy.png").write_bytes((colours / "b.png").read_bytes())
    with pytest.raises(UserError, match="copy.png: is a copy of a picture to forget"):
        load(colours, "b.png")
    assert load(colours, "b.png", "copy.png").k == 2
    assert load(colours, "d.PNG").k == 1  # copies among the kept do no harm


def test_what_was_forgotten_before_is_said_when_kept(colours, capsys):
    x = load(colours, "b.png")
    data.note_forgotten_before(x, {"d.PNG", "elsewhere.png"})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: d.PNG was forgotten before")


WRONG = {
    "--data-root nowhere: no pictures": ("nowhere", []),
    "--data-root empty: no pictures": ("empty", []),
    "--forget b.pmg: is not in colours, where a picture.png is": ("colours", ["b.pmg"]),
    "--forget ../colours/b.png: is not in colours": ("colours", ["../colours/b.png"]),
    "--forget: names a picture twice": ("colours", ["b.png", "b.png"]),
    "leaves none to keep": ("colours", list(COLOURS)),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_folders_and_names_are_refused(message, colours, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    root, forget = WRONG[message]
    with pytest.raises(UserError, match=message):
        load(root, *forget)
