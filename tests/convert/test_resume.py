"""A conversion that was interrupted goes on from what it had done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xkv_gguf.convert import calibrate, pipeline, sensitivity
from xkv_gguf.convert.engine import Engine
from xkv_gguf.convert.pipeline import convert
from xkv_gguf.convert.settings import Settings
from xkv_gguf.errors import OptionError

from .tiny import N_LAYER

N_GROUP = -(-N_LAYER // 2)


class Counter:
    """Counts the caches that are measured and the texts that the model writes, and can interrupt before one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.n_cache = self.n_text = 0
        self.last_cache: int | None = None
        self.last_text: int | None = None
        open_context = Engine.open_context

        def counted_context(engine: Engine, n_seq: int, n_len: int, xkv: Any = None, n_ubatch: Any = None) -> None:
            if xkv is not None:
                if self.n_cache == self.last_cache:
                    raise KeyboardInterrupt
                self.n_cache += 1
            open_context(engine, n_seq, n_len, xkv, n_ubatch)

        def counted_text(engine: Engine, n_seq: int, n_len: int, rng: np.random.Generator, progress: Any) -> Any:
            if self.n_text == self.last_text:
                raise KeyboardInterrupt
            self.n_text += 1
            # made up: to write it token by token takes long, and rounds otherwise than reading does
            texts = rng.integers(3, 259, (n_seq, n_len)).tolist()
            for seq, text in enumerate(texts):
                calibrate.run_text(engine, seq, text, progress)
            return texts

        monkeypatch.setattr(sensitivity, "COEF_RATIO", 4.0)  # the tiny model is too small for less
        monkeypatch.setattr(Engine, "open_context", counted_context)
        monkeypatch.setattr(calibrate, "write_text", counted_text)

    def begin(self, last_cache: int | None = None, last_text: int | None = None) -> None:
        """Count from 0, and interrupt before this cache or text."""
        self.n_cache = self.n_text = 0
        self.last_cache, self.last_text = last_cache, last_text


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Counter:
    return Counter(monkeypatch)


def settings(**changes: Any) -> Settings:
    return Settings(**{"group_size": 2, "tokens": 4096, "threads": 1, **changes})


@pytest.mark.parametrize(("weigh", "n_group"), [("groups", N_GROUP), ("layers", N_LAYER)])
def test_neither_text_nor_measurements_are_made_twice(
    weigh: str,
    n_group: int,
    counter: Counter,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(calibrate, "SELF_SEQS", 4)
    out, whole, wanted = tmp_path / "s", tmp_path / "whole", settings(weigh=weigh)
    assert convert(tiny_model, whole, wanted, show_progress=False).notes == ()
    n_all = 2 + 2 * n_group
    assert (counter.n_cache, counter.n_text) == (n_all, 2)
    assert not whole.with_name("whole.partial").exists()

    for last_cache, last_text in ((None, 1), (3, None)):
        counter.begin(last_cache, last_text)
        with pytest.raises(KeyboardInterrupt):
            convert(tiny_model, out, wanted)
        assert f"{out}.partial keeps what is done: the same command goes on from there" in capsys.readouterr().err
        assert not out.exists()
    assert counter.n_text == 1

    counter.begin()
    done = convert(tiny_model, out, wanted, show_progress=False)
    assert (counter.n_cache, counter.n_text) == (n_all - 3, 0)
    assert "5 parts are taken from an interrupted run" in done.notes[-1]
    assert not out.with_name("s.partial").exists()
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("change", ["seed", "build"])
def test_what_depends_on_something_else_is_made_anew(
    change: str, counter: Counter, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter.begin(last_cache=1)
    with pytest.raises(KeyboardInterrupt):
        convert(tiny_model, tmp_path / "s", settings(), show_progress=False)
    counter.begin()
    if change == "build":
        monkeypatch.setattr(pipeline, "__version__", "another")
    wanted = settings(seed=1) if change == "seed" else settings()
    assert convert(tiny_model, tmp_path / "s", wanted, show_progress=False).notes == ()
    assert (counter.n_cache, counter.n_text) == (2 + 2 * N_GROUP, 1)


def test_measurements_on_other_text_are_made_anew(
    counter: Counter, tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    wanted = settings(data=(text_file,), tokens=3000)
    counter.begin(last_cache=3)
    with pytest.raises(KeyboardInterrupt):
        convert(tiny_model, tmp_path / "s", wanted, show_progress=False)
    text_file.write_text(text_file.read_text()[::-1])
    counter.begin()
    convert(tiny_model, tmp_path / "s", wanted, show_progress=False)
    assert counter.n_cache == 2 + 2 * N_GROUP


def test_nothing_is_promised_before_anything_is_done(
    counter: Counter, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counter.begin(last_text=0)
    with pytest.raises(KeyboardInterrupt):
        convert(tiny_model, tmp_path / "s", settings())
    assert "keeps what is done" not in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_something_else_is_kept(tiny_model: Path, tmp_path: Path) -> None:
    other = tmp_path / "s.partial"
    other.write_text("mine")
    with pytest.raises(OptionError, match=r"s\.partial: has format None, expected 'xkv-gguf convert, partial, 2'"):
        convert(tiny_model, tmp_path / "s", settings(), show_progress=False)
    assert other.read_text() == "mine"
