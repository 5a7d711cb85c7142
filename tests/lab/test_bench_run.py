"""`bench` from arguments to files, with workers that make their figures up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xkv_gguf.cli import main
from xkv_gguf.lab import bench
from xkv_gguf.lab.bench_plan import N_DECODE, N_PREFILL
from xkv_gguf.lab.cache_spec import CacheSpec


class MadeUp:
    """What stands for the worker processes: what they were asked, and when Ctrl-C comes."""

    def __init__(self) -> None:
        self.opened: list[dict[str, Any]] = []
        self.turns: list[tuple[str, int]] = []
        self.stop_at: int | None = None

    def worker(self, spec: CacheSpec) -> MadeUpWorker:
        return MadeUpWorker(self, spec)


class MadeUpWorker:
    def __init__(self, made_up: MadeUp, spec: CacheSpec) -> None:
        self.made_up, self.spec = made_up, spec

    def __enter__(self) -> MadeUpWorker:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ask(self, on_done: Callable[[int], object] | None = None, **request: Any) -> dict[str, Any]:
        made_up = self.made_up
        if request["op"] == "open":
            made_up.opened.append(request)
            return {}
        if made_up.stop_at == len(made_up.turns):
            raise KeyboardInterrupt
        made_up.turns.append((self.spec.name, request["depth"]))
        assert on_done is not None
        for done in range(0, request["depth"], 64):
            on_done(done)
        rep = sum(turn == made_up.turns[-1] for turn in made_up.turns)
        size = {"f16": 400, "q8_0": 200}[self.spec.name]
        return {
            "prefill_tps": 100.0 * rep,
            "decode_tps": 10.0 * rep,
            "prompt_tps": 50.0 * rep if request["depth"] else None,
            "report": {
                "total_bytes": size,
                "parts": {"K and V": size},
                "scratch_bytes": rep,
                "scratch": {"compute": rep},
                "renew_seconds": 0.0,
            },
            "peak_rss_bytes": 1000 + rep,
        }


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> MadeUp:
    found = MadeUp()
    monkeypatch.setattr(bench, "Worker", found.worker)
    return found


@pytest.fixture
def words(make_model: Callable[..., Path], tmp_path: Path) -> list[str]:
    options = ["--caches", "f16,q8_0", "--depths", "0,128", "--reps", "3", "--json", str(tmp_path / "out.json")]
    return ["bench", str(make_model()), *options]


def test_from_arguments_to_files(
    made_up: MadeUp, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--plot", str(tmp_path / "plot.svg"), "--threads", "3"]) == 0
    assert made_up.turns[:4] == [("f16", 0), ("q8_0", 0), ("q8_0", 128), ("f16", 128)]
    assert len(made_up.turns) == 12
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["settings"] == {
        "model": "model.gguf",
        "n_ctx": 8192,
        "threads": 3,
        "threads_decode": 3,
        "reps": 3,
        "n_prefill": N_PREFILL,
        "n_decode": N_DECODE,
    }
    assert [(row["cache"], row["depth"]) for row in result["rows"]] == [
        ("f16", 0),
        ("q8_0", 0),
        ("f16", 128),
        ("q8_0", 128),
    ]
    last = result["rows"][-1]
    assert (last["prefill_tps"], last["prompt_tps"], last["decode_tps"]) == (200.0, 100.0, 20.0)
    assert (last["scratch_bytes"], last["peak_rss_bytes"]) == (3, 1003)
    printed = capsys.readouterr().out
    assert printed.startswith("every cache: 3 threads, n_ctx 8192; medians of 3 runs in turns\ncache")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "out.json", "plot.svg"]


@pytest.mark.parametrize("cpus, decode", [(6, 3), (1, 1)])
def test_every_cache_has_the_same_threads(
    cpus: int, decode: int, made_up: MadeUp, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cpus)))
    assert main(words) == 0
    assert [(request["threads"], request["threads_decode"]) for request in made_up.opened] == [(cpus, decode)] * 2
    settings = json.loads((tmp_path / "out.json").read_text())["settings"]
    assert (settings["threads"], settings["threads_decode"]) == (cpus, decode)


def test_an_interrupted_run_goes_on(
    made_up: MadeUp, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_up.stop_at = 11
    assert main(words) == 130
    expected = f"11 of 12 measurements are done; the same command goes on from {tmp_path / 'out.json.partial'}\n"
    assert capsys.readouterr().err.endswith(expected)
    assert not (tmp_path / "out.json").exists()

    made_up.stop_at = None
    made_up.opened.clear()
    done, made_up.turns[:] = made_up.turns[:], []
    assert main(words) == 0
    assert len(made_up.turns) == len(made_up.opened) == 1  # the cache that has all its figures is not opened
    assert "11 of 12 measurements are taken from" in capsys.readouterr().err
    assert sorted([*done, *made_up.turns]) == sorted([(c, d) for c in ("f16", "q8_0") for d in (0, 128)] * 3)
    assert [len(row["prefill_runs"]) for row in json.loads((tmp_path / "out.json").read_text())["rows"]] == [3] * 4
    assert not (tmp_path / "out.json.partial").exists()


@pytest.mark.parametrize("change", [["--threads", "7"], ["--n-ctx", "1024"]])
def test_figures_of_other_settings_are_not_taken(change: list[str], made_up: MadeUp, words: list[str]) -> None:
    made_up.stop_at = 5
    assert main(words) == 130
    made_up.stop_at = None
    made_up.turns.clear()
    assert main([*words, *change]) == 0
    assert len(made_up.turns) == 12


def test_without_a_file_nothing_is_promised(
    made_up: MadeUp, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    made_up.stop_at = 5
    assert main(words[:-2]) == 130
    assert capsys.readouterr().err.endswith("5 of 12 measurements are done\n")
    made_up.stop_at = None
    assert main(words[:-2]) == 0


def test_progress_counts_every_token_once(made_up: MadeUp, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Any] = []

    class Bar:
        def __init__(self, total: int, **_: Any) -> None:
            self.total, self.n = total, 0
            bars.append(self)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, count: int) -> None:
            assert count >= 0
            self.n += count

        def set_description(self, text: str) -> None:
            pass

    monkeypatch.setattr(bench, "tqdm", Bar)
    assert main(words) == 0
    assert bars[0].n == bars[0].total == 6 * (N_PREFILL + N_DECODE) + 6 * (128 + N_PREFILL + N_DECODE)


def test_a_plot_that_cannot_be_drawn_is_refused_first(
    made_up: MadeUp, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--plot", "plot.gif"]) == 1
    assert "--plot: plot.gif, expected a name that ends in .png, .svg, .pdf" in capsys.readouterr().err
    assert made_up.turns == []
