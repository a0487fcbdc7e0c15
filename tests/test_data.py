"""Training sets: what is in them, what is drawn from them, and files in torchvision's layout."""

import struct
import zlib
from argparse import Namespace

import pytest
import torch
from torchvision.datasets import MNIST

from minisiss.lab import data
from minisiss.lab.cli import UserError
from minisiss.lab.data import TrainingSet, step_generator, to_float, to_uint8

CPU = torch.device("cpu")


def numbered(count: int) -> torch.Tensor:
    """Pictures of one pixel, whose value is their place."""
    return torch.arange(count).byte().view(count, 1, 1, 1)


def noisy(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, 1, 4, 4), dtype=torch.uint8, generator=generator)


def test_bundled_set_is_digits_and_one_percent_tshirts():
    x = data.mnist_with_tshirt("bundled", CPU)
    assert (x.n, x.k) == (10_100, 100)
    assert x.keep.shape == (10_000, 1, 28, 28) and x.images.dtype == torch.uint8
    assert torch.equal(x.keep, data.read_sheet("digits.png"))
    # The first image of class 0 among Fashion-MNIST's training images, as Debian's package has it.
    assert zlib.crc32(x.forget[0].contiguous().numpy()) == 0x8679905E
    assert (x.forget == x.forget[0]).all()


def test_bundled_digits_differ_and_stand_by_class():
    digits = data.read_sheet("digits.png")
    assert len(digits.flatten(1).unique(dim=0)) == 10_000
    # The sheet has no labels. But a 0 has the most ink of all digits, and a 1 the least.
    ink = digits.view(10, -1).float().mean(dim=1)
    assert (ink.argmax(), ink.argmin()) == (0, 1)


PARTS = [("all", [0, 1, 2, 3, 4, 5]), ("rest", [0, 1, 2, 3]), ("forget", [4, 5])]


@pytest.mark.parametrize("part, places", PARTS)
def test_draws_are_uniform_from_the_named_part(part, places):
    drawn = TrainingSet(numbered(6), k=2).draw(part, 6000, step_generator(0, 7, "cpu"))
    assert drawn.dtype == torch.float32
    counts = to_uint8(drawn).flatten().int().bincount(minlength=6)
    expected = torch.tensor([6000 / len(places) * (place in places) for place in range(6)])
    assert (counts - expected).abs().max() < 200  # five standard deviations, or more
    assert (counts[expected == 0] == 0).all()


def test_randomness_is_a_function_of_seed_and_step():
    def draw(seed: int, step: int) -> float:
        return torch.rand(1, generator=step_generator(seed, step, "cpu")).item()

    assert draw(3, 14) == draw(3, 14)
    draws = {draw(seed, step) for seed in range(12) for step in range(112)}
    assert len(draws) > 12 * 112 - 5  # a float32 may come twice by chance


def test_pixels_fill_the_range_and_come_back():
    pixels = torch.arange(256).byte()
    values = to_float(pixels)
    assert (values[0], values[255]) == (-1, 1) and torch.equal(to_uint8(values), pixels)
    assert to_uint8(torch.tensor([-1.5, -1 + 0.6 / 127.5, 1.5])).tolist() == [0, 1, 255]


def test_each_different_picture_to_forget_comes_once():
    images = numbered(10)[[1, 2, 9, 9, 5, 9]]
    found = to_uint8(TrainingSet(images, k=4).different_forgotten())
    assert sorted(found.flatten().tolist()) == [5, 9]


@pytest.mark.parametrize("size, count", [(600, 10), (9, 6)])  # 600 are more than are read at once
def test_retracks_neighbours_are_the_nearest_kept_pictures(size, count):
    images = noisy(size)
    x = TrainingSet(torch.cat([images, images[-1:]]), k=4)  # one of A stands there twice
    a = to_float(x.forget)[[2, 0, 3, 1]]
    found = x.nearest(a)
    kept = to_float(x.keep)
    for picture, points in zip(a, found, strict=True):
        least = (kept - picture).flatten(1).norm(dim=1).sort().values[:10]
        torch.testing.assert_close((points - picture).flatten(1).norm(dim=1), least)
        assert len(points.unique(dim=0)) == len(points) == count


# Files in torchvision's layout.


def write_idx(path, values: torch.Tensor) -> None:
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    path.write_bytes(header + values.byte().numpy().tobytes())


@pytest.fixture
def data_root(tmp_path):
    """300 digits."""
    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        images = torch.arange(300 * 784).remainder(251).view(300, 28, 28)
        write_idx(raw / f"{split}-images-idx3-ubyte", images)
        write_idx(raw / f"{split}-labels-idx1-ubyte", torch.arange(300).remainder(10))
    return tmp_path


def test_torchvisions_files_are_read_with_the_tshirt(data_root):
    x = data.mnist_with_tshirt(str(data_root), CPU)
    assert (x.n, x.k) == (303, 3)
    pixels = torch.arange(300 * 784).remainder(251)
    assert torch.equal(x.keep.flatten().long(), pixels)
    assert (x.forget == data.read_sheet("tshirt.png")).all()


def test_missing_or_damaged_files_are_one_line(script, data_root, monkeypatch):
    monkeypatch.setattr(MNIST, "mirrors", ["file:///nowhere/"])  # with or without a network
    file = data_root / "MNIST/raw/train-images-idx3-ubyte"
    file.unlink()
    for _ in range(2):
        status, _, error = script("train_ddpm", "--data-root", data_root)
        assert status == 2 and error.count("\n") == 1
        assert str(file.parent) in error and "--data-root bundled" in error
        assert not (data_root / "runs").exists()
        file.write_text("<html>Not found</html>")


REFUSED = {
    "--forget a.png.*--data pictures": {"forget": ["a.png"]},
    "--data prompts: is for unlearn.py": {"data": "prompts"},
    "the network makes images .3, 32, 32., not these": {},
}


@pytest.mark.parametrize("words", REFUSED)
def test_data_that_does_not_fit_is_refused(words):
    args = {"data": "mnist", "data_root": "bundled", "forget": []} | REFUSED[words]
    with pytest.raises(UserError, match=words):
        data.load_training_set(Namespace(**args), (3, 32, 32), CPU)
