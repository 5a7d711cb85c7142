"""The pure part of `bench`: which measurements to take in which order, and what to make of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..base.text import format_bytes, format_table
from ..errors import OptionError

N_PREFILL = 512
N_DECODE = 32
BASELINE = "f16"


@dataclass(frozen=True)
class Timing:
    """One measurement of one cache: tokens per second."""

    cache: str
    depth: int
    prefill_tps: float
    decode_tps: float


def parse_depths(text: str, n_ctx: int) -> list[int]:
    """Read a list such as ``0,2048,4096``: tokens in the context before a measurement; ascending, without repeats.

    Raises
    ------
    OptionError
        A depth is no whole number, is negative, or leaves no room for a measurement in `n_ctx`.
    """
    depths = []
    for word in text.split(","):
        try:
            depth = int(word)
        except ValueError as error:
            raise OptionError(f"--depths: {word!r} is no whole number") from error
        if depth < 0 or depth + N_PREFILL > n_ctx:
            raise OptionError(
                f"--depths: {depth}, expected 0 to {n_ctx - N_PREFILL} (n_ctx {n_ctx} less a batch of {N_PREFILL})"
            )
        depths.append(depth)
    return sorted(set(depths))


def schedule(caches: Sequence[str], depths: Sequence[int], reps: int) -> list[tuple[str, int]]:
    """Order of measurements: caches take turns at each depth, and another one begins each time.

    Parameters
    ----------
    caches : sequence of str
    depths : sequence of int
        Ascending, so that each cache fills up once per repetition.
    reps : int

    Returns
    -------
    list of (cache, depth)
    """
    plan = []
    turn = 0
    for _ in range(reps):
        for depth in depths:
            start = turn % len(caches)
            plan += [(cache, depth) for cache in (*caches[start:], *caches[:start])]
            turn += 1
    return plan


def summarize(
    timings: Sequence[Timing], reports: Mapping[str, Mapping[str, Any]], peaks: Mapping[str, int]
) -> list[dict[str, Any]]:
    """One row per cache and depth, with medians over the repetitions.

    Parameters
    ----------
    timings : sequence of Timing
    reports : mapping of str to mapping
        `KvReport.to_dict` by cache.
    peaks : mapping of str to int
        Peak resident bytes of each cache's process.

    Returns
    -------
    list of dict
        Keys cache, depth, prefill_tps, decode_tps, cache_bytes, cache_parts, peak_rss_bytes, prefill_runs,
        decode_runs; in the order of first appearance of (depth, cache).
    """
    rows = []
    depths = sorted({timing.depth for timing in timings})
    for depth in depths:
        for cache in reports:
            runs = [timing for timing in timings if (timing.cache, timing.depth) == (cache, depth)]
            if not runs:
                continue
            rows.append(
                {
                    "cache": cache,
                    "depth": depth,
                    "prefill_tps": statistics.median(run.prefill_tps for run in runs),
                    "decode_tps": statistics.median(run.decode_tps for run in runs),
                    "cache_bytes": reports[cache]["total_bytes"],
                    "cache_parts": dict(reports[cache]["parts"]),
                    "peak_rss_bytes": peaks[cache],
                    "prefill_runs": [run.prefill_tps for run in runs],
                    "decode_runs": [run.decode_tps for run in runs],
                }
            )
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows for people, each figure with its ratio to f16 in the same run where f16 was measured."""
    base = {row["depth"]: row for row in rows if row["cache"] == BASELINE}
    lines = [["cache", "depth", "prefill t/s", "", "decode t/s", "", "cache", "", "peak RSS", ""]]
    for row in rows:
        other = base.get(row["depth"])
        lines.append(
            [
                row["cache"],
                str(row["depth"]),
                f"{row['prefill_tps']:.1f}",
                _ratio(row, other, "prefill_tps"),
                f"{row['decode_tps']:.1f}",
                _ratio(row, other, "decode_tps"),
                format_bytes(row["cache_bytes"]),
                _ratio(row, other, "cache_bytes"),
                format_bytes(row["peak_rss_bytes"]),
                _ratio(row, other, "peak_rss_bytes"),
            ]
        )
    return "\n".join(format_table(lines, "<>>>>>>>>>"))


def _ratio(row: Mapping[str, Any], base: Mapping[str, Any] | None, key: str) -> str:
    return f"x{row[key] / base[key]:.2f}" if base is not None and base[key] else ""
