"""A folder of pictures as a training set, and pictures that are none."""

import io
import os
import re
import shlex
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from minisiss.data import folder
from minisiss.data.folder import ImageFolder, read_picture
from minisiss.data.training_set import training_set
from minisiss.errors import UserError
from minisiss.machine.command_line import read_names

SHAPE = (3, 16, 16)
COLOURS = {"b.png": (255, 0, 0), "a picture.png": (0, 255, 0), "deeper/c.webp": (0, 0, 255), "ä.jpeg": (200, 200, 200), "d.PNG": (9, 9, 9)}


def encoded(image: Image.Image, kind: str, **settings) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def noisy(mode: str = "RGB", size: tuple[int, int] = (40, 40)) -> Image.Image:
    """A picture that does not compress, so that cutting it cuts pixels."""
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    return Image.fromarray(values, "RGBA").convert(mode)


@pytest.fixture
def colours(tmp_path):
    root = tmp_path / "colours"
    (root / "deeper").mkdir(parents=True)
    for name, colour in COLOURS.items():
        Image.new("RGB", (40, 30), colour).save(root / name, lossless=True)
    (root / "notes.txt").write_text("not a picture")
    return root


def average(picture):
    return picture.float().mean(dim=(-2, -1)).round().int().tolist()


def test_pictures_are_sorted_by_name_and_read_when_indexed(colours):
    pictures = ImageFolder(str(colours), SHAPE)
    assert pictures.names == ["a picture.png", "b.png", "d.PNG", "deeper/c.webp", "ä.jpeg"]
    assert pictures.shape == (5, *SHAPE) and not pictures.cache
    batch = pictures[torch.tensor([3, 0, 0])]
    assert batch.shape == (3, *SHAPE) and batch.dtype == torch.uint8
    assert [average(picture) for picture in batch] == [[0, 0, 255], [0, 255, 0], [0, 255, 0]]
    assert set(pictures.cache) == {"a picture.png", "deeper/c.webp"}


def test_the_forget_set_is_last_and_the_rest_is_kept(colours):
    data = training_set("pictures", str(colours), ["b.png", "ä.jpeg"], SHAPE)
    assert (data.n, data.k, data.name) == (5, 2, "2 pictures")
    assert data.forget.names == ["b.png", "ä.jpeg"] and "b.png" not in data.keep.names and len(data.keep) == 3
    assert [average(picture) for picture in (data.measured(3)[1] + 1) * 127.5] == [[255, 0, 0], [200, 200, 200], [255, 0, 0]]


def test_names_to_forget_may_stand_in_a_text_file(tmp_path):
    (tmp_path / "names.txt").write_bytes("\ufeffd.PNG\r\n\r\n ä.jpeg \r\n".encode() + b"\xff.png\n")
    assert read_names(str(tmp_path / "names.txt")) == ["d.PNG", "ä.jpeg", os.fsdecode(b"\xff.png")]
    assert read_names("b.png") == ["b.png"]


def test_a_picture_is_the_square_in_its_middle_resized_and_not_flipped(tmp_path):
    stripes = np.zeros((32, 64, 3), dtype=np.uint8)
    stripes[:, 16:32, 0] = 255  # the left half of the middle square
    stripes[:, :16, 1] = stripes[:, 48:, 1] = 255  # what lies outside it
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    red, green, _ = read_picture(tmp_path / "stripes.png", SHAPE)
    inner = slice(1, 15)  # at the border a smooth resize takes in a little of what lies beyond
    assert red[:, 1:7].min() == 255 and red[:, 9:].max() == 0 and green[:, inner].max() == 0


def test_a_picture_that_the_camera_turned_is_turned_back(tmp_path):
    half = Image.fromarray(np.repeat([[255] * 16 + [0] * 16], 32, axis=0).astype(np.uint8))
    exif = Image.Exif()
    exif[274] = 3  # upside down
    half.save(tmp_path / "turned.png", exif=exif)
    assert read_picture(tmp_path / "turned.png", (1, 16, 16))[0, :, 9:].min() == 255


UNUSUAL = {
    "CMYK": (noisy("CMYK"), "JPEG"),
    "grey": (noisy("L"), "PNG"),
    "palette": (noisy("P"), "PNG"),
    "transparent": (noisy("RGBA"), "PNG"),
    "16-bit": (Image.fromarray(np.full((40, 40), 32768, dtype=np.uint16)), "PNG"),
    "tall": (noisy(size=(10, 3000)), "PNG"),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_pictures_are_read(name, tmp_path):
    image, kind = UNUSUAL[name]
    (tmp_path / "x").write_bytes(encoded(image, kind))
    for channels in (1, 3):
        picture = read_picture(tmp_path / "x", (channels, 16, 16))
        assert picture.shape == (channels, 16, 16) and picture.dtype == torch.uint8
    if name == "16-bit":
        assert set(picture.flatten().tolist()) == {128}
    else:
        assert 20 < picture.float().mean() < 235


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_read(kind, tmp_path):
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    (tmp_path / "x").write_bytes(encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True))
    assert average(read_picture(tmp_path / "x", SHAPE)) == [255, 0, 0]


def bomb() -> bytes:
    """A small PNG of 900 million pixels, a bit each: made by hand, as Pillow takes a gigabyte for it."""
    header, rows = struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0), zlib.compress(bytes(30_000 * (1 + 30_000 // 8)), 1)
    parts = [(b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts)


UNREADABLE = {
    "empty": lambda: b"",
    "text": lambda: b"just words\n",
    "one pixel wide": lambda: encoded(noisy(size=(1, 40)), "PNG"),
    "bomb": bomb,
    "a pickle": lambda: b"\x80\x04\x95\x1e\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x02id\x94\x85\x94R\x94.",
    **{f"{kind} cut at {tenth}0%": lambda kind=kind, tenth=tenth: (whole := encoded(noisy(), kind))[: len(whole) * tenth // 10] for kind in ("PNG", "JPEG", "WEBP") for tenth in range(1, 10)},
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_unreadable_picture_is_one_line_that_names_it(name, colours):
    path = colours / "broken ü.jpg"
    path.write_bytes(UNREADABLE[name]())
    with pytest.raises(UserError, match="broken ü.jpg.*--skip-unreadable") as caught:
        pictures = ImageFolder(str(colours), SHAPE)
        pictures[torch.arange(len(pictures))]
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["empty", "PNG cut at 50%"])
def test_unreadable_pictures_can_be_skipped_with_a_warning_each(name, colours, capsys):
    (colours / "broken.png").write_bytes(UNREADABLE[name]())  # sorted between b.png and d.PNG
    pictures = ImageFolder(str(colours), SHAPE, skip_unreadable=True)
    whole = pictures[torch.arange(len(pictures))]
    assert capsys.readouterr().err.count("broken.png") == 1
    assert len({tuple(average(picture)) for picture in whole}) == 5
    assert pictures.unreadable == {"broken.png"}


def test_many_unreadable_pictures_are_counted_and_some_named(colours):
    for number in range(12):
        (colours / f"broken-{number:02}.png").write_bytes(b"")
    with pytest.raises(UserError, match="12 of 17 pictures.*broken-00.*broken-02.png[^-]* and 9 more"):
        ImageFolder(str(colours), SHAPE)


def test_a_link_out_of_the_folder_is_refused_and_one_inside_is_not(colours, tmp_path):
    os.symlink("b.png", colours / "inside.png")
    assert len(ImageFolder(str(colours), SHAPE)) == 6
    Image.new("RGB", (40, 40)).save(tmp_path / "secret.png")
    os.symlink(tmp_path / "secret.png", colours / "outside.png")
    with pytest.raises(UserError, match="outside.png: is a link out of the folder"):
        ImageFolder(str(colours), SHAPE)


def test_hidden_folders_are_no_data_and_linked_or_unreadable_ones_are_refused(colours, tmp_path, monkeypatch):
    (colours / ".ipynb_checkpoints").mkdir()
    Image.new("RGB", (40, 40)).save(colours / ".ipynb_checkpoints/b-checkpoint.png")
    assert ImageFolder(str(colours), SHAPE).names == ["a picture.png", "b.png", "d.PNG", "deeper/c.webp", "ä.jpeg"]
    os.symlink(colours / "deeper", colours / "linked")
    with pytest.raises(UserError, match="linked: is a link to a folder"):
        ImageFolder(str(colours), SHAPE)
    (colours / "linked").unlink()
    scandir = os.scandir

    def refuse(path):  # root may read everything, so that no mode keeps it out
        if str(path).endswith("deeper"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="deeper: cannot be read .Permission denied"):
        ImageFolder(str(colours), SHAPE)


@pytest.mark.parametrize("copy, when", [("copy.png", "at the start"), ("copy.webp", "when it is read")])
def test_a_copy_of_a_picture_to_forget_that_stays_among_the_kept_is_named_once(copy, when, colours, capsys):
    if when == "at the start":
        (colours / copy).write_bytes((colours / "b.png").read_bytes())
    else:
        Image.open(colours / "b.png").save(colours / copy, lossless=True)
    data = training_set("pictures", str(colours), ["b.png"], SHAPE)
    assert capsys.readouterr().err.count("warning") == (when == "at the start")
    data.keep[torch.arange(len(data.keep))], data.forget[torch.arange(1)]
    data = training_set("pictures", str(colours), ["b.png"], SHAPE)
    data.keep[torch.arange(len(data.keep))], data.keep[torch.arange(len(data.keep))]
    said = capsys.readouterr().err.splitlines()
    assert set(said) == {f"warning: {copy} is the same picture as b.png, and stays among those to keep; remove it, or --forget it too"}
    assert len(said) == (1 if when == "at the start" else 2)


def test_copies_that_are_all_forgotten_are_no_copies_among_the_kept(colours, capsys):
    (colours / "copy.png").write_bytes((colours / "b.png").read_bytes())
    data = training_set("pictures", str(colours), ["b.png", "copy.png"], SHAPE)
    data.images[torch.arange(data.n)]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("skip", [False, True])
def test_no_other_picture_stands_in_for_one_to_forget(skip, colours):
    (colours / "broken.png").write_bytes(UNREADABLE["PNG cut at 50%"]())
    with pytest.raises(UserError, match="broken.png: not a readable picture"):
        training_set("pictures", str(colours), ["b.png", "broken.png"], SHAPE, skip)


@pytest.mark.parametrize("name", ["./b.png", "deeper/../b.png", "\u00e4.jpeg", "a\u0308.jpeg"])
def test_names_that_look_equal_are_equal(name, colours):
    assert training_set("pictures", str(colours), [name], SHAPE).forget.names[0] in ("b.png", "ä.jpeg")


def test_a_network_of_four_channels_is_none_for_pictures(colours):
    with pytest.raises(UserError, match="--image-channels 4: pictures are read with 1 channel or with 3"):
        training_set("pictures", str(colours), [], (4, 16, 16))


def test_a_picture_of_too_many_pixels_is_refused_without_changing_what_others_warn_of(colours, monkeypatch):
    before = list(warnings.filters)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1199)
    with pytest.raises(UserError, match="40×30 pixels; more than 1,199 are refused"), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        read_picture(colours / "b.png", SHAPE)
    assert warnings.filters == before and not any(entry[2] is Image.DecompressionBombWarning for entry in before)


def test_memory_is_bounded_by_a_cache_of_a_fixed_size(colours, monkeypatch):
    monkeypatch.setattr(folder, "CACHE_BYTES", 2 * 3 * 16 * 16)
    pictures = ImageFolder(str(colours), SHAPE)
    first, second = pictures[torch.arange(5)], pictures[torch.arange(5)]
    assert len(pictures.cache) == 2 and first.equal(second)


WRONG = [
    (["nowhere"], [], "--data-root nowhere: no such folder"),
    (["empty"], [], "--data-root empty: no readable picture"),
    (["bundled"], [], "those are digits"),
    (["colours"], ["b.pmg"], "--forget b.pmg: .*nearest are b.png"),
    (["colours"], ["../colours/b.png"], "no readable picture of that name"),
    (["colours"], ["b.png", "b.png"], "named twice"),
    (["colours"], [""], "no readable picture of that name"),
    (["colours"], list(COLOURS), "leaves none to keep"),
]


@pytest.mark.parametrize("root, forget, message", WRONG, ids=[row[2] for row in WRONG])
def test_wrong_folders_and_names(root, forget, message, colours, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        training_set("pictures", *root, forget, SHAPE)


TINY = ("--preset", "mnist-tiny", "--data", "pictures", "--data-root", "colours", "--batch-size", 3, "--precision", "fp32")
NETWORK = ("--image-size", 16, "--image-channels", 3, "--steps", 2)


def test_train_unlearn_and_compare_on_pictures(script, colours, tmp_path):
    for out, flags in (("runs/all", ()), ("runs/rest", ("--forget", "b.png", "--exclude-forget"))):
        assert script("train_ddpm", *TINY, *NETWORK, "--out", out, *flags)[::2] == (0, "")
    status, said, _ = script("unlearn", *TINY, "--checkpoint", "runs/all/model.pt", "--forget", "b.png", "--out", "runs/siss", "--memory-timesteps", 100, 250, "--evaluate-every", 2)
    assert status == 0 and "b.png noised to t = 250" in said and "| kept pictures" in said and "noised to t = 100" in said and "T-shirt" not in said
    assert {"before_after.png", "memory.png", "memory_by_step.png"} <= set(os.listdir(tmp_path / "runs/siss"))
    flags = ("--data", "pictures", "--data-root", "colours", "--forget", "b.png", "--samples", 10, "--sampling-steps", 2, "--draws", 2, "--memory-timesteps", 100, 250)
    status, said, error = script("eval", "runs/all", "runs/rest", "runs/siss", *flags)
    assert (status, error) == (0, "") and "retrained" in said and "kept, in dB" in said and "T-shirt" not in said and "inception" not in said
    status, said, _ = script("eval", "--checkpoint", "runs/siss/model.pt", *flags)
    assert status == 0 and re.search(r"\| method +\| +images \| +t = 100 \| +t = 250 \|", said) and re.search(r"\| +b.png \| +[01]\.\d+, \d+\.\d dB \|", said)


def test_a_name_that_is_no_utf8_is_a_name(script, colours, tmp_path):
    name = os.fsdecode(b"\xff.png")
    (colours / "b.png").rename(colours / name)
    assert script("train_ddpm", *TINY, *NETWORK, "--out", "base")[0] == 0
    status, said, error = script("unlearn", *TINY, "--checkpoint", "base/model.pt", "--forget", name, "--out", "run", "--samples", 0, "--steps", 1)
    assert status == 0 and "\\udcff.png noised to" in said, error
    status, said, error = script("eval", "run", *TINY[2:-4], "--forget", name, "--samples", 10, "--sampling-steps", 2, "--draws", 1, "--memory-timesteps", 100)
    assert status == 0 and "\\udcff.png" in said, error


def test_the_commands_that_are_printed_can_be_pasted(script, colours, tmp_path):
    colours.rename(tmp_path / "my colours")
    flags = [*TINY, *NETWORK]
    flags[flags.index("colours")] = "my colours"
    _, said, _ = script("train_ddpm", *flags, "--out", "a model")
    for name, few in (("unlearn", ("--samples", 0, "--steps", 1)), ("eval", ("--samples", 4, "--sampling-steps", 2))):
        python, path, *arguments = shlex.split(said.split("next: ")[1])
        assert (python, path) == ("python", f"{name}.py")
        status, said, error = script(name, *arguments, *few)
        assert status == 0 and "a picture.png" in said, error
    _, said, _ = script("train_ddpm", *flags, "--out", "another", "--forget", "b.png", "ä.jpeg")
    _, path, *arguments = shlex.split(said.split("next: ")[1])
    status, said, error = script("eval", *arguments, "--samples", 4, "--sampling-steps", 2)
    assert path == "eval.py" and status == 0 and "2 pictures" in said, error


@pytest.mark.parametrize("name, arguments, words", [
    ("train_ddpm", (*TINY, *NETWORK, "--forget", "b.png", "--batch-size", 6), ["--batch-size 6", "only 5 pictures"]),
    ("train_ddpm", (*TINY, *NETWORK, "--forget", "b.png", "--exclude-forget", "--batch-size", 5), ["--batch-size 5", "only 4 pictures"]),
    ("train_ddpm", (*TINY, *NETWORK, "--exclude-forget"), ["--exclude-forget", "--forget"]),
    ("train_ddpm", (*TINY, "--data", "mnist", "--data-root", "bundled", "--forget", "b.png"), ["--forget b.png", "--data pictures"]),
    ("unlearn", TINY, ["--forget", "name the pictures"]),
    ("unlearn", (*TINY, "--forget", "nowhere.txt"), ["nowhere.txt: not a readable text file"]),
    ("unlearn", (*TINY, "--forget", "b.png", "empty.txt"), ["empty.txt: names no picture"]),
    ("unlearn", (*TINY, "--method", "retrack", "--neighbours", 2), ["--forget", "name the pictures"]),
    ("unlearn", (*TINY, "--forget", "b.png", "--batch-size", 5), ["--batch-size 5", "only 4 pictures"]),
    ("eval", TINY[2:-4], ["--forget", "name the pictures"]),
])  # fmt: skip
def test_wrong_input_for_pictures_is_one_line_and_status_2(name, arguments, words, script, colours, tiny_checkpoint, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    if name != "train_ddpm":
        arguments = (*arguments, "--checkpoint", tiny_checkpoint)
    status, _, error = script(name, *arguments)
    assert status == 2 and error.count("\n") == 1 and all(word in error for word in words), error
    assert not (tmp_path / "runs").exists()
