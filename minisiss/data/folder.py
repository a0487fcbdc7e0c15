"""A folder of pictures as a training set: read when asked for, so that any number of them fits in memory."""

import copy
import difflib
import os
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from minisiss.errors import UserError, rank

ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
CACHE_BYTES = 2**30  # of pictures kept in memory once they have been read
LEAST_SIDE = 8  # pixels: what is narrower is no picture of anything

warnings.simplefilter("error", Image.DecompressionBombWarning)  # a small file that unfolds to gigabytes


class ImageFolder:
    """The pictures in a folder and its subfolders, sorted by name, indexed like a tensor [n, C, H, W] of
    uint8.

    folder[indices] reads those pictures, in threads; folder[a:b] is the folder of some of them, unread. A
    picture is cropped to the square in its middle and resized, and never flipped: what is forgotten is one
    picture, not its mirror image.

    Raises UserError for a folder without pictures, for a link that leads out of it, and for an unreadable
    picture, which `skip_unreadable` leaves out instead, with a warning; then the next one by name is read in
    its place.
    """

    def __init__(self, root: str, image_shape: tuple[int, int, int], skip_unreadable: bool = False) -> None:
        self.root, self.image_shape, self.skip_unreadable = Path(root), tuple(image_shape), skip_unreadable
        self.device = torch.device("cpu")
        self.pool = ThreadPoolExecutor()
        self.cache: dict[str, Tensor] = {}  # shared by the folder and its parts, as is:
        self.unreadable: set[str] = set()
        self.names = sorted(self._list())
        # Opening a file reads its header only: quick enough for all of them, and most of what is no picture
        # shows.
        with tqdm(self.names, desc=f"opening {root}", unit="picture", leave=False, delay=2) as bar:
            wrong = [error for error in self.pool.map(self._problem, bar) if error]
        if wrong and not skip_unreadable:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            what = f"{len(wrong)} of {len(self.names)} pictures cannot be read: {'; '.join(wrong[:3])}{more}"
            raise UserError(f"{what}; leave them out with --skip-unreadable")
        for problem in wrong if rank() == 0 else ():  # the other ranks open the same files
            warn(problem)
        self.names = [name for name in self.names if name not in self.unreadable]
        if not self.names:
            raise UserError(f"--data-root {root}: no readable picture there ({', '.join(ENDINGS)})")

    def _list(self) -> Iterator[str]:
        if not self.root.is_dir():
            raise UserError(f"--data-root {self.root}: no such folder")
        inside = self.root.resolve()
        for directory, _, files in os.walk(self.root):  # follows no link to a folder
            for file in files:
                path = Path(directory, file)
                if path.suffix.lower() not in ENDINGS or file.startswith("."):
                    continue
                if path.is_symlink() and not path.resolve().is_relative_to(inside):
                    raise UserError(f"{path}: is a link out of the folder")
                yield path.relative_to(self.root).as_posix()

    def _problem(self, name: str) -> str | None:
        """What is wrong with a file, as far as its header says."""
        try:
            with open_picture(self.root / name):
                return None
        except UserError as error:
            self.unreadable.add(name)
            return str(error)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (len(self), *self.image_shape)

    def to(self, device: torch.device | str) -> "ImageFolder":
        """The same pictures, on this device once they are read."""
        moved = copy.copy(self)
        moved.device = torch.device(device)
        return moved

    def with_last(self, names: list[str]) -> "ImageFolder":
        """The same pictures with these at the end. Raises UserError, with the nearest ones, for a name not
        there."""
        there, last = set(self.names), set()
        for name in names:
            if name not in there:
                few = len(self) < 100_000
                near = difflib.get_close_matches(name, self.names, 3, cutoff=0) if few else self.names[:3]
                what = f"no readable picture of that name in {self.root}; the nearest are {', '.join(near)}"
                raise UserError(f"--forget {name}: {what}")
            if name in last:
                raise UserError(f"--forget {name}: named twice")
            last.add(name)
        if len(names) == len(self):
            raise UserError("--forget: names every picture, and leaves none to keep")
        ordered = copy.copy(self)
        ordered.names = [name for name in self.names if name not in last] + names
        return ordered

    def __getitem__(self, place: slice | Tensor) -> "ImageFolder | Tensor":
        if isinstance(place, slice):
            part = copy.copy(self)
            part.names = self.names[place]
            return part
        pictures = torch.stack(list(self.pool.map(self._read, place.tolist())))
        if self.device.type == "cuda":
            pictures = pictures.pin_memory()
        return pictures.to(self.device, non_blocking=True)

    def _read(self, index: int) -> Tensor:
        """The picture at this index, or the next readable one: [C, H, W] uint8."""
        for following in range(len(self)):
            name = self.names[(index + following) % len(self)]
            if name in self.unreadable:
                continue
            if name in self.cache:
                return self.cache[name]
            try:
                picture = read_picture(self.root / name, self.image_shape)
            except UserError as error:
                if not self.skip_unreadable:
                    raise UserError(f"{error}; leave such pictures out with --skip-unreadable") from error
                self.unreadable.add(name)
                warn(str(error))
                continue
            if (len(self.cache) + 1) * picture.numel() <= CACHE_BYTES:
                self.cache[name] = picture
            return picture
        raise UserError(f"{self.root}: {', '.join(self.names[:3])}: none of these can be read")


def open_picture(path: Path) -> Image.Image:
    """Open a picture, reading its header. Raises UserError, naming the file, for what is none."""
    try:
        picture = Image.open(path)
        if min(picture.size) < LEAST_SIDE:
            raise ValueError(f"only {picture.size[0]}×{picture.size[1]} pixels")
        return picture
    except Exception as error:  # a damaged file can fail anywhere in a decoder
        raise UserError(f"{path}: not a readable picture ({reason(error)})") from error


def read_picture(path: Path, image_shape: tuple[int, int, int]) -> Tensor:
    """Read a picture as [C, H, W] uint8, C = 1 or 3: an animation's first frame, 16 bits as 8, no
    transparency."""
    channels, *size = image_shape
    with open_picture(path) as picture:
        try:
            picture.draft(None, size)  # a JPEG decodes faster at half the size, if that is still large enough
            picture = ImageOps.exif_transpose(picture)
            if picture.mode.startswith("I"):  # which convert would clip to 255
                picture = picture.point(lambda value: value / 256).convert("L")
            if "transparency" in picture.info:
                picture = picture.convert("RGBA")  # or Pillow warns
            return pil_to_tensor(ImageOps.fit(picture.convert("L" if channels == 1 else "RGB"), size))
        except Exception as error:
            raise UserError(f"{path}: not a readable picture ({reason(error)})") from error


def reason(error: Exception) -> str:
    """Pillow repeats the whole path in some of its messages."""
    return str(error).split(" '")[0] or type(error).__name__


def warn(problem: str) -> None:
    tqdm.write(f"warning: {problem}", file=sys.stderr)
