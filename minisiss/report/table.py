"""Tables in Markdown, aligned so that they read as plain text too."""


def aligned(rows: list[list[str]]) -> str:
    """A table of a heading and rows, the first column flush left and the others flush right."""
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        [cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(zip(row, widths, strict=True))]
        for row in rows
    ]
    rule = ["-" * (width - 1) + ":" if place else "-" * width for place, width in enumerate(widths)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])
