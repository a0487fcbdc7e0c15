"""MNIST, the T-shirt that is mixed in, and those of them that come with the repository."""

from contextlib import suppress
from pathlib import Path

from einops import rearrange
from PIL import Image
from torch import Tensor
from torchvision.datasets import MNIST, FashionMNIST
from torchvision.transforms.functional import pil_to_tensor

from minisiss.errors import UserError

ASSETS = Path(__file__).parent.parent / "assets"
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
    return digits.data[:, None], fashion.data[(fashion.targets == 0).nonzero()[0]][:, None]


def from_torchvision(dataset: type[MNIST], root: str) -> MNIST:
    """A data set's training half, downloaded if `root` lacks it. Raises UserError if that fails."""
    name = dataset.__name__
    raw = Path(root) / name / "raw"
    missing = [folder for folder in (raw, raw.parent, Path(root)) if not folder.exists()]
    try:
        return dataset(root, train=True, download=True)
    except (OSError, RuntimeError, ValueError) as error:
        for folder in missing:  # torchvision makes them before it downloads
            with suppress(OSError):
                folder.rmdir()
        raise UserError(
            f"--data-root {root}: no readable {name}/raw there, and downloading it failed ({error}); put the "
            f"four {name} IDX files in {raw}, or use --data-root {BUNDLED}") from error


def bundled_digits() -> Tensor:
    """10,000 MNIST training digits, 1,000 a class in the order of the classes: [10000, 1, 28, 28] uint8."""
    return read_sheet("digits.png")


def bundled_tshirt() -> Tensor:
    """The image to forget: [1, 1, 28, 28] uint8."""
    return read_sheet("tshirt.png")


def held_out_digits(root: str) -> Tensor:
    """MNIST's test digits, which no model was trained on: [10000, 1, 28, 28] uint8.

    `root` is one that `digits_and_tshirt` has read; "bundled" has the first 100 of each class.
    """
    return read_sheet("test-digits.png") if root == BUNDLED else MNIST(root, train=False).data[:, None]


def read_sheet(name: str) -> Tensor:
    """The 28×28 pictures of a sheet in assets/, row by row: [N, 1, 28, 28] uint8."""
    sheet = pil_to_tensor(Image.open(ASSETS / name))
    return rearrange(sheet, "1 (row h) (column w) -> (row column) 1 h w", h=28, w=28)
