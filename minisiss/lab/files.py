"""Reading tensors from files that anyone may have made, and writing files that are never half
there."""

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from minisiss.lab.cli import UserError


def read_tensors(path: Path | str) -> Any:
    """What torch.save wrote. Runs no code of the file. Raises an exception for a damaged file."""
    refuse_pointer(path)
    with zipfile.ZipFile(path) as archive:
        if archive.testzip():
            raise ValueError("a part of the file is damaged")
        if "constants.pkl" in str(archive.namelist()):
            raise ValueError("a TorchScript file, which is code")
    return torch.load(path, map_location="cpu", weights_only=True)


def refuse_pointer(path: Path | str) -> None:
    """Raises ValueError for the text that Git leaves in place of a large file."""
    with open(path, "rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise ValueError("a Git LFS pointer, not the file itself: git lfs pull")


def plain(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights in float32, under the names of the network itself.

    DistributedDataParallel and torch.compile put a prefix before every name. Raises ValueError for
    numbers that are not finite.
    """
    weights = {name: tensor.float().clone() for name, tensor in weights.items()}
    for prefix in ("module.", "_orig_mod."):
        consume_prefix_in_state_dict_if_present(weights, prefix)
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds numbers that are not finite")
    return weights


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Give a network on "meta" its weights. Raises RuntimeError for other names and shapes."""
    model.load_state_dict(weights, assign=True)


def in_short(error: Exception) -> str:
    """The kind of an error, and its first words."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:200]}"


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Call `write` on a file beside `path`, and put it in its place once it is whole.

    Raises UserError when the disk does not take it; the old file is then as it was.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with unfinished.open("wb") as file:
            write(file)
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
        unfinished.unlink(missing_ok=True)
        words = f"could not be written ({error}); an older one is as it was"
        raise UserError(f"{path}: {words}") from error
