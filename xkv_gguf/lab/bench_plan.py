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
    """One measurement of one cache: speeds in tokens per second, and what its process had taken by then.

    Attributes
    ----------
    cache : str
    depth : int
        Tokens in the context before prefill and decoding.
    prefill_tps, decode_tps : float
        `N_PREFILL` tokens in one batch, and `N_DECODE` one by one, after `depth` tokens.
    prompt_tps : float or None
        The `depth` tokens themselves, from an empty cache; None where there are none.
    report : mapping
        `KvReport.to_dict`.
    peak_rss_bytes : int
        Peak resident bytes of the process, which runs this cache alone.
    """

    cache: str
    depth: int
    prefill_tps: float
    decode_tps: float
    prompt_tps: float | None
    report: Mapping[str, Any]
    peak_rss_bytes: int


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


def schedule(caches: Sequence[str], depths: Sequence[int], reps: int) -> list[tuple[str, int, int]]:
    """Order of measurements: caches take turns at each depth, and another one begins each time.

    Parameters
    ----------
    caches : sequence of str
    depths : sequence of int
    reps : int

    Returns
    -------
    list of (cache, depth, repetition)
    """
    plan = []
    turn = 0
    for rep in range(reps):
        for depth in depths:
            start = turn % len(caches)
            plan += [(cache, depth, rep) for cache in (*caches[start:], *caches[:start])]
            turn += 1
    return plan


def n_tokens(depth: int) -> int:
    """Tokens that a measurement evaluates."""
    return depth + N_DECODE + N_PREFILL


def summarize(timings: Sequence[Timing], caches: Sequence[str]) -> list[dict[str, Any]]:
    """One row per cache and depth, with medians over the repetitions.

    Parameters
    ----------
    timings : sequence of Timing
    caches : sequence of str
        The order of rows of the same depth.

    Returns
    -------
    list of dict
        Keys cache, depth, prefill_tps, prompt_tps, decode_tps, cache_bytes, cache_parts, scratch_bytes, scratch_parts,
        peak_rss_bytes, renew_seconds, prefill_runs, prompt_runs, decode_runs. Scratch and peak are the most that the
        cache took in the whole run, at any depth.
    """
    rows = []
    for depth in sorted({timing.depth for timing in timings}):
        for cache in caches:
            of_cache = [timing for timing in timings if timing.cache == cache]
            runs = [timing for timing in of_cache if timing.depth == depth]
            if not runs:
                continue
            largest = max((timing.report for timing in of_cache), key=lambda report: report["scratch_bytes"])
            prompt_runs = [run.prompt_tps for run in runs if run.prompt_tps is not None]
            rows.append(
                {
                    "cache": cache,
                    "depth": depth,
                    "prefill_tps": statistics.median(run.prefill_tps for run in runs),
                    "prompt_tps": statistics.median(prompt_runs) if prompt_runs else None,
                    "decode_tps": statistics.median(run.decode_tps for run in runs),
                    "cache_bytes": largest["total_bytes"],
                    "cache_parts": dict(largest["parts"]),
                    "scratch_bytes": largest["scratch_bytes"],
                    "scratch_parts": dict(largest["scratch"]),
                    "peak_rss_bytes": max(timing.peak_rss_bytes for timing in of_cache),
                    "renew_seconds": statistics.median(run.report["renew_seconds"] for run in runs),
                    "prefill_runs": [run.prefill_tps for run in runs],
                    "prompt_runs": prompt_runs,
                    "decode_runs": [run.decode_tps for run in runs],
                }
            )
    return rows


def conditions(settings: Mapping[str, Any]) -> str:
    """A line that says under which conditions, the same for every cache, the figures were found."""
    threads, decode = settings["threads"], settings["threads_decode"]
    some = f"{threads} thread{'s' * (threads != 1)}"
    also = "" if decode == threads else f" ({decode} to decode)"
    reps = settings["reps"]
    turns = "one cache after the other" if "rpc_servers" in settings else "in turns"
    medians = f"medians of {reps} runs {turns}" if reps > 1 else f"one run {turns}"
    return f"every cache: {some}{also}, n_ctx {settings['n_ctx']}; {medians}"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows for people, each figure with its ratio to f16 in the same run where f16 was measured.

    "prefill" is a batch of `N_PREFILL` tokens at the depth, "prompt" all tokens from 0 to the depth.
    """
    base = {row["depth"]: row for row in rows if row["cache"] == BASELINE}
    head = ["cache", "depth", "prefill t/s", "", "prompt t/s", "", "decode t/s", ""]
    lines = [[*head, "cache", "", "scratch", "peak RSS", ""]]
    for row in rows:
        other = base.get(row["depth"])
        cells = [row["cache"], str(row["depth"])]
        for key in ("prefill_tps", "prompt_tps", "decode_tps"):
            cells += ["-" if row[key] is None else f"{row[key]:.1f}", _ratio(row, other, key)]
        cells += [format_bytes(row["cache_bytes"]), _ratio(row, other, "cache_bytes")]
        cells += [format_bytes(row["scratch_bytes"])]
        cells += [format_bytes(row["peak_rss_bytes"]), _ratio(row, other, "peak_rss_bytes")]
        lines.append(cells)
    return "\n".join(format_table(lines, "<" + ">" * (len(lines[0]) - 1)))


def _ratio(row: Mapping[str, Any], base: Mapping[str, Any] | None, key: str) -> str:
    return f"x{row[key] / base[key]:.2f}" if base is not None and base[key] and row[key] is not None else ""
