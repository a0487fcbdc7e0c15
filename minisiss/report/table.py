"""Tables in Markdown, aligned so that they read as plain text too; and the means that go into them."""

import statistics


def aligned(rows: list[list[str]]) -> str:
    """A table of a heading and rows, the first column flush left and the others flush right."""
    first, *others = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * first, *("-" * (width - 1) + ":" for width in others)]
    cells = [[name.ljust(first), *map(str.rjust, row, others)] for name, *row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [cells[0], rule, *cells[1:]])


def mean_and_spread(values: list[float | None]) -> tuple[float | None, float | None]:
    """Mean and standard deviation (divisor n − 1); None where a run has none, and for the spread of one."""
    if None in values:
        return None, None
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None
