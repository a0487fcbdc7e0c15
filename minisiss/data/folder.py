"""A folder of pictures as a training set: read when asked for, so that any number of them fits in memory."""

import copy
import difflib
import hashlib
import os
import posixpath
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from minisiss.errors import UserError, rank, reading

ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
CACHE_BYTES = 2**30  # of pictures kept in memory once they have been read
LEAST_SIDE = 8  # pixels: what is narrower is no picture of anything


class ImageFolder:
    """The pictures in a folder and its subfolders, by name, indexed like a tensor [n, C, H, W] of uint8.

    folder[indices] reads those pictures, in threads; folder[a:b] is the folder of some of them, unread. A
    picture is cropped to the square in its middle and resized, and never flipped: what is forgotten is one
    picture, not its mirror image. Hidden files and folders are no data. Raises UserError for a folder without
    pictures, for a link that leads out of it or to a folder, and for an unreadable picture, unless
    `skip_unreadable`: with a warning, the next takes its place.
    """

    def __init__(self, root: str, image_shape: tuple[int, int, int], skip_unreadable: bool = False) -> None:
        self.root, self.image_shape, self.skip_unreadable = Path(root), tuple(image_shape), skip_unreadable
        self.device, self.pool = torch.device("cpu"), ThreadPoolExecutor()
        self.cache: dict[str, Tensor] = {}  # shared by the folder and its parts, as are the next two:
        self.unreadable: set[str] = set()
        self.copies: set[str] = set()  # kept pictures that have been found to be copies of forgotten ones
        self.forgotten: dict[str, list[str]] = {}  # digest of a picture to forget: its names
        if image_shape[0] not in (1, 3):
            raise UserError(f"--image-channels {image_shape[0]}: pictures are read with 1 channel or with 3")
        names = sorted(self._list())
        # Opening a file reads its header only: quick enough for all, and shows most of what is no picture.
        with tqdm(names, desc=f"opening {root}", unit="picture", leave=False, delay=2) as bar:
            wrong = [error for error in self.pool.map(self._problem, bar) if error]
        if wrong and not skip_unreadable:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            what = f"{len(wrong)} of {len(names)} pictures cannot be read: {'; '.join(wrong[:3])}{more}"
            raise UserError(f"{what}; leave them out with --skip-unreadable")
        for problem in wrong if rank() == 0 else ():  # the other ranks open the same files
            tqdm.write(f"warning: {problem}", file=sys.stderr)
        self.names = [name for name in names if name not in self.unreadable]
        if not self.names:
            raise UserError(f"--data-root {root}: no readable picture there ({', '.join(ENDINGS)})")

    def _list(self) -> Iterator[str]:
        if not self.root.is_dir():
            raise UserError(f"--data-root {self.root}: no such folder")

        def fail(error: OSError) -> None:
            raise UserError(f"{error.filename}: cannot be read ({error.strerror})")

        for directory, folders, files in os.walk(self.root, onerror=fail):
            folders[:] = [name for name in folders if not name.startswith(".")]  # .ipynb_checkpoints
            if links := [path for path in (Path(directory, name) for name in folders) if path.is_symlink()]:
                raise UserError(f"{links[0]}: is a link to a folder; put the folder itself there")
            for path in (Path(directory, name) for name in files if not name.startswith(".")):
                if path.suffix.lower() not in ENDINGS:
                    continue
                if path.is_symlink() and not path.resolve().is_relative_to(self.root.resolve()):
                    raise UserError(f"{path}: is a link out of the folder")
                yield path.relative_to(self.root).as_posix()

    def _problem(self, name: str) -> str | None:
        """What is wrong with a file, as far as its header says."""
        try:
            with opened(self.root / name):
                return None
        except UserError as error:
            self.unreadable.add(name)
            return str(error)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (len(self), *self.image_shape)

    def _but(self, **changes: Any) -> "ImageFolder":
        """The same folder, cache and threads, but for these attributes."""
        other = copy.copy(self)
        vars(other).update(changes)
        return other

    def to(self, device: torch.device | str) -> "ImageFolder":
        """The same pictures, on this device once they are read."""
        return self._but(device=torch.device(device))

    def without(self, names: set[str]) -> "tuple[ImageFolder, ImageFolder | None]":
        """The other pictures, and those of these names that are there, None if none is."""
        there = [name for name in self.names if name in names]
        rest = self._but(names=[name for name in self.names if name not in names])
        return (rest, self._but(names=there)) if there else (self, None)

    def spelled(self, names: Iterable[str]) -> list[str]:
        """These names as they stand in the folder, where one there looks the same; else as they are."""
        there, written = set(self.names), {same_looking(name): name for name in self.names}
        return [name if name in there else written.get(same_looking(name), name) for name in names]

    def with_last(self, names: list[str]) -> "ImageFolder":
        """The same pictures, these last: those to forget.

        Raises UserError for a name that is not there, with the nearest, and for a picture to forget that
        cannot be read: no other can stand in for it. Warns of kept pictures that are copies of these; of
        those in files of another size when they are first read.
        """
        rest = dict.fromkeys(self.names)
        for name in names:
            if name in rest:
                del rest[name]
                continue
            if name in self.names:
                raise UserError(f"--forget {name}: named twice")
            few = len(self) < 100_000
            near = difflib.get_close_matches(name, self.names, 3, cutoff=0) if few else self.names[:3]
            what = f"no readable picture of that name in {self.root}; the nearest are {', '.join(near)}"
            raise UserError(f"--forget {name}: {what}")
        if not rest:
            raise UserError("--forget: names every picture, and leaves none to keep")
        pictures = self.pool.map(lambda name: read_picture(self.root / name, self.image_shape), names)
        folder = self._but(names=[*rest, *names], forgotten={})
        for name, picture in zip(names, pictures, strict=True):
            folder.forgotten.setdefault(digest(picture), []).append(name)
        sizes = folder.listing() if names else {}
        of_names = {sizes[name] for name in names}
        for place, name in enumerate(rest if names else ()):
            if sizes[name] in of_names:
                folder._read(place)
        return folder

    def listing(self) -> dict[str, int]:
        """The bytes in each picture's file, by name: by this a run that is resumed knows its data again."""
        return {name: (self.root / name).stat().st_size for name in self.names}

    def __getitem__(self, place: slice | Tensor) -> "ImageFolder | Tensor":
        if isinstance(place, slice):
            return self._but(names=self.names[place])
        places = place.tolist()
        each = list(dict.fromkeys(places))  # once: two threads would say the same of a damaged one
        read = dict(zip(each, self.pool.map(self._read, each), strict=True))
        pictures = torch.stack([read[place] for place in places])
        pictures = pictures.pin_memory() if self.device.type == "cuda" else pictures
        return pictures.to(self.device, non_blocking=self.device.type == "cuda")

    def _read(self, index: int) -> Tensor:
        """The picture at this index, or the next readable one: [C, H, W] uint8."""
        for place in range(index, index + len(self)):
            name = self.names[place % len(self)]
            if name in self.cache:
                return self.cache[name]
            if name in self.unreadable:
                continue
            try:
                picture = read_picture(self.root / name, self.image_shape)
            except UserError as error:
                if not self.skip_unreadable:
                    raise UserError(f"{error}; leave such pictures out with --skip-unreadable") from error
                self.unreadable.add(name)
                tqdm.write(f"warning: {error}", file=sys.stderr)
                continue
            if self.forgotten:
                self._notice(name, self.forgotten.get(digest(picture), [name]))
            if (len(self.cache) + 1) * picture.numel() <= CACHE_BYTES:
                self.cache[name] = picture
            return picture
        raise UserError(f"{self.root}: {', '.join(self.names[:3])}: none of these can be read")

    def _notice(self, name: str, alike: list[str]) -> None:
        """Warn once if a picture that is kept is one of those to forget: `alike`."""
        if name not in alike and name not in self.copies:
            self.copies.add(name)
            what = f"is the same picture as {alike[0]}, and stays among those to keep"
            tqdm.write(f"warning: {name} {what}; remove it, or --forget it too", file=sys.stderr)


def same_looking(name: str) -> str:
    """One spelling of all that name the same file to the eye: "./é.jpg" with one sign or two for the é."""
    return unicodedata.normalize("NFC", posixpath.normpath(name))


def digest(picture: Tensor) -> str:
    """The same for pictures of the same pixels only."""
    return hashlib.sha256(picture.numpy().tobytes()).hexdigest()


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """Open a picture, reading its header. What fails, also inside `with`, is a UserError naming the file."""
    with reading(path, "picture", own_words=True), Image.open(path) as picture:
        width, height = picture.size
        if min(width, height) < LEAST_SIDE:
            raise ValueError(f"only {width}×{height} pixels")
        if width * height > Image.MAX_IMAGE_PIXELS:  # a small file that unfolds to gigabytes
            raise ValueError(f"{width}×{height} pixels; more than {Image.MAX_IMAGE_PIXELS:,} are refused")
        yield picture


def read_picture(path: Path, image_shape: tuple[int, int, int]) -> Tensor:
    """Read a picture as [C, H, W] uint8, C = 1 or 3, without transparency; of an animation the first frame.

    Raises UserError, naming the file, for what is no picture.
    """
    channels, *size = image_shape
    with opened(path) as picture:
        picture.draft(None, size)  # a JPEG decodes faster at half the size, if that is still large enough
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I"):  # 16 bits, which convert would clip to 255
            picture = picture.point(lambda value: value / 256).convert("L")
        if "transparency" in picture.info:
            picture = picture.convert("RGBA")  # or Pillow warns
        return pil_to_tensor(ImageOps.fit(picture.convert("L" if channels == 1 else "RGB"), size))
