"""A conversion that was interrupted goes on from what it had done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xkv_gguf.convert import calibrate, sensitivity
from xkv_gguf.convert.engine import Engine
from xkv_gguf.convert.pipeline import convert
from xkv_gguf.convert.settings import Settings
from xkv_gguf.errors import OptionError

from .tiny import N_LAYER


class Interrupter:
    """Counts the caches that are measured, and the texts that the model writes; interrupts before a cache."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.n_cache = self.n_text = 0
        self.last: int | None = None
        open_context = Engine.open_context

        def counted_context(engine: Engine, n_seq: int, n_len: int, xkv: Any = None, n_ubatch: Any = None) -> None:
            if xkv is not None:
                if self.n_cache == self.last:
                    raise KeyboardInterrupt
                self.n_cache += 1
            open_context(engine, n_seq, n_len, xkv, n_ubatch)

        def counted_text(engine: Engine, n_seq: int, n_len: int, rng: np.random.Generator, progress: Any) -> Any:
            self.n_text += 1
            texts = rng.integers(3, 259, (n_seq, n_len)).tolist()  # to write it token by token would take long
            for seq, text in enumerate(texts):
                calibrate.run_text(engine, seq, text, progress)
            return texts

        monkeypatch.setattr(sensitivity, "COEF_RATIO", 4.0)  # the tiny model is too small for less
        monkeypatch.setattr(Engine, "open_context", counted_context)
        monkeypatch.setattr(calibrate, "write_text", counted_text)


@pytest.mark.parametrize(("weigh", "n_group"), [("groups", -(-N_LAYER // 2)), ("layers", N_LAYER)])
def test_neither_text_nor_measurements_are_made_twice(
    weigh: str,
    n_group: int,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    counter = Interrupter(monkeypatch)
    out = tmp_path / "s"
    settings = Settings(group_size=2, tokens=4096, threads=1, weigh=weigh)
    convert(tiny_model, tmp_path / "whole", settings, show_progress=False)
    n_all = 2 + 2 * n_group
    assert (counter.n_cache, counter.n_text) == (n_all, 1)
    assert not Path(f"{tmp_path / 'whole'}.partial").exists()

    counter.n_cache, counter.last = 0, 3
    with pytest.raises(KeyboardInterrupt):
        convert(tiny_model, out, settings)
    assert f"{out}.partial keeps what is done: the same command goes on from there" in capsys.readouterr().err
    assert not out.exists()

    counter.last, counter.n_text = None, 0
    convert(tiny_model, out, settings, show_progress=False)
    assert (counter.n_cache, counter.n_text) == (n_all, 0)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("s")) == ["s"]
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()


def test_other_settings_begin_anew(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = Interrupter(monkeypatch)
    counter.last = 1
    with pytest.raises(KeyboardInterrupt):
        convert(tiny_model, tmp_path / "s", Settings(group_size=2, tokens=4096, threads=1), show_progress=False)
    counter.last = None
    convert(tiny_model, tmp_path / "s", Settings(group_size=2, tokens=4096, threads=1, seed=1), show_progress=False)
    assert counter.n_text == 2


def test_a_file_that_is_something_else_is_kept(tiny_model: Path, tmp_path: Path) -> None:
    other = tmp_path / "s.partial"
    other.write_text("mine")
    with pytest.raises(OptionError, match=r"s\.partial: does not hold what an interrupted run of convert has done"):
        convert(tiny_model, tmp_path / "s", Settings(group_size=2, tokens=512, threads=1), show_progress=False)
    assert other.read_text() == "mine"
