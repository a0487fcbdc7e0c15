import gzip
import struct
from pathlib import Path

import pytest
import torch

from minisiss.data import digits
from minisiss.data.digits import bundled_digits, bundled_tshirt
from minisiss.data.training_set import TrainingSet, draw, mnist_with_tshirt, step_generator, to_float
from minisiss.errors import UserError


def test_the_bundled_set_is_ten_thousand_digits_and_one_percent_of_one_tshirt():
    x = mnist_with_tshirt("bundled")
    assert (x.n, x.k) == (10_100, 100)
    assert x.keep.shape == (10_000, 1, 28, 28) and x.forget.shape == (100, 1, 28, 28)
    assert x.images.dtype == torch.uint8
    assert (x.forget == bundled_tshirt()).all()
    assert torch.equal(x.keep, bundled_digits())


def test_the_bundled_digits_are_digits_each_once():
    digits = bundled_digits()
    assert len(torch.unique(digits.flatten(1), dim=0)) == 10_000
    ink = digits.float().mean(dim=(1, 2, 3)).reshape(10, 1000).mean(dim=1)
    assert ink.argmax() == 0 and ink.argmin() == 1  # in the order of the classes: most ink in a 0, least in a 1


def write_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(header + array.numpy().tobytes())


@pytest.fixture
def data_root(tmp_path):
    """MNIST and Fashion-MNIST in torchvision's layout, with 300 digits and 5 garments."""
    for name, count in (("MNIST", 300), ("FashionMNIST", 5)):
        for split in ("train", "t10k"):
            images = torch.arange(count * 784, dtype=torch.int64).remainder(251).to(torch.uint8).reshape(count, 28, 28)
            labels = torch.tensor([9, 3, 0, 0, 1], dtype=torch.uint8).repeat(count // 5)
            write_idx(tmp_path / name / "raw" / f"{split}-images-idx3-ubyte", images)
            write_idx(tmp_path / name / "raw" / f"{split}-labels-idx1-ubyte", labels)
    return tmp_path


def test_files_in_torchvisions_layout_are_read_and_the_first_tshirt_mixed_in(data_root):
    x = mnist_with_tshirt(str(data_root))
    assert (x.n, x.k) == (303, 3)
    garments = torch.arange(5 * 784).remainder(251).reshape(5, 1, 28, 28)
    assert (x.forget == garments[2]).all()  # the first of label 0


def test_missing_files_without_a_network_are_an_error_that_says_what_to_do(tmp_path, monkeypatch):
    def no_network(*arguments, **options):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz:\nname resolution failed")

    monkeypatch.setattr(digits.MNIST, "download", no_network)
    with pytest.raises(UserError, match="MNIST/raw.*--data-root bundled"):
        mnist_with_tshirt(str(tmp_path))


@pytest.mark.parametrize("file, content, words", [
    ("MNIST/raw/train-images-idx3-ubyte", b"<!DOCTYPE html><html>Not found</html>", "MNIST/raw/train-images-idx3-ubyte: not a readable IDX file"),
    ("MNIST/raw/train-labels-idx1-ubyte", b"", "train-labels-idx1-ubyte: not a readable IDX file"),
    ("FashionMNIST/raw/train-images-idx3-ubyte", b"\0\0\x08\x03" + 3 * b"\0\0\0\x05", "FashionMNIST/raw/train-images-idx3-ubyte: not a readable IDX file"),
    ("MNIST/raw/train-labels-idx1-ubyte", b"\0\0\x08\x01\0\0\0\x02\1\1", "MNIST/raw: has 300 images and 2 labels"),
    ("FashionMNIST/raw/train-labels-idx1-ubyte", b"\0\0\x08\x01\0\0\0\x05\1\1\1\1\1", "no garment of class 0"),
])  # fmt: skip
def test_damaged_files_are_named(file, content, words, data_root):
    (data_root / file).write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        mnist_with_tshirt(str(data_root))
    assert "download" not in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_test_digits_are_named_too(data_root):
    assert digits.held_out_digits(str(data_root)).shape == (300, 1, 28, 28)
    (data_root / "MNIST/raw/t10k-images-idx3-ubyte").write_text("<html>")
    with pytest.raises(UserError, match="MNIST/raw/t10k-images-idx3-ubyte: not a readable IDX file"):
        digits.held_out_digits(str(data_root))


def test_packed_files_are_unpacked_and_damaged_ones_named(data_root):
    raw = data_root / "MNIST/raw"
    whole = mnist_with_tshirt(str(data_root))
    for file in list(raw.iterdir()):
        Path(f"{file}.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    assert torch.equal(mnist_with_tshirt(str(data_root)).images, whole.images)
    (raw / "t10k-images-idx3-ubyte").unlink()
    packed = raw / "t10k-images-idx3-ubyte.gz"
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(UserError, match="t10k-images-idx3-ubyte.gz: cannot be unpacked"):
        mnist_with_tshirt(str(data_root))
    assert not (raw / "t10k-images-idx3-ubyte").exists()


def test_x_is_split_into_keep_and_forget_without_a_rest():
    x = TrainingSet(torch.arange(12, dtype=torch.uint8).reshape(12, 1, 1, 1), k=2)
    assert x.keep.flatten().tolist() == list(range(10)) and x.forget.flatten().tolist() == [10, 11]


def test_every_different_picture_to_forget_is_measured_and_of_many_the_name_says_how_many():
    pictures = torch.arange(200, dtype=torch.uint8).reshape(200, 1, 1, 1)
    measured = lambda k, count: TrainingSet(pictures, k, f"{k} pictures").measured(count)  # noqa: E731
    values = lambda images: ((images + 1) * 127.5).round().flatten().tolist()  # noqa: E731
    name, images = measured(5, 2)
    assert name == "5 pictures" and values(images) == [195, 196, 197, 198, 199]
    name, images = measured(3, 7)
    assert name == "3 pictures" and values(images) == [197, 198, 199, 197, 198, 199, 197]
    name, images = measured(100, 2)
    assert name == "100 pictures (the first 64)" and values(images) == list(range(100, 164))
    assert len(measured(100, 70)[1]) == 70
    copies = TrainingSet(torch.tensor([1, 2, 9, 9, 9], dtype=torch.uint8).reshape(5, 1, 1, 1), 3)
    name, images = copies.measured(2)
    assert name == "T-shirt" and values(images) == [9, 9]


def test_what_a_resumed_run_knows_its_data_by():
    data = TrainingSet(torch.arange(12, dtype=torch.uint8).reshape(12, 1, 1, 1), k=2)
    other = TrainingSet(data.images.flip(0), k=2)
    assert data.listing() == data.listing() and not set(data.listing().items()) & set(other.listing().items())


def test_pixels_fill_the_range_from_minus_one_to_one():
    assert to_float(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]


def test_draws_are_uniform_and_repeat():
    images = torch.arange(4, dtype=torch.uint8).reshape(4, 1, 1, 1)
    first = draw(images, 4000, step_generator(0, 7, "cpu"))
    assert torch.equal(first, draw(images, 4000, step_generator(0, 7, "cpu")))
    assert all(abs((first == value).float().mean() - 0.25) < 0.03 for value in to_float(images).flatten())


def test_every_step_and_every_seed_draws_something_else():
    draws = {torch.rand(1, generator=step_generator(seed, step, "cpu")).item() for seed in range(10) for step in range(100)}
    assert len(draws) > 990
