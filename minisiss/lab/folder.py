"""A folder of pictures as a training set: read when asked for, so any number of them fits in
memory."""

import copy
import difflib
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from minisiss.lab.cli import UserError

ENDINGS = (".jpg", ".jpeg", ".png", ".webp")


class ImageFolder:
    """The pictures in a folder and its subfolders, by name, indexed like a tensor [n, C, H, W]
    uint8.

    folder[indices] reads these pictures; folder[a:b] is a folder of some of them, unread. Pictures
    are cropped to the square in the middle and resized. They are never flipped: what is forgotten
    is a picture, not its mirror image.
    """

    def __init__(self, root: str, image_shape: tuple[int, int, int], forget: list[str],
                 device: torch.device | str = "cpu") -> None:
        """forget: names of pictures, which come last. Raises UserError as `find_pictures` and
        `refuse_copies` do, and for a name that is not there, with the nearest."""
        self.root, self.image_shape, self.device = Path(root), image_shape, torch.device(device)
        names, chosen = find_pictures(self.root), set(forget)
        missing = chosen.difference(names)
        for name in forget:
            if name in missing:
                near = ", ".join(difflib.get_close_matches(name, names, 3, cutoff=0))
                raise UserError(f"--forget {name}: is not in {root}; the nearest are {near}")
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
    """The names of the pictures in a folder and its subfolders, sorted, without hidden ones.

    Raises UserError where there are none, and for a link to a folder: it would be passed over.
    """
    names = []
    for path in root.rglob("*"):
        name = path.relative_to(root)
        if any(part.startswith(".") for part in name.parts):
            continue
        if path.is_symlink() and path.is_dir():
            raise UserError(f"{path}: is a link to a folder; put the folder itself there")
        if path.suffix.lower() in ENDINGS and path.is_file():
            names.append(name.as_posix())
    if not names:
        raise UserError(f"--data-root {root}: no pictures there ({', '.join(ENDINGS)})")
    return sorted(names)


def refuse_copies(root: Path, kept: list[str], forget: list[str]) -> None:
    """Raises UserError for a kept file that is a copy of one to forget: it would be trained on."""
    forgotten = {(root / name).read_bytes(): name for name in forget}
    sizes = {len(content) for content in forgotten}
    for name in kept:
        if (root / name).stat().st_size in sizes:
            original = forgotten.get((root / name).read_bytes())
            if original:
                raise UserError(f"{name}: is a copy of {original}; --forget it too, or remove it")


@lru_cache(maxsize=4096)  # faces of 256×256 pixels: 800 MB
def read_picture(path: Path, image_shape: tuple[int, int, int]) -> Tensor:
    """Read a picture as [C, H, W] uint8, C = 1 or 3; what is transparent becomes white.

    Raises UserError, naming the file, if it cannot be decoded.
    """
    channels, height, width = image_shape
    try:
        with Image.open(path) as picture:
            picture.draft(None, (width, height))  # a JPEG decodes faster at half the size
            picture = ImageOps.exif_transpose(picture)
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                white = Image.new("RGBA", picture.size, "white")
                picture = Image.alpha_composite(white, picture)
            picture = picture.convert("L" if channels == 1 else "RGB")
            return pil_to_tensor(ImageOps.fit(picture, (width, height)))
    except Exception as error:  # a damaged file can fail anywhere in a decoder
        raise UserError(f"{path}: not a readable picture ({error})") from error
