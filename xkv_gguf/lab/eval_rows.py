"""The rows of `eval`: what they hold, and the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..base.text import format_bytes, format_table
from ..report import KvReport

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
