"""Text for people: byte counts, tables, hints for misspelt names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

KIB = 1024
MIB = 1024 * KIB


def format_bytes(count: float) -> str:
    """A byte count for people: MiB with one decimal above 0.1 MiB, KiB below."""
    if count >= 0.1 * MIB:
        return f"{count / MIB:.1f} MiB"
    return f"{count / KIB:.1f} KiB"


def format_table(rows: Sequence[Sequence[str]], align: str) -> list[str]:
    """Lay out cells in columns.

    Parameters
    ----------
    rows : sequence of sequence of str
        Cells; all rows have the same length.
    align : str
        One of ``<`` and ``>`` per column.

    Returns
    -------
    list of str
        One line per row, columns two spaces apart.
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(align))]
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths, strict=True)).rstrip()
        for row in rows
    ]


def clean_text(text: str) -> str:
    """Text from the command line, where bytes that are no UTF-8 became surrogates: they are replaced by U+FFFD."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def closest(name: object, known: Iterable[str]) -> str:
    """A hint for a misspelt name: ", did you mean ..." or ""."""
    found = difflib.get_close_matches(str(name), list(known), n=1)
    return f", did you mean {found[0]!r}?" if found else ""
