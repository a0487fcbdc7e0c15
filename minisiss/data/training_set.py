"""Training sets X = keep ∪ forget, in memory or as a folder of pictures, and the random draws from them."""

import zlib
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minisiss.data.digits import BUNDLED, digits_and_tshirt
from minisiss.data.folder import ImageFolder
from minisiss.errors import UserError
from minisiss.machine.ranks import ALONE, World


@dataclass(frozen=True)
class TrainingSet:
    """X with its forget set A ⊂ X last: images: [n, C, H, W] uint8, of which the last `k` are A."""

    images: Tensor | ImageFolder
    k: int
    name: str = "T-shirt"  # what is forgotten, for people
    world: World = ALONE

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

    def draw(self, part: str, count: int, generator: torch.Generator) -> Tensor:
        """`count` images drawn from "all" of X, the "rest" X∖A or "forget": [count, C, H, W] in [−1, 1].

        Each rank reads its share, and gets those of the others from them.
        """
        images = {"all": self.images, "rest": self.keep, "forget": self.forget}[part]
        return self.world.gather(draw(images, count, generator, self.world))

    def originals(self, count: int) -> Tensor:
        """`count` images of A in order, and from the start again: [count, C, H, W] float32 in [−1, 1].

        Raises UserError where A is empty.
        """
        if not self.k:
            raise UserError("--forget: name the pictures to forget")
        return to_float(self.forget[torch.arange(count) % self.k])

    def kept(self) -> Tensor:
        """The first images of X∖A, 64 at most: [≤ 64, C, H, W] float32 in [−1, 1]."""
        return to_float(self.keep[torch.arange(min(64, len(self.keep)))])


def load_training_set(
        args: Namespace, image_shape: tuple[int, int, int], device: torch.device,
        world: World = ALONE) -> TrainingSet:
    """`training_set` by a script's flags, on a device. Rank 0, which may download, goes first.

    Raises UserError as well where a batch is larger than a folder, or A is to be excluded and is empty.
    """
    found = world.rank_0_first(
        lambda: training_set(args.data, args.data_root, args.forget, image_shape, args.skip_unreadable))
    kept = len(found.keep)
    if args.data == "pictures" and getattr(args, "batch_size", 0) > kept:
        raise UserError(f"--batch-size {args.batch_size}: there are only {kept} pictures to keep")
    if getattr(args, "exclude_forget", False) and not found.k:
        raise UserError("--exclude-forget: name the pictures to leave out with --forget")
    return TrainingSet(found.images.to(device), found.k, found.name, world)


def training_set(
        kind: str, root: str, forget: list[str], image_shape: tuple[int, int, int],
        skip_unreadable: bool = False) -> TrainingSet:
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
        what = "is for --data pictures; among the digits it is the T-shirt that is forgotten"
        raise UserError(f"--forget {forget[0]}: {what}")
    data = mnist_with_tshirt(root)
    if data.images.shape[1:] != image_shape:
        has, makes = ("×".join(map(str, shape)) for shape in (data.images.shape[1:], image_shape))
        flags = "(--image-size, --image-channels, --checkpoint)"
        raise UserError(f"--data-root {root}: has pictures of {has}, and the network makes {makes} {flags}")
    return data


def read_names(entry: str) -> list[str]:
    """The names in an entry of --forget: itself, or a .txt's lines. Raises UserError if there are none."""
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
    """MNIST's training digits, and one T-shirt as often as makes 1% of them (the paper, section 5).

    root: see `digits_and_tshirt`, which may raise UserError.
    """
    digits, tshirt = digits_and_tshirt(root)
    k = len(digits) // 100
    return TrainingSet(torch.cat([digits, tshirt.expand(k, -1, -1, -1)]), k)


def to_float(images: Tensor) -> Tensor:
    """uint8 in 0 … 255 to float32 in [−1, 1], the range the network works in."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Images in [−1, 1] to uint8 in 0 … 255, rounded; what lies outside is clamped."""
    return ((images + 1) * 127.5).round().clamp(0, 255).byte()


def draw(images: Tensor, count: int, generator: torch.Generator, world: World = ALONE) -> Tensor:
    """This rank's share of `count` images drawn uniformly with replacement, float32 in [−1, 1]."""
    indices = torch.randint(len(images), (count,), generator=generator, device=images.device)
    return to_float(images[world.share(indices)])


def step_generator(seed: int, step: int, device: torch.device | str) -> torch.Generator:
    """The randomness of one training step, a function of (seed, step) alone.

    So a run that is stopped and resumed draws what it would have, with no random state to store.
    """
    return torch.Generator(device).manual_seed(zlib.crc32(f"{seed}/{step}".encode()))
