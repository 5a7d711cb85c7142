"""Models of named shapes, shrunk: what is written loads, decodes, and has the sidecar that was asked for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import shape
from xkv_gguf import Llama
from xkv_gguf.cli import main as xkv_main
from xkv_gguf.fitting import Fitting
from xkv_gguf.model.file import open_model
from xkv_gguf.runtime.devices import context_devices
from xkv_gguf.runtime.shape import file_shape
from xkv_gguf.sidecar.read import read_sidecar


@pytest.fixture(autouse=True)
def shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same proportions: all widths an eighth, heads of 64."""
    for name, full in shape.SHAPES.items():
        heads, kv = full.n_head // 4, full.n_head_kv // 4
        small = replace(full, n_head=heads, n_head_kv=kv, head=64, n_embd=full.n_embd // 8, n_ff=full.n_ff // 8)
        monkeypatch.setitem(shape.SHAPES, name, small)


@pytest.mark.parametrize("name", ["llama-8b", "llama-7b-mha", "qwen2.5-14b"])
def test_a_model_loads_and_decodes(name: str, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    assert shape.main([name, "--layers", "1", "--vocab", "512", "-o", str(out), "--sidecar"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "model.xkv.gguf"]
    for mode in ("f16", "xkv"):
        llm = Llama(out, kv_mode=mode, n_ctx=1024, n_threads=2, n_threads_batch=2, verbose=False)
        tokens = llm.tokenize(b"Words.")
        assert len(tokens) == 7
        llm.eval(tokens)
        llm.eval([7])
        logits = np.array(llm._ctx.get_logits_ith(-1)[: llm.n_vocab()])
        llm.close()
        assert len(logits) == 512
        assert np.isfinite(logits).all() and 0.1 < logits.std() < 10


def test_a_hollow_model_is_sized_like_the_whole_one(tmp_path: Path) -> None:
    whole, hollow = tmp_path / "whole.gguf", tmp_path / "hollow.gguf"
    for path, more in ((whole, []), (hollow, ["--hollow"])):
        assert shape.main(["llama-8b", "--layers", "2", "--vocab", "512", "-o", str(path), *more]) == 0
    assert whole.stat().st_size == hollow.stat().st_size
    assert not any(hollow.read_bytes()[-1000:]) and any(whole.read_bytes()[-1000:])
    with Fitting(open_model(hollow), {}) as fitting:
        found = fitting.plain("f16", 1024).taken
    # mapped, the file counts beside the weights that are packed anew for the CPU
    llm = Llama(whole, kv_mode="f16", n_ctx=1024, use_mmap=False, n_threads=2, verbose=False)
    report = llm.kv_report()
    weights = sum(part.weights for part in context_devices(llm._ctx.ctx))
    llm.close()
    assert found.weights == pytest.approx(weights, rel=0.01)
    assert found.cache == report.total_bytes
    assert found.compute == pytest.approx(report.scratch_bytes, rel=0.01)


def test_the_sidecar_has_orthonormal_bases_and_the_spectrum(tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    words = ["llama-8b", "--layers", "5", "-o", str(out), "--sidecar", "--group-size", "3", "--exponent", "2"]
    assert shape.main(words) == 0
    sidecar = read_sidecar(tmp_path / "model.xkv.gguf")
    sidecar.check_model(out)
    assert [len(group.layers) for group in sidecar.info.groups] == [3, 2]
    found = []
    for g, dim in enumerate((384, 256)):
        for kind in ("k", "v"):
            basis = np.array(sidecar.basis(g, kind), np.float32)
            np.testing.assert_allclose(basis @ basis.T, np.eye(dim), atol=2e-3)
            largest = np.take_along_axis(basis, np.abs(basis).argmax(1)[:, None], 1)
            assert (largest > 0).all()
            spectrum = np.array(sidecar.spectrum(g, kind))
            np.testing.assert_allclose(spectrum[0] / spectrum[:3], [1, 4, 9], rtol=1e-5)
            assert spectrum.mean() == pytest.approx(1)
            found.append(basis[:256, :256])
    assert not any(np.array_equal(a, b) for a in found for b in found if a is not b)


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    names = [tmp_path / f"{letter}.gguf" for letter in "abc"]
    for path, seed in zip(names, "001", strict=True):
        assert shape.main(["llama-8b", "--layers", "1", "-o", str(path), "--seed", seed]) == 0
    a, b, c = (path.read_bytes() for path in names)
    assert a == b != c


def test_blocks_have_the_deviation_that_is_asked_for() -> None:
    data = shape.random_q4_0(np.random.default_rng(0), 64, 128, 0.25).reshape(-1, shape.BLOCK_BYTES)
    scales = data[:, :2].copy().view(np.float16).astype(np.float32)
    weights = scales * np.concatenate([data[:, 2:] & 15, data[:, 2:] >> 4], 1).astype(np.float32)
    assert weights.std() == pytest.approx(0.25, rel=0.05)


def test_a_full_model_has_the_names_and_sizes_of_its_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    found = shape.tensors(shape.find_shape("qwen2.5-14b"), 48, 152064)
    assert sum(int(np.prod(size)) for size in found.values()) == pytest.approx(14.77e9, rel=0.001)


@pytest.mark.parametrize(
    "words, expected",
    [
        (
            ["llama-8", "-o", "x.gguf"],
            "shape 'llama-8' is unknown, did you mean 'llama-8b'?; expected one of llama-8b, ",
        ),
        (["llama-8b"], "the following arguments are required: -o/--out"),
        (["llama-8b", "-o", "x.gguf", "--layers", "0"], "--layers: 0, expected 1 or more"),
        (["llama-8b", "-o", "x.gguf", "--vocab", "258"], "--vocab: 258, expected 259 or more"),
        (["llama-8b", "-o", "x.gguf", "--exponent", "nan"], "--exponent: nan, expected 0 to 10"),
        (
            ["llama-8b", "-o", "x.gguf", "--layers", "2", "--group-size", "3"],
            "group size 3: 1 to 2 (layers that the cache holds)",
        ),
        (["llama-8b", "-o", "no/such/folder/x.gguf"], "the folder no/such/folder does not exist"),
    ],
)
def test_mistakes_are_one_line(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert shape.main(words) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"shape: {expected}") or expected in err
    assert err.count("\n") == 1


def test_metadata_tells_the_shape(tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    assert shape.main(["llama-8b", "--layers", "2", "-o", str(out)]) == 0
    found = file_shape(out)
    assert found.embd_k == found.embd_v == (128, 128)


def test_bench_runs_on_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = tmp_path / "model.gguf", tmp_path / "out.json"
    assert shape.main(["llama-8b", "--layers", "2", "--vocab", "300", "-o", str(model), "--sidecar"]) == 0
    words = ["--caches", "f16,xkv:4", "--depths", "0,700", "--n-ctx", "2048", "--reps", "1", "--threads", "2"]
    assert xkv_main(["bench", str(model), *words, "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["cache"], row["depth"]) for row in rows] == [("f16", 0), ("xkv:4", 0), ("f16", 700), ("xkv:4", 700)]
    for row in rows:
        assert row["prefill_tps"] > 0 and row["decode_tps"] > 0
        assert (row["prompt_tps"] is None) == (row["depth"] == 0)
        assert row["scratch_bytes"] == sum(row["scratch_parts"].values()) > 0
    assert rows[0]["cache_bytes"] == 2 * 2048 * 2 * 2 * 128
    assert rows[3]["cache_bytes"] < 0.26 * rows[2]["cache_bytes"]
    assert capsys.readouterr().out.count("xkv:4") == 2
