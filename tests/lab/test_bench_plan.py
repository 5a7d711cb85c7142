from __future__ import annotations

import pytest

from xkv_gguf.errors import OptionError
from xkv_gguf.lab.bench_plan import Timing, parse_depths, schedule, summarize, table

REPORTS = {
    "f16": {"total_bytes": 3 * 2**20, "parts": {"K and V": 3 * 2**20}},
    "xkv": {"total_bytes": 2**20, "parts": {"coefficients": 2**19, "bases": 2**19}},
}
PEAKS = {"f16": 2**30, "xkv": 2**29}


def test_depths_come_sorted_without_repeats() -> None:
    assert parse_depths("512,0, 7680,512", 8192) == [0, 512, 7680]


@pytest.mark.parametrize("text", ["-1", "7681", "1e3", "", "0,,1"])
def test_impossible_depths_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match="--depths"):
        parse_depths(text, 8192)


def test_caches_take_turns_and_none_is_always_first() -> None:
    plan = schedule(["a", "b"], [0, 10], 2)
    assert sorted(plan) == sorted([(cache, depth) for cache in "ab" for depth in (0, 10)] * 2)
    # depths ascend within a repetition, and every cache is measured before the next depth
    assert [depth for _, depth in plan] == [0, 0, 10, 10, 0, 0, 10, 10]
    assert {plan[i][0] for i in range(0, len(plan), 2)} == {"a", "b"}


def test_rows_hold_medians_and_sizes() -> None:
    timings = [Timing("f16", 0, tps, 10 * tps) for tps in (100.0, 300.0, 110.0)]
    timings += [Timing("xkv", 0, 55.0, 880.0)]
    rows = summarize(timings, REPORTS, PEAKS)
    assert [(row["cache"], row["depth"]) for row in rows] == [("f16", 0), ("xkv", 0)]
    assert rows[0] == {
        "cache": "f16",
        "depth": 0,
        "prefill_tps": 110.0,
        "decode_tps": 1100.0,
        "cache_bytes": 3 * 2**20,
        "cache_parts": {"K and V": 3 * 2**20},
        "peak_rss_bytes": 2**30,
        "prefill_runs": [100.0, 300.0, 110.0],
        "decode_runs": [1000.0, 3000.0, 1100.0],
    }


def test_the_table_shows_ratios_to_f16_of_the_same_depth() -> None:
    timings = [Timing("f16", d, 100.0, 10.0) for d in (0, 64)] + [Timing("xkv", d, 80.0 - d, 12.0) for d in (0, 64)]
    lines = table(summarize(timings, REPORTS, PEAKS)).splitlines()
    assert len(lines) == 5
    assert lines[2].split() == [
        "xkv",
        "0",
        "80.0",
        "x0.80",
        "12.0",
        "x1.20",
        "1.0",
        "MiB",
        "x0.33",
        "512.0",
        "MiB",
        "x0.50",
    ]
    assert lines[4].split()[:4] == ["xkv", "64", "16.0", "x0.16"]


def test_the_table_has_no_ratios_without_f16() -> None:
    text = table(summarize([Timing("xkv", 0, 80.0, 12.0)], REPORTS, PEAKS))
    assert "x0" not in text and "x1" not in text
