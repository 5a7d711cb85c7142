"""Draws what `bench` found: speeds against the tokens in the context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..base.pictures import new_figure, save_figure
from .bench_plan import N_PREFILL

PANELS = (("prefill_tps", f"prefill of {N_PREFILL} tokens"), ("decode_tps", "decode"))


def plot_rows(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw one panel for prefill and one for decoding, both from 0 up, with a line per cache.

    Solid lines are xkv caches, broken ones the others.

    Parameters
    ----------
    rows : sequence of dict
        See `bench_plan.summarize`.
    path : Path
        See `pictures.check_picture`.
    title : str
    """
    figure = new_figure(10, 4.5)
    caches = list(dict.fromkeys(row["cache"] for row in rows))
    for axis, (key, name) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        for number, cache in enumerate(caches):
            points = sorted((row["depth"], row[key]) for row in rows if row["cache"] == cache)
            style = "o-" if cache.startswith("xkv") else "o--"
            axis.plot(*zip(*points, strict=True), style, ms=4, lw=1, color=f"C{number % 10}", label=cache)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("depth: tokens in the context")
        axis.set_ylabel("tokens per second")
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path)
