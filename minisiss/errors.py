"""What ends a run in one line instead of a traceback, and who says it."""

import os


class UserError(Exception):
    """Something the user can put right: printed as one line, without a traceback, with exit status 2."""


class Diverged(Exception):
    """A loss or gradient that is no number any more: printed as one line, with exit status 1."""


def of_torchrun(name: str, alone: int) -> int:
    """A number that torchrun gives its processes, and `alone` where it is not at work.

    Some of its variables may be left over from another program, or set and empty.
    """
    values = [os.environ.get(one, "") for one in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", name)]
    return int(values[-1]) if all(values) and all(value.isdigit() for value in values[1:]) else alone


def rank() -> int:
    """Which of torchrun's processes this is; 0 without torchrun."""
    return of_torchrun("RANK", 0)
