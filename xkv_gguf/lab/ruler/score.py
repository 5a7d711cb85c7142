"""Scores of answers, their means, and the table."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...base.text import format_bytes, format_table


def string_match_all(answer: str, references: Sequence[str]) -> float:
    """Share of the references that an answer holds, whatever their case: RULER's score of all tasks but QA.

    Parameters
    ----------
    answer : str
    references : sequence of str
        At least one.

    Returns
    -------
    float
        0 to 1.
    """
    text = answer.lower()
    return sum(reference.lower() in text for reference in references) / len(references)


def summarize(samples: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per cache, length and task, with means over the samples times 100.

    Parameters
    ----------
    samples : iterable of mapping
        Keys cache, length, task, cache_bytes, score, and turns, each with a score.

    Returns
    -------
    list of dict
        Keys cache, task, length, score, n_samples, cache_bytes, and turn_scores where there are several turns; in the
        order of first appearance.
    """
    groups: dict[tuple[str, int, str], list[Mapping[str, Any]]] = {}
    for sample in samples:
        groups.setdefault((sample["cache"], sample["length"], sample["task"]), []).append(sample)
    rows = []
    for (cache, length, task), group in groups.items():
        row: dict[str, Any] = {
            "cache": cache,
            "task": task,
            "length": length,
            "score": _percent(sample["score"] for sample in group),
            "n_samples": len(group),
            "cache_bytes": group[0]["cache_bytes"],
        }
        n_turns = len(group[0]["turns"])
        if n_turns > 1:
            row["turn_scores"] = [
                _percent(sample["turns"][turn]["score"] for sample in group) for turn in range(n_turns)
            ]
        rows.append(row)
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows for people: a line per task, a column per cache, and the average over the tasks below each length."""
    caches = list(dict.fromkeys(row["cache"] for row in rows))
    lines = [["task", "length", *caches]]
    for length in sorted({row["length"] for row in rows}):
        here = [row for row in rows if row["length"] == length]
        for task in dict.fromkeys(row["task"] for row in here):
            cells = {row["cache"]: row for row in here if row["task"] == task}
            lines.append([task, str(length), *(f"{cells[cache]['score']:.1f}" for cache in caches)])
            for turn in range(len(cells[caches[0]].get("turn_scores", ()))):
                scores = [f"{cells[cache]['turn_scores'][turn]:.1f}" for cache in caches]
                lines.append([f"  turn {turn + 1}", str(length), *scores])
        lines.append(["average", str(length), *(_average(here, cache) for cache in caches)])
        sizes = {row["cache"]: row["cache_bytes"] for row in here}
        lines.append(["cache", str(length), *(format_bytes(sizes[cache]) for cache in caches)])
    if len({row["length"] for row in rows}) > 1:
        lines.append(["average", "all", *(_average(rows, cache) for cache in caches)])
    return "\n".join(format_table(lines, "<>" + ">" * len(caches)))


def _average(rows: Sequence[Mapping[str, Any]], cache: str) -> str:
    return f"{statistics.fmean(row['score'] for row in rows if row['cache'] == cache):.1f}"


def _percent(scores: Iterable[float]) -> float:
    return round(100 * statistics.fmean(scores), 2)
