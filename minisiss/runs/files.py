"""Reading tensors from files that anyone may have made; writing files so that a crash leaves the old or the
new one."""

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
from torch import Tensor

from minisiss.errors import UserError

# What the pickle in a file of dense tensors refers to. torch trusts more than that, bytearray(10**10) for
# one.
TRUSTED = re.compile(r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch \w+Storage")


def read_tensors(path: Path | str) -> Any:
    """What torch.save wrote, if that is dense tensors in lists and dicts, with numbers and text.

    Nothing in the file is run, and no more memory is taken than it has bytes. A byte that is missing or
    changed is noticed, unless nothing reads it. Raises any exception for a file that is not whole: it can
    fail anywhere in the readers.
    """
    with zipfile.ZipFile(path) as archive, warnings.catch_warnings():
        records = archive.infolist()
        # torch compresses none, and zipfile unpacks some without a bound.
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise ValueError("compressed")
        if sum(record.file_size for record in records) > os.path.getsize(path):  # the same bytes, many times
            raise ValueError("records overlap")
        if archive.testzip():
            raise ValueError("a checksum is wrong")
        # A TorchScript file has two.
        (pickled,) = (record for record in records if record.filename.lower().endswith(".pkl"))
        for operation, names, _ in pickletools.genops(archive.read(pickled)):
            if operation.name == "GLOBAL" and not TRUSTED.fullmatch(names):
                raise ValueError(f"{names} is no tensor")
        warnings.simplefilter("ignore")  # torch warns on its way to an error of its own; one line is enough
        # Mapped, a tensor is a view of the file's own bytes, whatever size it claims to be; not every torch
        # compares the two.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def check_tensors(path: Path | str, found: dict[str, Any], shapes: dict[str, torch.Size]) -> None:
    """Raises UserError unless the tensors `found` in a file are those of `shapes`, no other, and of finite
    numbers."""
    if (numbers := sum(shape.numel() for shape in shapes.values())) > os.path.getsize(path):
        raise UserError(f"{path}: too small for the {numbers:,} numbers of the network that it claims to hold")
    for name, shape in shapes.items():
        if name not in found:
            raise UserError(f"{path}: lacks {name}, of shape {list(shape)}")
        tensor = found[name]
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise UserError(f"{path}: {name} is no tensor of floating-point numbers")
        if tensor.shape != shape:
            raise UserError(f"{path}: {name} has shape {list(tensor.shape)}; expected {list(shape)}")
        if not tensor.float().isfinite().all():
            raise UserError(f"{path}: {name} holds numbers that are not finite")
    if extra := [name for name in found if name not in shapes]:
        raise UserError(f"{path}: holds {str(extra[0])[:80]}, for which its config has no place")


UNFINISHED = ".unfinished-"  # how the names of temporary files begin


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Call `write` on a temporary file in the same folder, and put that in the place of `path` once it is on
    disk.

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
    except BaseException as error:
        os.unlink(temporary)
        if isinstance(error, (OSError, RuntimeError)):  # torch.save wraps the first in the second
            raise UserError(f"{path}: could not be written ({error}); an older one is as it was") from error
        raise
