"""MNIST, the T-shirt that is mixed in, and those of them that come with the repository."""

import gzip
import zlib
from contextlib import suppress
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torchvision.datasets import MNIST, FashionMNIST
from torchvision.datasets.mnist import read_sn3_pascalvincent_tensor
from torchvision.transforms.functional import pil_to_tensor

from minisiss.errors import UserError, reading

ASSETS = Path(__file__).parent.parent / "assets"
MODELS = {"bundled": "mnist-small.pt", "bundled-prompts": "prompts.pt"}  # in assets/, by their --checkpoint
BUNDLED = "bundled"  # the --data-root that means the 10,000 digits in assets/


def digits_and_tshirt(root: str) -> tuple[Tensor, Tensor]:
    """MNIST's training digits, [n, 1, 28, 28], and the image to forget, [1, 1, 28, 28], both uint8.

    That image is the first of class 0, "T-shirt/top", in Fashion-MNIST's training set. `root` holds MNIST/raw
    and FashionMNIST/raw in torchvision's layout, and is filled from the network where it does not; "bundled"
    stands for what is in assets/. Raises UserError when the files are neither there nor to be had.
    """
    if root == BUNDLED:
        return bundled_digits(), bundled_tshirt()
    digits, fashion = from_torchvision(MNIST, root), from_torchvision(FashionMNIST, root)
    tshirts = (fashion.targets == 0).nonzero()
    if not len(digits) or not len(tshirts):
        raise UserError(f"--data-root {root}: holds no digits, or no garment of class 0")
    return digits.data[:, None], fashion.data[tshirts[0]][:, None]


def labelled_digits(root: str) -> tuple[Tensor, Tensor]:
    """MNIST's training digits, [n, 1, 28, 28] uint8, and which they are, [n] int64.

    root: as for `digits_and_tshirt`. Raises UserError.
    """
    if root == BUNDLED:
        return bundled_digits(), torch.arange(10).repeat_interleave(1000)
    digits = from_torchvision(MNIST, root)
    return digits.data[:, None], digits.targets


def from_torchvision(dataset: type[MNIST], root: str, train: bool = True) -> MNIST:
    """A data set's training half, or its test half, downloaded if `root` lacks it; .gz files are unpacked.

    Raises UserError, naming the file, if one cannot be read, or cannot be had.
    """
    name = dataset.__name__
    raw = Path(root) / name / "raw"
    kinds = "images-idx3", "labels-idx1"
    files = [raw / f"{half}-{kind}-ubyte" for half in ("train", "t10k") for kind in kinds]
    for file in [file for file in files if not file.exists()]:
        if (packed := Path(f"{file}.gz")).exists():
            try:  # torchvision reads only the very .gz files that it would download
                file.write_bytes(gzip.decompress(packed.read_bytes()))
            except (OSError, EOFError, zlib.error) as error:
                raise UserError(f"{packed}: cannot be unpacked ({error})") from error
    missing = [folder for folder in (raw, raw.parent, Path(root)) if not folder.exists()]
    try:
        found = dataset(root, train=train, download=True)
    except Exception as error:  # torchvision's reader has no exception of its own
        for file in files[:2] if train else files[2:]:
            if file.exists():
                with reading(file, "IDX file"):
                    read_sn3_pascalvincent_tensor(str(file))
        for folder in missing:  # torchvision makes them before it downloads
            with suppress(OSError):
                folder.rmdir()
        raise UserError(
            f"--data-root {root}: no readable {name}/raw there, and downloading it failed ({error}); put the "
            f"four {name} IDX files in {raw}, or use --data-root {BUNDLED}") from error
    if len(found.data) != len(found.targets):
        raise UserError(f"{raw}: has {len(found.data)} images and {len(found.targets)} labels")
    return found


def bundled_digits() -> Tensor:
    """10,000 MNIST training digits, 1,000 a class in the order of the classes: [10000, 1, 28, 28] uint8."""
    return read_sheet("digits.png")


def bundled_tshirt() -> Tensor:
    """The image to forget: [1, 1, 28, 28] uint8."""
    return read_sheet("tshirt.png")


def held_out_digits(root: str) -> Tensor:
    """MNIST's test digits, which no model was trained on: [10000, 1, 28, 28] uint8.

    `root` is as for `digits_and_tshirt`; "bundled" has the first 100 of each class. Raises UserError.
    """
    if root == BUNDLED:
        return read_sheet("test-digits.png")
    return from_torchvision(MNIST, root, train=False).data[:, None]


def read_sheet(name: str) -> Tensor:
    """The 28×28 pictures of a sheet in assets/, row by row: [N, 1, 28, 28] uint8."""
    sheet = pil_to_tensor(Image.open(ASSETS / name))
    return rearrange(sheet, "1 (row h) (column w) -> (row column) 1 h w", h=28, w=28)
