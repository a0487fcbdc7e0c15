import struct

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


def test_x_is_split_into_keep_and_forget_without_a_rest():
    x = TrainingSet(torch.arange(12, dtype=torch.uint8).reshape(12, 1, 1, 1), k=2)
    assert x.keep.flatten().tolist() == list(range(10)) and x.forget.flatten().tolist() == [10, 11]


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
