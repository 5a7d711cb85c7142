from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from xkv_gguf.cli import bench as verb
from xkv_gguf.cli import main
from xkv_gguf.lab import bench
from xkv_gguf.lab.cache_spec import parse_cache

pytestmark = pytest.mark.model


def test_figures_of_two_caches(demo_model: Path, sidecar: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "bench.json"
    options = ["--caches", "f16,xkv:3", "--depths", "0,300", "--reps", "1", "--n-ctx", "1024", "--threads", "2"]
    options += ["--json", str(out)]
    assert main(["bench", str(demo_model), "--sidecar", str(sidecar), *options]) == 0
    result = json.loads(out.read_text())
    assert [(row["cache"], row["depth"]) for row in result["rows"]] == [
        ("f16", 0),
        ("xkv:3", 0),
        ("f16", 300),
        ("xkv:3", 300),
    ]
    for row in result["rows"]:
        assert row["prefill_tps"] > 0 and row["decode_tps"] > 0
        assert (row["prompt_tps"] or 0) > 0 if row["depth"] else row["prompt_tps"] is None
        assert row["cache_bytes"] == sum(row["cache_parts"].values())
        assert row["scratch_bytes"] == sum(row["scratch_parts"].values()) > 0
        # the model alone takes 90 MiB, its process with all imports some hundred
        assert 90 * 2**20 < row["peak_rss_bytes"] < 2 * 2**30
    f16, xkv = result["rows"][:2]
    assert f16["cache_bytes"] == 2 * 1024 * 30 * 2 * 3 * 64
    assert set(xkv["cache_parts"]) != set(f16["cache_parts"])
    assert result["machine"]["cores"] == len(os.sched_getaffinity(0))
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "every cache: 2 threads, n_ctx 1024; one run in turns"
    assert printed[3].startswith("xkv:3")


@pytest.mark.parametrize(
    "cache, expected",
    [
        ("f16", {}),
        ("xkv", {"quality": "low", "calibrate": False}),
        ("xkv:3", {"ratio": 3, "calibrate": False}),
        ("xkv:3:calibrate=true:online=false", {"ratio": 3, "calibrate": True, "online": False}),
        ("xkv:memory=1GiB", {"memory": "1GiB", "calibrate": False}),
        ("xkv:sidecar=t", {"quality": "low", "sidecar": "t"}),
        ("xkv:rank=32:types=q8_0", {"rank": 32, "types": "q8_0", "calibrate": False}),
    ],
)
def test_a_caches_own_options_go_before_the_common_ones(cache: str, expected: dict[str, Any]) -> None:
    common = {"sidecar": "s", "quality": "low", "calibrate": False}
    assert verb.with_common(parse_cache(cache), common).options == expected


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["--caches", "f16,xkv:3:n_sink=many"], "cache xkv:3:n_sink=many: xkv option n_sink: 'many'"),
        (["--no-online", "--caches", "xkv,xkv:7:calibrate=false"], "cache xkv:7:calibrate=false: xkv option online"),
        (
            ["--sidecar", "s", "--caches", "f16,xkv:calibrate=false"],
            "--sidecar: s, but none of the caches f16, ",
        ),
    ],
)
def test_options_are_checked_before_anything_is_measured(
    argv: list[str], expected: str, demo_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(bench, "Worker", None)
    assert main(["bench", str(demo_model), "--depths", "0", *argv]) == 1
    assert f"xkv-gguf: {expected}" in capsys.readouterr().err


def test_an_error_in_a_worker_is_one_line(demo_model: Path, sidecar: Path, capsys: Any) -> None:
    options = ["--caches", "f16,xkv:100000", "--depths", "0", "--threads", "1", "--sidecar", str(sidecar)]
    assert main(["bench", str(demo_model), *options]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith("xkv-gguf: cache xkv:100000: ratio 100000: out of reach")
    assert "Traceback" not in err


def test_a_worker_that_dies_is_told(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(bench, "START_WORKER", "import sys; sys.exit(3)")
    assert main(["bench", "--caches", "f16", "--depths", "0"]) == 1
    assert capsys.readouterr().err == "xkv-gguf: cache f16: its process ended with status 3\n"
