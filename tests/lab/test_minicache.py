"""Merged layers, the baseline."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from xkv_gguf.cli import main
from xkv_gguf.errors import OptionError
from xkv_gguf.lab.cache_spec import parse_caches
from xkv_gguf.lab.minicache import KEPT, MIDDLE, merge


def test_parallel_layers_lose_nothing() -> None:
    x = np.random.default_rng(0).normal(size=(50, 16)).astype(np.float32)
    first, second, _ = merge(x, 3 * x)
    np.testing.assert_allclose(first, x, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(second, 3 * x, rtol=1e-4, atol=1e-5)


def test_lengths_and_angles() -> None:
    rng = np.random.default_rng(1)
    x, y = (rng.normal(size=(400, 16)).astype(np.float32) for _ in range(2))
    first, second, far = merge(x, y)
    assert 0 < far.sum() < 400 * 4 * KEPT
    np.testing.assert_array_equal(first[far], x[far])
    np.testing.assert_allclose(np.linalg.norm(second, axis=1), np.linalg.norm(y, axis=1), rtol=1e-4)

    def angle(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        found: np.ndarray = np.arccos(np.clip(cosine, -1, 1))
        return found

    near = ~far
    np.testing.assert_allclose(angle(first, x)[near], MIDDLE * angle(x, y)[near], atol=1e-3)
    np.testing.assert_allclose(angle(first, second)[near], 0, atol=1e-3)


def test_eval_alone_has_it() -> None:
    assert [spec.name for spec in parse_caches("f16,minicache", baselines=True)] == ["f16", "minicache"]
    with pytest.raises(OptionError, match="'minicache' is unknown"):
        parse_caches("minicache")
    with pytest.raises(OptionError, match="is given twice"):
        parse_caches("minicache,minicache", baselines=True)


@pytest.mark.model
def test_on_the_demo_model(demo_model: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "eval.json"
    size = ("--n-ctx", "512", "--n-score", "64", "--caches", "q4_0,minicache")
    assert main(["eval", str(demo_model), "--text", str(text_file), *size, "--json", str(out)]) == 0
    rows = {row["cache"]: row for row in json.loads(out.read_text())["rows"]}
    assert 1.1 < rows["minicache"]["ratio"] < 1.35  # 14 of 30 layers, by half
    assert rows["minicache"]["kld_mean"] > rows["q4_0"]["kld_mean"]
