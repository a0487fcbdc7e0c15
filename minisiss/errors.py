"""What ends a run in one line instead of a traceback, and who says it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """Something the user can put right: printed as one line, without a traceback, with exit status 2."""


class Diverged(Exception):
    """A loss or gradient that is no number any more: printed as one line, with exit status 1."""


@contextmanager
def reading(path: Path | str, what: str, own_words: bool = False) -> Iterator[None]:
    """What fails inside `with` becomes a UserError that names the file, and says why it cannot be read.

    own_words: in those of the error, where they help; those of torch's readers do not.
    """
    try:
        yield
    except PermissionError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except Exception as error:  # a damaged file can fail anywhere in torch's readers, or in a decoder
        reason = "truncated, damaged, or of another program"
        if own_words:
            reason = str(error).split(" '")[0] or type(error).__name__  # some of Pillow's repeat the path
        raise UserError(f"{path}: not a readable {what} ({reason})") from error


def of_torchrun(name: str, alone: int) -> int:
    """A number that torchrun gives its processes, and `alone` where it is not at work.

    Some of its variables may be left over from another program, or set and empty.
    """
    values = [os.environ.get(one, "") for one in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", name)]
    return int(values[-1]) if all(values) and all(value.isdigit() for value in values[1:]) else alone


def rank() -> int:
    """Which of torchrun's processes this is; 0 without torchrun."""
    return of_torchrun("RANK", 0)
