"""What ends a run in one line instead of a traceback, and who says it."""

import os


class UserError(Exception):
    """Something the user can put right: printed as one line, without a traceback, with exit status 2."""


class Diverged(Exception):
    """A loss or gradient that is no number any more: printed as one line, with exit status 1."""


def rank() -> int:
    """Which of torchrun's processes this is; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))
