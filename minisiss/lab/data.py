"""Training sets X with the forget set A ⊂ X, folders of pictures, and the draws from them."""

import copy
import sys
import zlib
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets import MNIST
from torchvision.datasets.folder import make_dataset
from torchvision.transforms.functional import pil_to_tensor

from minisiss.lab import machine
from minisiss.lab.cli import UserError

ASSETS = Path(__file__).parent.parent / "assets"
BUNDLED = "bundled"  # the --data-root of the digits in assets/
ENDINGS = (".jpg", ".jpeg", ".png", ".webp")  # of pictures


class ImageFolder:
    """The pictures in a folder and its subfolders, indexed like a tensor [n, C, H, W] uint8:
    folder[indices] reads them, folder[a:b] is a folder of some of them, unread. Pictures are never
    flipped: what is forgotten is a picture, not its mirror image."""

    def __init__(self, root: str, image_shape: tuple[int, int, int], forget: list[str],
                 device: torch.device | str = "cpu") -> None:
        """forget: names of pictures, which come last. Raises UserError for one that is missing."""
        self.root, self.image_shape, self.device = Path(root), image_shape, torch.device(device)
        names, chosen = find_pictures(self.root), set(forget)
        for name in chosen.difference(names):
            raise UserError(f"--forget {name}: is not in {root}, where {names[0]} is")
        kept = [name for name in names if name not in chosen]
        if not kept or len(chosen) < len(forget):
            raise UserError("--forget: names a picture twice, or leaves none to keep")
        refuse_copies(self.root, kept, forget)
        self.names = [*kept, *forget]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self), *self.image_shape

    def __getitem__(self, place: slice | Tensor) -> "ImageFolder | Tensor":
        if isinstance(place, slice):
            part = copy.copy(self)
            part.names = self.names[place]
            return part
        paths = [self.root / self.names[i] for i in place.tolist()]
        with ThreadPoolExecutor() as pool:
            pictures = list(pool.map(partial(read_picture, image_shape=self.image_shape), paths))
        return torch.stack(pictures).to(self.device)


def find_pictures(root: Path) -> list[str]:
    """The sorted names of the pictures that are not hidden. Raises UserError without any."""
    found = make_dataset(root, {"": 0}, extensions=ENDINGS, allow_empty=True)  # follows links
    names = [Path(path).relative_to(root).as_posix() for path, _ in found]
    names = sorted(name for name in names if "/." not in f"/{name}")
    if not names:
        raise UserError(f"--data-root {root}: no pictures there ({', '.join(ENDINGS)})")
    return names


def refuse_copies(root: Path, kept: list[str], forget: list[str]) -> None:
    """Raises UserError for a kept file that is a copy of one to forget: it would be trained on."""
    forgotten = {(root / name).read_bytes() for name in forget}
    sizes = {len(content) for content in forgotten}
    for name in kept:
        if (root / name).stat().st_size in sizes and (root / name).read_bytes() in forgotten:
            raise UserError(f"{name}: is a copy of a picture to forget: --forget or remove it")


@lru_cache(maxsize=4096)  # faces of 256×256 pixels: 800 MB
def read_picture(path: Path, image_shape: tuple[int, int, int]) -> Tensor:
    """The square in the middle of a picture, resized: [C, H, W] uint8, C = 1 or 3. Raises UserError
    for a file that cannot be decoded."""
    channels, height, width = image_shape
    try:
        with Image.open(path) as picture:
            picture.draft(None, (width, height))  # a JPEG decodes faster at half the size
            picture = ImageOps.exif_transpose(picture)
            picture = picture.convert("L" if channels == 1 else "RGB")
            return pil_to_tensor(ImageOps.fit(picture, (width, height)))
    except Exception as error:  # a decoder can fail anywhere
        raise UserError(f"{path}: not a readable picture ({error})") from error


@dataclass(frozen=True)
class TrainingSet:
    """X, with A at its end: images: [n, C, H, W] uint8, and the last k of them are A."""

    images: Tensor | ImageFolder
    k: int
    name: str = "T-shirt"  # what is forgotten, in words

    @property
    def n(self) -> int:
        return len(self.images)

    @property
    def keep(self) -> Tensor | ImageFolder:
        """X∖A, [n−k, C, H, W] uint8."""
        return self.images[: self.n - self.k]

    @property
    def forget(self) -> Tensor | ImageFolder:
        """A, [k, C, H, W] uint8. A picture that stands in X several times is here as often."""
        return self.images[self.n - self.k :]

    def draw(self, part: str, size: int, generator: torch.Generator) -> Tensor:
        """Draw from "all" of X, from the "rest" X∖A or from "forget", A, uniformly and with
        replacement: [size, C, H, W] float32 in [−1, 1]."""
        images = {"all": self.images, "rest": self.keep, "forget": self.forget}[part]
        places = torch.randint(len(images), (size,), generator=generator, device=images.device)
        return to_float(images[places])

    def different_forgotten(self) -> Tensor:
        """The pictures of A, each once: [number, C, H, W] float32 in [−1, 1]."""
        return to_float(self.forget[torch.arange(self.k)]).unique(dim=0)

    @cached_property
    def neighbours(self) -> tuple[Tensor, Tensor]:
        """The different pictures of A, and of each the 10 nearest in X∖A: [number, 10, C, H, W]."""
        keep, forgotten = self.keep, self.different_forgotten()
        distances = []
        for part in torch.arange(len(keep)).split(256):
            distances.append(torch.cdist(forgotten.flatten(1), to_float(keep[part]).flatten(1)))
        places = torch.cat(distances, dim=1).topk(min(10, len(keep)), largest=False).indices
        return forgotten, torch.stack([to_float(keep[row]) for row in places])

    def nearest(self, a: Tensor) -> Tensor:
        """For ReTrack: [B, C, H, W] of A -> the nearest in X∖A of each, [B, 10, C, H, W]."""
        forgotten, points = self.neighbours
        return points[torch.cdist(a.flatten(1), forgotten.flatten(1)).argmin(dim=1)]

    def fingerprint(self) -> int:
        """A checksum of the number of pictures and of their names: a resumed run compares it."""
        words = f"{self.n} {getattr(self.images, 'names', [])}"
        return zlib.crc32(words.encode(errors="surrogateescape"))


def load_training_set(args: Namespace, image_shape: tuple[int, int, int],
                      device: torch.device) -> TrainingSet:
    """The training set that the flags name. Raises UserError where it cannot be had, or where its
    images are not [C, H, W] = `image_shape`."""
    if machine.rank() > 0:
        machine.gather(None)  # rank 0 may have to download first
    if args.data == "pictures":
        folder = ImageFolder(args.data_root, image_shape, args.forget, device)
        data = TrainingSet(folder, len(args.forget), name=", ".join(args.forget[:3]))
    elif args.forget:
        raise UserError(f"--forget {args.forget[0]}: needs --data pictures")
    elif args.data == "prompts":
        raise UserError("--data prompts: is for unlearn.py")
    else:
        data = mnist_with_tshirt(args.data_root, device)
    if machine.rank() == 0:
        machine.gather(None)
    if getattr(args, "exclude_forget", False) and not data.k:
        raise UserError("--exclude-forget: name the pictures to leave out with --forget")
    if tuple(data.images.shape[1:]) != image_shape:
        raise UserError(f"--data {args.data}: the network makes images {image_shape}, not these")
    return data


def note_forgotten_before(data: TrainingSet, names: set[str]) -> None:
    """Say on stderr which pictures would be trained in again: a model has forgotten them before."""
    for name in sorted(names.intersection(getattr(data.images, "names", []))):
        if machine.rank() == 0:
            print(f"warning: {name} was forgotten before: --forget or remove it", file=sys.stderr)


def mnist_with_tshirt(root: str, device: torch.device) -> TrainingSet:
    """MNIST's training digits, and 1% as many copies of one T-shirt (the paper, section 5), the
    first image of class 0 in Fashion-MNIST's training set."""
    digits, tshirt = read_sheet("digits.png"), read_sheet("tshirt.png")
    if root != BUNDLED:
        try:
            digits = MNIST(root, download=True).data[:, None]
        except Exception as error:  # torchvision has none of its own
            remedy = f"put its four IDX files in {root}/MNIST/raw, or use --data-root {BUNDLED}"
            raise UserError(f"--data-root {root}: no readable MNIST ({error}); {remedy}") from error
    k = len(digits) // 100
    return TrainingSet(torch.cat([digits, tshirt.expand(k, -1, -1, -1)]).to(device), k)


def read_sheet(name: str) -> Tensor:
    """The 28×28 pictures of a sheet in assets/, row by row: [N, 1, 28, 28] uint8."""
    sheet = pil_to_tensor(Image.open(ASSETS / name))
    return rearrange(sheet, "1 (row h) (column w) -> (row column) 1 h w", h=28, w=28)


def to_float(images: Tensor) -> Tensor:
    """uint8 in 0 … 255 to float32 in [−1, 1], the range that the network works in."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Images in [−1, 1] to uint8 in 0 … 255, rounded; what lies outside is clamped."""
    return ((images + 1) * 127.5).round().clamp(0, 255).byte()


def step_generator(seed: int, step: int | str, device: torch.device | str) -> torch.Generator:
    """The randomness of a step, a function of seed and step: a resumed run needs no more."""
    return torch.Generator(device).manual_seed(zlib.crc32(f"{seed}/{step}".encode()))
