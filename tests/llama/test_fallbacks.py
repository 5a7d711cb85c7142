"""Nothing is done with less than usual without a word: a note in the report, a warning where it costs much."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest

from tests.native.tiny_models import write_model
from xkv_gguf import Llama
from xkv_gguf.errors import OptionError, UnsupportedError, XkvWarning


def made(path: Path, n_ctx: int = 2048, **options: Any) -> tuple[list[str], dict[str, Any]]:
    """Warnings when an object is made, and its report."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        options = {"calibrate": False, **options}
        llm = Llama(path, n_ctx=n_ctx, n_threads=1, verbose=False, xkv=options)
    report = llm.kv_report()
    llm.close()
    assert all(note in str(report) for note in report.notes)
    told = [str(one.message) for one in seen if issubclass(one.category, XkvWarning)]
    return [text for text in told if text.startswith("this xkv cache")], report.to_dict()


def test_nothing_to_tell(tiny_model: Path) -> None:
    warned, report = made(tiny_model, ratio=2)
    assert (warned, report["notes"], report["n_ubatch"]) == ([], [], 512)


def test_attention_by_stock_ops(tmp_path: Path) -> None:
    """Latents have no fused op."""
    path = tmp_path / "latents.gguf"
    write_model("deepseek2", path)
    warned, report = made(path, ratio=2)
    text = "layers on CPU is made of stock ops, which are slower"
    assert len(warned) == 1 and text in warned[0]
    assert text in report["notes"][-1]


def test_stock_ops_that_were_asked_for(tiny_model: Path) -> None:
    warned, report = made(tiny_model, ratio=2, fused=False)
    assert warned == []
    assert "attention of 3 of 3 layers on CPU" in report["notes"][-1]


def test_no_room_for_text_sinks(tiny_model: Path) -> None:
    n_ctx = 16384
    with pytest.raises(OptionError) as caught:
        made(tiny_model, n_ctx, ratio=1000)
    budget = int(re.findall(r"smallest cache takes (\d+) bytes", str(caught.value))[0])
    warned, report = made(tiny_model, n_ctx, budget=budget)
    assert len(warned) == 1 and "no room for attention sinks in the text" in warned[0]
    assert any(note.startswith("no room for attention sinks") for note in report["notes"])
    # given as it is, it is what was asked for
    assert made(tiny_model, n_ctx, budget=budget, n_text_sink=0)[0] == []


@pytest.fixture
def plm(tmp_path: Path) -> Path:
    """Its graph cannot be made with flash attention: llama.cpp would abort the process."""
    path = tmp_path / "plm.gguf"
    write_model("plm", path)
    return path


def test_flash_attention_is_off_where_it_cannot_be_on(plm: Path) -> None:
    llm = Llama(plm, kv_mode="f16", n_ctx=256, n_threads=1, verbose=False)
    llm.eval([3, 4, 5])
    llm.close()


@pytest.mark.parametrize(
    "kwargs",
    [
        {"kv_mode": "f16", "flash_attn": True},
        {"kv_mode": "q8_0"},
        {"kv_mode": "xkv"},
        {"kv_mode": "xkv", "xkv": {"calibrate": False}},
    ],
)
def test_flash_attention_that_is_needed(kwargs: dict[str, Any], plm: Path) -> None:
    with pytest.raises(UnsupportedError, match="architecture plm does not run with flash attention; use kv_mode='f16'"):
        Llama(plm, n_ctx=512, n_threads=1, verbose=False, **kwargs)
