"""Writing files so that a crash leaves the old one or the new one."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from minisiss.cli import UserError


UNFINISHED = ".unfinished-"  # how the names of temporary files begin


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Call `write` on a temporary file in the same folder, and put that in the place of `path` when it is on the disk.

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
