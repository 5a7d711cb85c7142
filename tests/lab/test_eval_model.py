"""Figures of the demo model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from xkv_gguf import Llama
from xkv_gguf.cli import main
from xkv_gguf.lab.score import expectations

pytestmark = pytest.mark.model

N_CTX = 1024
F16_BYTES = 2 * N_CTX * 30 * 2 * 3 * 64


@pytest.mark.parametrize("n_score", [1, 8, 20])
def test_each_row_is_expected_before_its_token_is_seen(n_score: int, demo_model: Path, text_file: Path) -> None:
    settings = {"n_ctx": 256, "n_batch": 16, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
    n_prefill = 20
    with_all = Llama(demo_model, kv_mode="f16", logits_all=True, **settings)
    tokens = with_all.tokenize(text_file.read_bytes())[: n_prefill + n_score]
    with_all.eval(tokens)
    expected = with_all.scores[n_prefill - 1 : len(tokens) - 1].copy()
    with_all.close()

    llm = Llama(demo_model, kv_mode="f16", **settings)
    fed: list[int] = []
    found = [batch.copy() for batch in expectations(llm, tokens, n_prefill, 8, fed.append)]
    assert sum(fed) == llm.n_tokens == len(tokens)
    n_vocab = llm.n_vocab()
    llm.close()
    logits = np.concatenate(found)
    assert logits.shape == expected.shape == (n_score, n_vocab)
    # batches are cut elsewhere, and quantized weights round activations to 8 bits
    assert np.abs(logits - expected).max() < 1
    assert np.mean(logits.argmax(axis=1) == expected.argmax(axis=1)) > 0.8


def test_figures_of_all_caches(
    demo_model: Path, sidecar: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    xkv = f"xkv:n_window=32:sidecar={sidecar}"
    words = ["eval", str(demo_model), "--text", str(text_file), "--caches", f"f16,q4_0,{xkv}", "--n-ctx", str(N_CTX)]
    sizes = ["--prefill", "256", "--n-score", "32", "--score-batch", "16", "--n-ubatch", "64", "--threads", "2"]
    assert main([*words, *sizes, "--json", str(out)]) == 0
    f16, q4_0, low_rank = json.loads(out.read_text())["rows"]
    assert f16["kld_mean"] == f16["kld_median"] == f16["kld_p99"] == f16["kld_p999"] == 0
    assert f16["top1"] == 1
    assert f16["cache_bytes"] == F16_BYTES and f16["ratio"] == 1
    assert q4_0["cache_bytes"] == F16_BYTES * 18 // 64  # 32 numbers in 18 bytes
    assert q4_0["ratio"] == pytest.approx(64 / 18)
    for row in (q4_0, low_rank):
        assert 0 < row["kld_median"] <= row["kld_p99"] <= row["kld_p999"]
        assert 0 < row["kld_mean"] < 1
        assert 0.5 < row["top1"] <= 1
        assert row["ppl"] == pytest.approx(f16["ppl"], rel=0.5)
        assert row["cache_bytes"] == sum(row["cache_parts"].values())
    assert 1 < f16["ppl"] < 1000
    # all of them were fed, and compression went on while tokens were scored
    assert low_rank["n_exact"] + low_rank["n_stored"] == 256 + 32
    assert low_rank["n_exact"] <= 192  # sinks, window, chunk and micro-batch, in cells of 32
    assert low_rank["coef_bytes_per_token"] > 0
    table = capsys.readouterr().out
    assert "q4_0" in table and "3.56x" in table


def test_a_cache_that_cannot_be_had_is_told_before_the_runs(
    demo_model: Path, sidecar: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = f"xkv:n_window=2000:sidecar={sidecar}"
    words = ["eval", str(demo_model), "--text", str(text_file), "--caches", cache, "--n-ctx", str(N_CTX)]
    assert main([*words, "--threads", "1", "--json", str(tmp_path / "out.json")]) == 1
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith(f"xkv-gguf: cache {cache}: n_ctx: 1024, expected more than")
