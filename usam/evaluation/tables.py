"""Tables of scores as text for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from dataset.text import printable

Table = tuple[Sequence[str], Sequence[Sequence[str]]]  # head, rows


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned lines: the first column to the left, the others to the right."""
    head, *rows = [[printable(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        )
        for row in (head, *rows)
    )


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The lines of a Markdown table; cells may hold any text."""
    escaped = [[printable(cell).replace("|", "\\|") for cell in row] for row in [head, *rows]]
    first, *others = ["| " + " | ".join(row) + " |" for row in escaped]
    return "\n".join([first, "| --- |" + " ---: |" * (len(head) - 1), *others])


def number(value: float | None, decimals: int = 4) -> str:
    """A number for a cell; a dash for None."""
    return "-" if value is None else f"{round(value, decimals) + 0.0:.{decimals}f}"  # no -0.0
