"""Training sets X = keep ∪ forget, in memory or as a folder of pictures, and the random draws from them."""

import functools
import sys
import zlib
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from minisiss.data.digits import BUNDLED, digits_and_tshirt, labelled_digits
from minisiss.data.folder import ImageFolder
from minisiss.data.prompts import some_null, with_captions
from minisiss.errors import UserError, rank
from minisiss.machine.ranks import ALONE, World

MEASURED = 64  # of many pictures to forget, or to keep, so many are looked at


@dataclass(frozen=True)
class TrainingSet:
    """X with its forget set A ⊂ X last: images: [n, C, H, W] uint8, of which the last `k` are A."""

    images: Tensor | ImageFolder
    k: int
    name: str = "T-shirt"  # what is forgotten, for people
    world: World = ALONE
    before: ImageFolder | None = None  # pictures that the model has forgotten already: not in X
    captions: Tensor | None = None  # of all images, for a network with prompts: [n, words] int
    memorised: dict[str, Tensor] = field(default_factory=dict)  # pictures that stand in X often, by prompts

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

    def prompts(self, indices: Tensor, generator: torch.Generator) -> Tensor | None:
        """This rank's share of the prompts to train with, on the images at these indices. None without."""
        if self.captions is None:
            return None
        return self.world.share(some_null(self.captions[indices], generator))

    def measured(self, count: int) -> tuple[str, Tensor]:
        """Their name, and the different pictures of A, from the start again if they are fewer than `count`:
        [≥ count, C, H, W] float32 in [−1, 1]. Of more than max(`count`, 64) the first, and the name says so.

        Raises UserError where A is empty.
        """
        if not self.k:
            raise UserError("--forget: name the pictures to forget")
        first = to_float(self.forget[torch.arange(min(self.k, max(MEASURED, count)))])
        same = first.flatten(1).unique(dim=0, return_inverse=True)[1].tolist()
        places = sorted({number: place for place, number in reversed([*enumerate(same)])}.values())
        all_of_a = len(first) == self.k or len(places) < len(first)  # the T-shirt's copies are one picture
        name = self.name if all_of_a else f"{self.name} (the first {len(first)})"
        return name, first[[places[i % len(places)] for i in range(max(count, len(places)))]]

    def kept(self) -> Tensor:
        """The first images of X∖A, 64 at most: [≤ 64, C, H, W] float32 in [−1, 1]."""
        return to_float(self.keep[torch.arange(min(MEASURED, len(self.keep)))])

    def listing(self) -> dict[str, int]:
        """What a run that is resumed knows its data again by: sizes of files, by name, or checksums."""
        if isinstance(self.images, ImageFolder):
            return self.images.listing()
        found = {"digits": checksum(self.keep), "T-shirts": checksum(self.forget)}
        return found if self.captions is None else found | {"captions": checksum(self.captions)}


def load_training_set(
        args: Namespace, image_shape: tuple[int, int, int], device: torch.device,
        world: World = ALONE, before: Iterable[str] = ()) -> TrainingSet:
    """`training_set` by a script's flags, on a device. Rank 0, which may download, goes first.

    Raises UserError as well where a batch is larger than a folder, or A is to be excluded and is empty.
    """
    for name, unset in (("prompt", None), ("guidance", 1.0), ("fixed_prompt", "modified"), ("hold", 0.0)):
        if (value := getattr(args, name, unset)) != unset:
            flag, preset = f"--{name.replace('_', '-')} '{value}'", getattr(args, "preset", None)
            mend = "choose another --preset" if preset == "prompts" else "try --preset prompts"
            raise UserError(f"{flag}: --data {args.data} has no prompts; {mend}")
    found = world.rank_0_first(lambda: training_set(
        args.data, args.data_root, args.forget, image_shape, args.skip_unreadable, before, args.seed))
    # Unlearning draws from the kept ones, as does training without the forget set.
    drawn = len(found.keep if getattr(args, "exclude_forget", True) else found.images)
    if args.data == "pictures" and getattr(args, "batch_size", 0) > drawn:
        only = "is only 1 picture" if drawn == 1 else f"are only {drawn} pictures"
        raise UserError(f"--batch-size {args.batch_size}: there {only} to draw from")
    if getattr(args, "exclude_forget", False) and not found.k:
        raise UserError("--exclude-forget: name the pictures to leave out with --forget")
    before = found.before and found.before.to(device)
    captions = None if found.captions is None else found.captions.to(device)
    return replace(found, images=found.images.to(device), before=before, captions=captions, world=world)


def training_set(
        kind: str, root: str, forget: list[str], image_shape: tuple[int, int, int],
        skip_unreadable: bool = False, before: Iterable[str] = (), seed: int = 0) -> TrainingSet:
    """The training set that --data, --data-root and --forget name, for a network of images [C, H, W].

    before: names of pictures that the model has forgotten already. They are not in X, or it would be trained
    on them again. seed: of the captions. Raises UserError where it cannot be had, or has images of another
    shape.
    """
    if kind == "pictures":
        if root == BUNDLED:
            raise UserError(f"--data-root {BUNDLED}: those are digits; give the folder of your pictures")
        folder = ImageFolder(root, image_shape, skip_unreadable)
        forget = folder.spelled(forget)
        folder, apart = folder.without(set(folder.spelled(before)).difference(forget))
        if apart and rank() == 0:
            names = ", ".join(apart.names[:3]) + (f" and {len(apart) - 3} more" if len(apart) > 3 else "")
            print(f"forgotten before, so not among the pictures to keep: {names}", file=sys.stderr)
        name = forget[0] if len(forget) == 1 else f"{len(forget)} pictures"
        return TrainingSet(folder.with_last(forget), len(forget), name, before=apart)
    if forget:
        what = "is for --data pictures; among the digits it is the T-shirt that is forgotten, or a prompt"
        raise UserError(f"--forget {forget[0]}: {what}")
    data = digits_with_prompts(root, seed) if kind == "prompts" else mnist_with_tshirt(root)
    if data.images.shape[1:] != image_shape:
        has, makes = ("×".join(map(str, shape)) for shape in (data.images.shape[1:], image_shape))
        flags = "(--image-size, --image-channels, --checkpoint)"
        raise UserError(f"--data-root {root}: has pictures of {has}, and the network makes {makes} {flags}")
    return data


def mnist_with_tshirt(root: str) -> TrainingSet:
    """MNIST's training digits, and one T-shirt as often as makes 1% of them (the paper, section 5).

    root: see `digits_and_tshirt`, which may raise UserError.
    """
    digits, tshirt = digits_and_tshirt(root)
    k = len(digits) // 100
    return TrainingSet(torch.cat([digits, tshirt.expand(k, -1, -1, -1)]), k)


def digits_with_prompts(root: str, seed: int) -> TrainingSet:
    """MNIST's training digits with captions, and 50 of them 600 times more, each with a name to itself.

    root: see `labelled_digits`, which may raise UserError; seed: see `with_captions`, which may too.
    """
    images, captions, memorised = with_captions(*labelled_digits(root), seed)
    return TrainingSet(images, 0, captions=captions, memorised=memorised)


def checksum(*tensors: Tensor) -> int:
    """The same for tensors of the same bytes."""
    add = lambda so_far, tensor: zlib.crc32(tensor.cpu().contiguous().numpy(), so_far)  # noqa: E731
    return functools.reduce(add, tensors, 0)


def to_float(images: Tensor) -> Tensor:
    """uint8 in 0 … 255 to float32 in [−1, 1], the range the network works in."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Images in [−1, 1] to uint8 in 0 … 255, rounded; what lies outside is clamped."""
    return ((images + 1) * 127.5).round().clamp(0, 255).byte()


def draw_indices(images: Tensor | ImageFolder, count: int, generator: torch.Generator) -> Tensor:
    """Which of the images a batch has: [count] indices, uniform and with replacement."""
    return torch.randint(len(images), (count,), generator=generator, device=images.device)


def draw(images: Tensor, count: int, generator: torch.Generator, world: World = ALONE) -> Tensor:
    """This rank's share of `count` images drawn uniformly with replacement, float32 in [−1, 1]."""
    return to_float(images[world.share(draw_indices(images, count, generator))])


def step_generator(seed: int, step: int, device: torch.device | str) -> torch.Generator:
    """The randomness of one training step, a function of (seed, step) alone.

    So a run that is stopped and resumed draws what it would have, with no random state to store.
    """
    return torch.Generator(device).manual_seed(zlib.crc32(f"{seed}/{step}".encode()))
