from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from xkv_gguf.base.pictures import check_picture
from xkv_gguf.errors import OptionError
from xkv_gguf.lab.bench_plan import Timing, conditions, parse_depths, schedule, summarize, table
from xkv_gguf.lab.bench_plot import plot_rows

PEAKS = {"f16": 2**30, "xkv": 2**29}


def report(total: int, scratch: int) -> dict[str, Any]:
    return {
        "total_bytes": total,
        "parts": {"all": total},
        "scratch_bytes": scratch,
        "scratch": {"buffer": scratch},
        "renew_seconds": 1.5,
    }


REPORTS = {"f16": report(3 * 2**20, 2**19), "xkv": report(2**20, 2**20)}


def timing(cache: str, depth: int, prefill: float, prompt: float, decode: float) -> Timing:
    return Timing(cache, depth, prefill, decode, prompt if depth else None, REPORTS[cache], PEAKS[cache])


def test_depths_come_sorted_without_repeats() -> None:
    assert parse_depths("512,0, 7680,512", 8192) == [0, 512, 7680]


@pytest.mark.parametrize("text", ["-1", "7681", "1e3", "", "0,,1"])
def test_impossible_depths_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match="--depths"):
        parse_depths(text, 8192)


def test_caches_take_turns_and_none_is_always_first() -> None:
    plan = schedule(["a", "b"], [0, 10], 2)
    assert sorted(plan) == sorted((cache, depth, rep) for cache in "ab" for depth in (0, 10) for rep in (0, 1))
    # depths ascend within a repetition, and every cache is measured before the next depth
    assert [depth for _, depth, _ in plan] == [0, 0, 10, 10, 0, 0, 10, 10]
    assert [rep for _, _, rep in plan] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert {plan[i][0] for i in range(0, len(plan), 2)} == {"a", "b"}


def test_rows_hold_medians_and_sizes() -> None:
    timings = [timing("f16", 64, tps, 2 * tps, 10 * tps) for tps in (100.0, 300.0, 110.0)]
    timings += [timing("xkv", 64, 55.0, 60.0, 880.0)]
    rows = summarize(timings, ["f16", "xkv"])
    assert [(row["cache"], row["depth"]) for row in rows] == [("f16", 64), ("xkv", 64)]
    assert rows[0] == {
        "cache": "f16",
        "depth": 64,
        "prefill_tps": 110.0,
        "prompt_tps": 220.0,
        "decode_tps": 1100.0,
        "cache_bytes": 3 * 2**20,
        "cache_parts": {"all": 3 * 2**20},
        "scratch_bytes": 2**19,
        "scratch_parts": {"buffer": 2**19},
        "peak_rss_bytes": 2**30,
        "renew_seconds": 1.5,
        "prefill_runs": [100.0, 300.0, 110.0],
        "prompt_runs": [200.0, 600.0, 220.0],
        "decode_runs": [1000.0, 3000.0, 1100.0],
    }


def test_scratch_and_peak_are_the_most_of_the_run() -> None:
    early = timing("xkv", 0, 1.0, 1.0, 1.0)
    late = replace(timing("xkv", 64, 1.0, 1.0, 1.0), report=report(2**20, 2**22), peak_rss_bytes=2**33)
    rows = summarize([early, late], ["xkv"])
    assert [(row["scratch_bytes"], row["peak_rss_bytes"]) for row in rows] == [(2**22, 2**33)] * 2


def test_the_table_shows_ratios_to_f16_of_the_same_depth() -> None:
    timings = [timing("f16", d, 100.0, 200.0, 10.0) for d in (0, 64)]
    timings += [timing("xkv", d, 80.0 - d, 50.0, 12.0) for d in (0, 64)]
    lines = table(summarize(timings, ["f16", "xkv"])).splitlines()
    assert len(lines) == 5
    assert lines[4].replace(" MiB", "MiB").split() == [
        "xkv",
        "64",
        "16.0",
        "x0.16",
        "50.0",
        "x0.25",
        "12.0",
        "x1.20",
        "1.0MiB",
        "x0.33",
        "1.0MiB",
        "512.0MiB",
        "x0.50",
    ]
    # at depth 0 there is no prompt
    assert lines[2].split()[:6] == ["xkv", "0", "80.0", "x0.80", "-", "12.0"]


def test_the_table_has_no_ratios_without_f16() -> None:
    text = table(summarize([timing("xkv", 64, 80.0, 70.0, 12.0)], ["xkv"]))
    assert "x0" not in text and "x1" not in text


@pytest.mark.parametrize(
    "threads, decode, reps, expected",
    [
        (4, 2, 3, "every cache: 4 threads (2 to decode), n_ctx 8192; medians of 3 runs in turns"),
        (1, 1, 1, "every cache: 1 thread, n_ctx 8192; one run in turns"),
    ],
)
def test_the_conditions_are_told(threads: int, decode: int, reps: int, expected: str) -> None:
    settings = {"threads": threads, "threads_decode": decode, "n_ctx": 8192, "reps": reps}
    assert conditions(settings) == expected


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_plot_is_drawn(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"plot.{ending}"
    timings = [timing(cache, d, 100.0 - d, 90.0, 10.0) for cache in ("f16", "xkv") for d in (64, 0)]
    check_picture(path)
    plot_rows(summarize(timings, ["f16", "xkv"]), path, "title")
    assert [found.name for found in tmp_path.iterdir()] == [path.name]
    assert path.stat().st_size > 10_000


def test_the_plot_has_a_line_per_cache_and_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    monkeypatch.setattr("xkv_gguf.lab.bench_plot.save_figure", lambda figure, _: figures.append(figure))
    timings = [timing(cache, d, 100.0 - d, 90.0, 10.0 + d) for cache in ("f16", "xkv") for d in (0, 64)]
    plot_rows(summarize(timings, ["f16", "xkv"]), tmp_path / "plot.png", "title")
    prefill, decode = figures[0].axes
    assert [line.get_label() for line in prefill.lines] == ["f16", "xkv"]
    assert [line.get_linestyle() for line in prefill.lines] == ["--", "-"]
    assert [list(line.get_ydata()) for line in prefill.lines] == [[100.0, 36.0]] * 2
    assert [list(line.get_ydata()) for line in decode.lines] == [[10.0, 74.0]] * 2
