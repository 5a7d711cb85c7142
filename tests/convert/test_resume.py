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

from ..tiny import N_LAYER

N_GROUP = -(-N_LAYER // 2)


class Counter:
    """Counts the losses that are measured, and can interrupt before one. Text of the model's own is made up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.n_loss = 0
        self.last: int | None = None
        divergences = sensitivity._Bench.divergences

        def counted(bench: Any, sources: Any, coded: Any) -> list[float]:
            if self.n_loss == self.last:
                raise KeyboardInterrupt
            self.n_loss += 1
            return divergences(bench, sources, coded)

        def made_up(engine: Engine, n_seq: int, n_len: int, rng: np.random.Generator, progress: Any) -> Any:
            texts = rng.integers(3, 259, (n_seq, n_len)).tolist()
            for seq, text in enumerate(texts):
                for start in range(0, n_len, engine.n_batch):
                    part = text[start : start + engine.n_batch]
                    engine.decode(part, [seq] * len(part), list(range(start, start + len(part))), outputs=False)
            return texts

        monkeypatch.setattr(sensitivity, "COEF_RATIOS", (4.0,))  # the tiny model is too small for less
        monkeypatch.setattr(sensitivity._Bench, "divergences", counted)
        monkeypatch.setattr(calibrate, "write_text", made_up)

    def begin(self, last: int | None = None) -> None:
        """Count from 0, and interrupt before this cache."""
        self.n_loss, self.last = 0, last


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Counter:
    return Counter(monkeypatch)


def settings(**changes: Any) -> Settings:
    return Settings(**{"group_size": 2, "tokens": 4096, "threads": 1, **changes})


@pytest.mark.parametrize(("weigh", "n_group"), [("groups", N_GROUP), ("layers", N_LAYER)])
def test_no_loss_is_measured_twice(
    weigh: str, n_group: int, counter: Counter, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, whole, wanted = tmp_path / "s", tmp_path / "whole", settings(weigh=weigh)
    convert(tiny_model, whole, wanted, show_progress=False)
    n_all = 2 + 2 * n_group
    assert counter.n_loss == n_all
    assert not whole.with_name("whole.partial").exists()

    counter.begin(last=3)
    with pytest.raises(KeyboardInterrupt):
        convert(tiny_model, out, wanted)
    assert f"{out}.partial keeps what is weighed: the same command takes it up" in capsys.readouterr().err
    assert not out.exists()

    counter.begin()
    convert(tiny_model, out, wanted, show_progress=False)
    assert counter.n_loss == n_all - 3
    assert not out.with_name("s.partial").exists()
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("change", ["seed", "version", "text"])
def test_what_depends_on_something_else_is_measured_anew(
    change: str,
    counter: Counter,
    tiny_model: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = settings(data=(text_file,), tokens=3000) if change == "text" else settings()
    counter.begin(last=1)
    with pytest.raises(KeyboardInterrupt):
        convert(tiny_model, tmp_path / "s", wanted, show_progress=False)
    if change == "seed":
        wanted = settings(seed=1)
    elif change == "version":
        monkeypatch.setattr(pipeline, "__version__", "another")
    else:
        text_file.write_text(text_file.read_text()[::-1])
    counter.begin()
    convert(tiny_model, tmp_path / "s", wanted, show_progress=False)
    assert counter.n_loss == 2 + 2 * N_GROUP


def test_nothing_is_promised_before_anything_is_kept(
    counter: Counter, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counter.begin(last=0)
    with pytest.raises(KeyboardInterrupt):
        convert(tiny_model, tmp_path / "s", settings())
    assert "keeps" not in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_something_else_is_kept(tiny_model: Path, tmp_path: Path) -> None:
    other = tmp_path / "s.partial"
    other.write_text("mine")
    with pytest.raises(OptionError, match=r"s\.partial: has format None, expected 'xkv-gguf convert, partial, 2'"):
        convert(tiny_model, tmp_path / "s", settings(), show_progress=False)
    assert other.read_text() == "mine"
