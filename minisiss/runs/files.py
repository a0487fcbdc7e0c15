"""Reading tensors from files that anyone may have made; writing files so that a crash leaves old or new."""

import os
import pickletools
import re
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from minisiss.errors import UserError

MOST_TIMESTEPS = 100_000  # of a schedule in a file
UNFINISHED = ".unfinished-"  # how the names of temporary files begin
# What the pickle of dense tensors refers to; torch trusts more than that, bytearray(10**10) for one.
TRUSTED = re.compile(r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch \w+Storage")


def read_tensors(path: Path | str) -> Any:
    """What torch.save wrote, if that is dense tensors in lists and dicts, with numbers and text.

    Nothing in the file is run, and no more memory is taken than it has bytes. A byte that is missing or
    changed is noticed, unless nothing reads it. Raises any exception: the readers can fail anywhere.
    """
    with zipfile.ZipFile(path) as archive, warnings.catch_warnings():
        records = archive.infolist()
        # torch compresses none, and zipfile unpacks some without a bound; several may claim the same bytes.
        compressed = any(record.compress_type != zipfile.ZIP_STORED for record in records)
        claimed = sum(record.file_size for record in records)
        if compressed or claimed > os.path.getsize(path) or archive.testzip():
            raise ValueError("compressed, overlapping or damaged records")
        # A TorchScript file has two.
        (pickled,) = (record for record in records if record.filename.lower().endswith(".pkl"))
        for operation, names, _ in pickletools.genops(archive.read(pickled)):
            if operation.name == "GLOBAL" and not TRUSTED.fullmatch(names):
                raise ValueError(f"{names} is no tensor")
        warnings.simplefilter("ignore")  # torch warns on its way to an error of its own; one line is enough
        # Mapped, a tensor is a view of the file's bytes, whatever size it claims: not every torch checks.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def unwrapped(tensors: dict[str, Any]) -> dict[str, Any]:
    """The same, without what DistributedDataParallel and torch.compile put before all names."""
    tensors = dict(tensors)  # or what a file's own class covers up is used
    names = [str(name) for name in tensors]
    common = os.path.commonprefix(names)  # noqa: RUF071 (of characters: as it should)
    prefix = re.match(r"((module|_orig_mod)\.)*", common)[0]
    return {name[len(prefix):]: tensor for name, tensor in zip(names, tensors.values(), strict=True)}


def check_tensors(path: Path | str, found: dict[str, Any], shapes: dict[str, torch.Size]) -> None:
    """Raises UserError unless a file's tensors, `found`, are finite, and of these names and shapes alone."""
    if (count := sum(shape.numel() for shape in shapes.values())) > os.path.getsize(path):
        raise UserError(f"{path}: too small for the {count:,} numbers of the network that it claims to hold")
    for name, shape in shapes.items():
        if name not in found:
            raise UserError(f"{path}: lacks {name}, of shape {list(shape)}")
        if not isinstance(tensor := found[name], torch.Tensor) or not tensor.is_floating_point():
            raise UserError(f"{path}: {name} is no tensor of floating-point numbers")
        if tensor.shape != shape:
            raise UserError(f"{path}: {name} has shape {list(tensor.shape)}; expected {list(shape)}")
        if not tensor.float().isfinite().all():
            raise UserError(f"{path}: {name} holds numbers that are not finite")
    if extra := [name for name in found if name not in shapes]:
        raise UserError(f"{path}: holds {str(extra[0])[:80]}, for which its config has no place")


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Call `write` on a temporary file beside `path`, and put that in its place once it is on disk.

    Raises UserError when the disk does not take it; the old file is then as it was.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=UNFINISHED)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes a file that only its owner may read
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save hides the first behind one of the second
        hidden = error.__context__
        reason = hidden.strerror if isinstance(hidden, OSError) else error
        raise UserError(f"{path}: could not be written ({reason}); an older one is as it was") from error
    finally:
        Path(temporary).unlink(missing_ok=True)  # it is still there only after a failure
