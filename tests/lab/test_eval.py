"""The verb, with a model that is made up where only its course matters."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from xkv_gguf import KvPart, KvReport
from xkv_gguf.cli import main
from xkv_gguf.lab import eval as lab_eval
from xkv_gguf.lab.cache_spec import CacheSpec, parse_cache

FIELDS = {
    *("cache", "text", "n_ctx", "cache_bytes", "ratio"),
    *("kld_mean", "kld_median", "kld_p99", "kld_p999", "top1", "ppl"),
}
N_VOCAB = 10
SIZES = {"f16": 1600, "q8_0": 850, "q4_0": 450}


class MadeUp:
    """Stands in for `Plan.open` and `expectations`: tokens are bytes, caches add noise, and runs are recorded."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.runs: list[str] = []
        self.steps: list[int] = []
        self.stop_at: int | None = None

    @contextlib.contextmanager
    def open(self, plan: lab_eval.Plan, spec: CacheSpec, n_least: int = 0) -> Iterator[Any]:
        self.opened.append(spec.name)
        report = KvReport(spec.kv_mode, plan.n_ctx, (KvPart("K and V", SIZES[spec.kv_mode]),))
        yield SimpleNamespace(
            name=spec.name,
            n_vocab=lambda: N_VOCAB,
            tokenize=lambda text: [byte % N_VOCAB for byte in text],
            kv_report=lambda: report,
        )

    def expectations(
        self, llm: Any, tokens: list[int], n_prefill: int, n_step: int, advance: Callable[[int], object]
    ) -> Iterator[np.ndarray]:
        if self.stop_at == len(self.runs):
            raise KeyboardInterrupt
        self.runs.append(llm.name)
        self.steps.append(n_step)
        rng = np.random.default_rng(0)
        noise = {"f16": 0.0, "q8_0": 0.1, "q4_0": 1.0}[llm.name]
        for start in range(n_prefill, len(tokens), n_step):
            shape = (min(n_step, len(tokens) - start), N_VOCAB)
            yield (rng.normal(0, 3, shape) + noise * np.cos(np.arange(N_VOCAB))).astype(np.float32)
        advance(len(tokens))


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> MadeUp:
    found = MadeUp()
    monkeypatch.setattr(lab_eval.Plan, "open", lambda plan, spec, n_least=0: found.open(plan, spec, n_least))
    monkeypatch.setattr("xkv_gguf.lab.score.expectations", found.expectations)
    return found


@pytest.fixture
def words(demo_model: Path, tmp_path: Path) -> list[str]:
    """A command line with two texts."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"text {name} " * 50)
    texts = [str(tmp_path / f"{name}.txt") for name in ("a", "b")]
    return [
        *("eval", str(demo_model), "--text", *texts, "--caches", "f16,q8_0,q4_0"),
        *("--n-ctx", "256", "--n-score", "100", "--json", str(tmp_path / "out.json")),
    ]


def test_the_result_has_a_row_per_text_and_cache(
    made_up: MadeUp, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--plot", str(tmp_path / "plot.svg"), "--threads", "3"]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    rows = result["rows"]
    assert [(row["text"], row["cache"]) for row in rows] == [(t, c) for t in "ab" for c in ("f16", "q8_0", "q4_0")]
    for row in rows:
        assert set(row) >= FIELDS
        assert row["n_ctx"] == 256 and row["n_scored"] == 100
        assert row["ratio"] == 1600 / row["cache_bytes"]
    exact, fine, coarse = rows[:3]
    assert exact["kld_mean"] == exact["kld_p999"] == 0 and exact["top1"] == 1
    assert 0 < fine["kld_mean"] < coarse["kld_mean"]
    for row in (fine, coarse):
        assert row["kld_median"] <= row["kld_p99"] <= row["kld_p999"]
    assert len(result["model"]["fingerprint"]) == 64
    assert result["settings"]["n_prefill"] == 156 and result["settings"]["threads"] == 3
    assert "--n-ctx 256" in result["command"]
    # the reference and each cache run once per text, and each cache is tried before the first run
    assert made_up.runs == ["f16", "f16", "q8_0", "q4_0"] * 2
    assert made_up.opened == ["f16", "q8_0", "q4_0", *made_up.runs]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.txt", "out.json", "plot.svg"]
    assert capsys.readouterr().out.count("\n") == 4


def test_f16_is_run_but_not_told_when_it_is_not_listed(made_up: MadeUp, words: list[str], tmp_path: Path) -> None:
    words[words.index("--caches") + 1] = "q4_0"
    assert main(words) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["cache"] for row in rows] == ["q4_0", "q4_0"]
    assert rows[0]["ratio"] == 1600 / 450
    assert made_up.runs == ["f16", "q4_0"] * 2


@pytest.mark.parametrize(("n_step", "steps"), [(8, [64, 8, 8]), (80, [80, 80])])
def test_the_reference_is_scored_in_larger_batches(
    n_step: int, steps: list[int], made_up: MadeUp, words: list[str]
) -> None:
    words[words.index("--caches") + 1] = "f16,q4_0"
    assert main([*words, "--score-batch", str(n_step)]) == 0
    assert made_up.steps == steps * 2


def test_an_interrupted_run_goes_on(
    made_up: MadeUp, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 0
    whole = (tmp_path / "out.json").read_text()
    (tmp_path / "out.json").unlink()

    made_up.runs.clear()
    made_up.stop_at = 7  # while q4_0 is at the second text
    assert main(words) == 130
    assert "5 of 6 rows are done; the same command goes on from" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()
    assert len(json.loads((tmp_path / "out.json.partial").read_text())["parts"]) == 5

    made_up.runs.clear()
    made_up.stop_at = None
    assert main(words) == 0
    assert made_up.runs == ["f16", "q4_0"]  # the reference of the second text, and the row that was missing
    assert "5 of 6 rows are taken from" in capsys.readouterr().err
    assert (tmp_path / "out.json").read_text() == whole
    assert not (tmp_path / "out.json.partial").exists()


@pytest.mark.parametrize("change", ["text", "n_score", "score_batch"])
def test_rows_of_something_else_are_not_taken(change: str, made_up: MadeUp, words: list[str], tmp_path: Path) -> None:
    made_up.stop_at = 7
    assert main(words) == 130
    made_up.runs.clear()
    made_up.stop_at = None
    if change == "text":
        (tmp_path / "a.txt").write_text("other text " * 50)
    elif change == "n_score":
        words[words.index("--n-score") + 1] = "99"
    else:
        words += ["--score-batch", "32"]
    assert main(words) == 0
    assert made_up.runs[:4] == ["f16", "f16", "q8_0", "q4_0"]
    assert len(made_up.runs) == (6 if change == "text" else 8)


def test_without_anything_done_there_is_nothing_to_go_on_from(
    made_up: MadeUp, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_up.stop_at = 0
    assert main(words) == 130
    assert "0 of 6 rows are done\n" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.partial"))


def test_a_short_text_says_how_many_tokens_it_lacks(
    made_up: MadeUp, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "b.txt").write_text("short")
    assert main(words) == 1
    assert capsys.readouterr().err == (
        "xkv-gguf: --text: b has 5 tokens, 256 are needed; give a longer one or a smaller --n-ctx\n"
    )
    assert made_up.runs == []
    assert main([*words, "--prefill", "1", "--n-score", "4"]) == 0


def test_a_cache_without_calibration_needs_no_sidecar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xkv_gguf.convert.pipeline.ensure_sidecar", None)
    plan: Any = None
    assert lab_eval._sidecar(plan, parse_cache("xkv:7:calibrate=false")) is None
    assert lab_eval._sidecar(plan, parse_cache("f16")) is None


def test_texts_need_names_of_their_own(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--text", "other/a.md"]) == 1
    assert "two files are named 'a', which names the rows; rename one" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--caches", "f16,f32"], "--caches: 'f32' is unknown"),
        (["--caches", "f16,f16"], "--caches: 'f16' is given twice"),
        (["--caches", "xkv:no_such_option=1"], "xkv option 'no_such_option' is unknown"),
        (["--caches", "xkv:sidecar=no/such/file"], "no/such/file"),
        (["--n-ctx", "9000"], "--n-ctx: 9000, expected 2 to 8192, which SmolLM2-135M-Instruct.Q4_1.gguf was trained"),
        (["--n-ctx", "1"], "--n-ctx: 1, expected 2 to 8192"),
        (["--n-score", "0"], "--n-score: 0, expected 1 to 255 (n_ctx 256 less one token)"),
        (["--n-score", "256"], "--n-score: 256, expected 1 to 255"),
        (["--prefill", "0"], "--prefill: 0, expected 1 to 156 (n_ctx 256 less 100 scored)"),
        (["--prefill", "157"], "--prefill: 157, expected 1 to 156"),
        (["--score-batch", "0"], "--score-batch: 0, expected 1 or more"),
        (["--n-ubatch", "0"], "--n-ubatch: 0, expected 1 or more"),
        (["--threads", "0"], "--threads: 0, expected 1 or more"),
        (["--plot", "plot.gif"], "--plot: plot.gif, expected a name that ends in .png, .svg, .pdf"),
        (["--plot", "no/such/folder/x.png"], "the folder no/such/folder does not exist"),
        (["--json", "no/such/folder/out.json"], "the folder no/such/folder does not exist"),
        (["--text", "no/such/text.txt"], "no/such/text.txt: cannot be read (No such file or directory)"),
    ],
)
def test_errors_are_one_line(
    options: list[str], expected: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, *options]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("xkv-gguf: ") and err.count("\n") == 1
    assert expected in err


@pytest.mark.parametrize(
    "content, expected", [(b"", "is empty"), (b" \n", "is empty"), (b"caf\xe9", "is not UTF-8 text (byte 3)")]
)
def test_texts_that_cannot_be_used(
    content: bytes, expected: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.txt").write_bytes(content)
    assert main([*words, "--text", str(tmp_path / "c.txt")]) == 1
    assert expected in capsys.readouterr().err


def test_text_and_json_have_to_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "model.gguf"]) == 1
    assert "the following arguments are required: --text, --json" in capsys.readouterr().err
