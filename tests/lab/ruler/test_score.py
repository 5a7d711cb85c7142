from __future__ import annotations

from typing import Any

import pytest

from xkv_gguf.lab.ruler.score import string_match_all, summarize, table


@pytest.mark.parametrize(
    "answer, references, expected",
    [
        ("4071953.", ["4071953"], 1.0),
        ("is 4,071,953", ["4071953"], 0.0),
        ("ABCDE fghij", ["abcde", "FGHIJ", "KLMNO", "PQRST"], 0.5),
        ("1. mason 2. vase", ["vase", "mason", "pebble"], 2 / 3),
        ("", ["x"], 0.0),
    ],
)
def test_the_score_is_the_share_of_references_found(answer: str, references: list[str], expected: float) -> None:
    assert string_match_all(answer, references) == expected


def sample(cache: str, task: str, *turns: float, length: int = 1024) -> dict[str, Any]:
    return {
        "cache": cache,
        "task": task,
        "length": length,
        "cache_bytes": 1 << 20,
        "score": sum(turns) / len(turns),
        "turns": [{"score": score} for score in turns],
    }


SAMPLES = [
    sample("f16", "vt", 1.0),
    sample("f16", "vt", 0.2),
    sample("f16", "multiturn", 1.0, 0.0),
    sample("f16", "multiturn", 1.0, 1.0),
    sample("xkv:7", "vt", 0.0),
    sample("xkv:7", "multiturn", 0.0, 1.0),
    sample("f16", "vt", 0.0, length=2048),
    sample("xkv:7", "vt", 0.5, length=2048),
]


def test_rows_are_means_times_100() -> None:
    rows = summarize(SAMPLES)
    assert rows[0] == {
        "cache": "f16",
        "task": "vt",
        "length": 1024,
        "score": 60.0,
        "n_samples": 2,
        "cache_bytes": 1 << 20,
    }
    assert rows[1]["score"] == 75.0
    assert rows[1]["turn_scores"] == [100.0, 50.0]
    assert [(row["cache"], row["length"], row["n_samples"]) for row in rows[-2:]] == [
        ("f16", 2048, 1),
        ("xkv:7", 2048, 1),
    ]


def test_the_table_has_tasks_in_rows_and_caches_in_columns() -> None:
    lines = [line.split() for line in table(summarize(SAMPLES)).splitlines()]
    assert lines == [
        ["task", "length", "f16", "xkv:7"],
        ["vt", "1024", "60.0", "0.0"],
        ["multiturn", "1024", "75.0", "50.0"],
        ["turn", "1", "1024", "100.0", "0.0"],
        ["turn", "2", "1024", "50.0", "100.0"],
        ["average", "1024", "67.5", "25.0"],
        ["cache", "1024", "1.0", "MiB", "1.0", "MiB"],
        ["vt", "2048", "0.0", "50.0"],
        ["average", "2048", "0.0", "50.0"],
        ["cache", "2048", "1.0", "MiB", "1.0", "MiB"],
        ["average", "all", "45.0", "33.3"],
    ]
