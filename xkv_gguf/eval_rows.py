"""The rows of `eval`: what they hold, the table, and the file that keeps finished ones while others are computed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ._files import write_atomic
from .errors import OptionError
from .report import KvReport, format_bytes, format_table

PARTIAL_FORMAT = "xkv-gguf eval, partial, 1"
COEFFICIENTS = ("K coefficients", "V coefficients")

Row = dict[str, Any]


def make_row(
    cache: str, text: str, report: KvReport, f16_bytes: int, n_scored: int, figures: Mapping[str, float]
) -> Row:
    """The figures of one cache on one text.

    Parameters
    ----------
    cache, text : str
        Names.
    report : KvReport
        Of the cache after the last token.
    f16_bytes : int
        Allocated bytes of an f16 cache with the same context.
    n_scored : int
        Tokens that were scored.
    figures : mapping
        See `metrics.summarize`.

    Returns
    -------
    dict
        cache, text, n_ctx, cache_bytes, ratio (f16_bytes over cache_bytes), the figures, n_scored, cache_parts (name
        to bytes), n_exact and n_stored (tokens at the end); with tokens stored in coefficients also
        coef_bytes_per_token, the allocated bytes of coefficients over n_stored.
    """
    row: Row = {
        "cache": cache,
        "text": text,
        "n_ctx": report.n_ctx,
        "cache_bytes": report.total_bytes,
        "ratio": f16_bytes / report.total_bytes,
        **figures,
        "n_scored": n_scored,
        "cache_parts": {part.name: part.bytes for part in report.parts},
        "n_exact": report.n_exact,
        "n_stored": report.n_stored,
    }
    coefficients = sum(part.bytes for part in report.parts if part.name in COEFFICIENTS)
    if coefficients and report.n_stored:
        row["coef_bytes_per_token"] = coefficients / report.n_stored
    return row


def table(rows: Sequence[Row]) -> str:
    """The rows for people: one line per cache, and per text the mean divergence and the same-top rate."""
    texts = list(dict.fromkeys(row["text"] for row in rows))
    caches = list(dict.fromkeys(row["cache"] for row in rows))
    found = {(row["cache"], row["text"]): row for row in rows}
    head = ["cache", "bytes", "ratio"]
    for text in texts:
        head += [f"{text}: KLD", "top-1"]
    lines = [head]
    for cache in caches:
        first = found[cache, texts[0]]
        line = [cache, format_bytes(first["cache_bytes"]), f"{first['ratio']:.2f}x"]
        for text in texts:
            row = found[cache, text]
            line += [f"{row['kld_mean']:.5f}", f"{row['top1']:.2%}"]
        lines.append(line)
    return "\n".join(format_table(lines, "<" + ">" * (len(head) - 1)))


def row_key(**what: Any) -> str:
    """A hash of everything that a row depends on: plain values by name; the same for equal ones in any order."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


class Partial:
    """Finished rows by `row_key`, in a file beside the result.

    Parameters
    ----------
    out : Path
        The result's path; the file is OUT.partial. What it holds is read at once.

    Raises
    ------
    OptionError
        A file of that name is something else.
    """

    def __init__(self, out: Path) -> None:
        self.path = out.with_name(f"{out.name}.partial")
        self._rows: dict[str, Row] = {}
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            if found["format"] != PARTIAL_FORMAT:
                raise ValueError(found["format"])
            self._rows = dict(found["rows"])
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OptionError(
                f"{self.path}: does not hold rows of an interrupted run; remove it or choose another --json"
            ) from error

    def get(self, key: str) -> Row | None:
        """The finished row of a key."""
        return self._rows.get(key)

    def put(self, key: str, row: Row) -> None:
        """Keep a row; the file holds it when this returns."""
        self._rows[key] = row
        write_atomic(self.path, json.dumps({"format": PARTIAL_FORMAT, "rows": self._rows}) + "\n")

    def remove(self) -> None:
        """Delete the file: the result has all rows."""
        self.path.unlink(missing_ok=True)
