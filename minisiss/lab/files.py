"""Reading tensors from files of strangers, and writing files that are never half there."""

import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from minisiss.lab.cli import UserError


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Whatever goes wrong in here becomes a UserError: one line that names the file."""
    try:
        Path(path).stat()  # a missing file comes before a missing package
        yield
    except Exception as error:  # a damaged file can fail anywhere
        words = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: cannot be read: {type(error).__name__}: {words}") from error


def read_tensors(path: Path | str) -> Any:
    """What torch.save wrote. Runs no code of the file. Raises an exception for a damaged file."""
    with zipfile.ZipFile(path) as archive:
        if archive.testzip() or "constants.pkl" in str(archive.namelist()):
            raise ValueError("the file is damaged, or of TorchScript, which is code")
    return torch.load(path, map_location="cpu", weights_only=True)


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Give a network on "meta" its weights. Raises for other names or shapes, and for NaN."""
    weights = {name: tensor.float().clone() for name, tensor in weights.items()}
    for prefix in ("module.", "_orig_mod."):  # of DistributedDataParallel and torch.compile
        consume_prefix_in_state_dict_if_present(weights, prefix)
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds numbers that are not finite")
    model.load_state_dict(weights, assign=True)


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Call `write` on a file beside `path`, and put it in its place once it is whole. Raises
    UserError when the disk does not take it; the old file is then as it was."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with unfinished.open("wb") as file:
            write(file)
        unfinished.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save: RuntimeError
        unfinished.unlink(missing_ok=True)
        raise UserError(f"{path}: could not be written, and is as it was: {error}") from error
