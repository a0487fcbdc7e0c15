"""Training sets X = keep ∪ forget, in memory or as a folder of pictures, and the random draws made from them."""

import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torchvision.datasets import MNIST, FashionMNIST
from torchvision.transforms.functional import pil_to_tensor

from minisiss.cli import UserError
from minisiss.distributed import ALONE, World
from minisiss.folder import ImageFolder

ASSETS = Path(__file__).parent / "assets"
BUNDLED = "bundled"  # the --data-root that means the 10,000 digits in assets/


@dataclass(frozen=True)
class TrainingSet:
    """X with its forget set A ⊂ X last: images: [n, C, H, W] uint8, of which the last `k` are A.

    images is a tensor, or an `ImageFolder` that reads what is indexed.
    """

    images: Tensor | ImageFolder
    k: int
    name: str = "T-shirt"  # what is forgotten, for people

    @property
    def n(self) -> int:
        return len(self.images)

    @property
    def keep(self) -> Tensor | ImageFolder:
        """X∖A, [n−k, C, H, W] uint8."""
        return self.images[: self.n - self.k]

    @property
    def forget(self) -> Tensor | ImageFolder:
        """A, [k, C, H, W] uint8. Copies of one image count as often as they stand in X."""
        return self.images[self.n - self.k :]

    def originals(self, count: int) -> Tensor:
        """`count` images of A, one after the other and from the start again: [count, C, H, W] float32 in [−1, 1].

        Raises UserError where A is empty.
        """
        if not self.k:
            raise UserError("--forget: name the pictures to forget")
        return to_float(self.forget[torch.arange(count) % self.k])

    def kept(self) -> Tensor:
        """The first images of X∖A, 64 at most: [≤ 64, C, H, W] float32 in [−1, 1]."""
        return to_float(self.keep[torch.arange(min(64, len(self.keep)))])

    def to(self, device: torch.device | str) -> "TrainingSet":
        return TrainingSet(self.images.to(device), self.k, self.name)


def training_set(kind: str, root: str, forget: list[str], image_shape: tuple[int, int, int], skip_unreadable: bool = False) -> TrainingSet:
    """The training set that --data, --data-root and --forget name, for a network of images [C, H, W].

    Raises UserError where it cannot be had, or has images of another shape.
    """
    if kind == "pictures":
        if root == BUNDLED:
            raise UserError(f"--data-root {BUNDLED}: those are digits; give the folder of your pictures")
        names = [name for entry in forget for name in read_names(entry)]
        folder = ImageFolder(root, image_shape, skip_unreadable).with_last(names)
        return TrainingSet(folder, len(names), names[0] if len(names) == 1 else f"{len(names)} pictures")
    if forget:
        raise UserError(f"--forget {forget[0]}: is for --data pictures; among the digits it is the T-shirt that is forgotten")
    data = mnist_with_tshirt(root)
    if data.images.shape[1:] != image_shape:
        has, makes = ("×".join(map(str, shape)) for shape in (data.images.shape[1:], image_shape))
        raise UserError(f"--data-root {root}: has pictures of {has}, and the network makes {makes} (--image-size, --image-channels, --checkpoint)")
    return data


def read_names(entry: str) -> list[str]:
    """An entry of --forget: a name, or a text file of names, one a line. Raises UserError for an unreadable or empty one."""
    if not entry.endswith(".txt"):
        return [entry]
    try:
        names = [line.strip() for line in Path(entry).read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"--forget {entry}: not a readable text file ({error})") from error
    if not names:
        raise UserError(f"--forget {entry}: names no picture")
    return names


def mnist_with_tshirt(root: str) -> TrainingSet:
    """MNIST's training digits with one T-shirt mixed in as often as makes 1% of the digits (the paper, section 5).

    `root` holds MNIST/raw and FashionMNIST/raw in torchvision's layout, and is filled from the network where it does
    not; "bundled" stands for the 10,000 digits and the T-shirt in assets/.
    Raises UserError when the files are neither there nor to be had.
    """
    if root == BUNDLED:
        digits, tshirt = bundled_digits(), bundled_tshirt()
    else:
        digits = from_torchvision(MNIST, root).data[:, None]
        fashion = from_torchvision(FashionMNIST, root)
        # The forget set is the first image of class 0, "T-shirt/top".
        tshirt = fashion.data[(fashion.targets == 0).nonzero()[0]][:, None]
    k = len(digits) // 100
    return TrainingSet(torch.cat([digits, tshirt.expand(k, -1, -1, -1)]), k)


def from_torchvision(dataset: type[MNIST], root: str) -> MNIST:
    """The training half of a torchvision data set, downloaded if `root` lacks it. Raises UserError if that fails."""
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
            f"--data-root {root}: no readable {name}/raw there, and downloading it failed ({error}); "
            f"put the four {name} IDX files in {raw}, or use --data-root {BUNDLED}"
        ) from error


def bundled_digits() -> Tensor:
    """10,000 MNIST training digits, 1,000 a class in the order of the classes: [10000, 1, 28, 28] uint8."""
    return read_sheet("digits.png")


def held_out_digits(root: str) -> Tensor:
    """MNIST's test digits, which no model was trained on: [10000, 1, 28, 28] uint8.

    `root` is one that `mnist_with_tshirt` has read or filled; for "bundled", the first 100 of each class in assets/.
    """
    return read_sheet("test-digits.png") if root == BUNDLED else MNIST(root, train=False).data[:, None]


def read_sheet(name: str) -> Tensor:
    """The 28×28 pictures of a sheet in assets/, row by row: [N, 1, 28, 28] uint8."""
    sheet = pil_to_tensor(Image.open(ASSETS / name))
    return rearrange(sheet, "1 (row h) (column w) -> (row column) 1 h w", h=28, w=28)


def bundled_tshirt() -> Tensor:
    """The image to forget: [1, 1, 28, 28] uint8."""
    return read_sheet("tshirt.png")


def to_float(images: Tensor) -> Tensor:
    """uint8 in 0 … 255 to float32 in [−1, 1], the range the network works in."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Images in [−1, 1] to uint8 in 0 … 255, rounded; what lies outside is clamped."""
    return ((images + 1) * 127.5).round().clamp(0, 255).byte()


def draw(images: Tensor, count: int, generator: torch.Generator, world: World = ALONE) -> Tensor:
    """`count` images drawn uniformly with replacement, as float32 in [−1, 1]; of several ranks each has, and reads, its share."""
    indices = torch.randint(len(images), (count,), generator=generator, device=images.device)
    return to_float(images[world.share(indices)])


def step_generator(seed: int, step: int, device: torch.device | str) -> torch.Generator:
    """The randomness of one training step, a function of (seed, step) alone.

    So a run that is stopped and resumed draws what the uninterrupted run would have, with no random state to store.
    """
    return torch.Generator(device).manual_seed(zlib.crc32(f"{seed}/{step}".encode()))
