"""Draws what `eval` found: divergence against the bytes of the cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..base.pictures import new_figure, save_figure
from ..base.text import MIB
from .eval_rows import Row

MARKERS = "os^vDPX*"


def plot_rows(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw mean divergence against bytes on logarithmic axes: a colour per text, a point per cache.

    Solid lines join the xkv caches, broken ones the others.
    A cache without divergence (f16 itself) has no place on the axis: a vertical line marks its bytes.

    Parameters
    ----------
    rows : sequence of dict
        See `eval_rows.make_row`.
    path : Path
        See `pictures.check_picture`.
    title : str
    """
    from matplotlib.ticker import LogFormatter

    figure = new_figure(8, 5)
    axis = figure.subplots()
    axis.set_xscale("log")
    axis.set_yscale("log")
    exact = {row["cache"]: row["cache_bytes"] for row in rows if row["kld_mean"] <= 0}
    for cache, n_bytes in exact.items():
        axis.axvline(n_bytes / MIB, ls=":", color="gray", label=f"{cache} (no divergence)")
    inexact = [row for row in rows if row["kld_mean"] > 0]
    texts = list(dict.fromkeys(row["text"] for row in rows))
    for number, text in enumerate(texts):
        label: str | None = text
        for style, is_xkv in (("-", True), ("--", False)):
            of_kind = [row for row in inexact if row["text"] == text and row["cache"].startswith("xkv") == is_xkv]
            points = sorted((row["cache_bytes"] / MIB, row["kld_mean"]) for row in of_kind)
            if points:
                marker, color = MARKERS[number % len(MARKERS)], f"C{number % 10}"
                axis.plot(*zip(*points, strict=True), marker + style, ms=5, lw=0.8, color=color, label=label)
                label = None
    highest: dict[str, Row] = {}
    for row in inexact:
        if row["kld_mean"] >= highest.get(row["cache"], row)["kld_mean"]:
            highest[row["cache"]] = row
    for cache, row in highest.items():
        at = (row["cache_bytes"] / MIB, row["kld_mean"])
        axis.annotate(cache, at, xytext=(4, 5), textcoords="offset points", fontsize=8)
    axis.xaxis.set_major_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    axis.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    axis.set_xlabel("allocated bytes of the cache, MiB")
    axis.set_ylabel("mean divergence from the f16 cache, nats")
    axis.set_title(title)
    axis.grid(alpha=0.3, which="both")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8)
    save_figure(figure, path)
