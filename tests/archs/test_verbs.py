"""The verbs on a tiny model of each family that people run: convert, run, chat, eval, and a conversation in Python."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from xkv_gguf import Llama
from xkv_gguf.cli import main
from xkv_gguf.errors import XkvWarning
from xkv_gguf.sidecar.read import read_sidecar

from .table import ARCHS, FAMILIES, HYBRID, PLAIN

WEIGHED = ("deepseek2-moe", "gemma3", "qwen35")
"""Whose groups are weighed, which exchanges K and V in a cache and goes back."""

TEXT = " ".join(f"{i * i} stones lie by the river, {i} of them are wet." for i in range(400))


@pytest.mark.parametrize("name", FAMILIES)
def test_verbs(
    name: str,
    arch: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, text, prompt, out = arch(name), *(tmp_path / file for file in ("text.txt", "prompt.txt", "eval.json"))
    text.write_text(TEXT)
    prompt.write_text(TEXT[:8000])

    def verb(*words: str) -> str:
        code = main([words[0], str(model), *words[1:]])
        found = capsys.readouterr()
        assert code == 0, found.err
        return found.out

    weigh = "groups" if name in WEIGHED else "none"
    verb("convert", "--tokens", "2048", "--weigh", weigh, "--n-ctx", "2048", "--data", str(text), "--quiet")
    assert json.loads(verb("inspect", "--json"))["plan"]["ratio"] > 4
    answer = json.loads(verb("run", "--n-ctx", "2048", "--ratio", "4", "-n", "8", "--json", "--raw", "-f", str(prompt)))
    assert answer["cache"]["n_stored"] > 0
    assert answer["cache"]["parts"].get(ARCHS[name], 0) > 0 or ARCHS[name] == PLAIN
    monkeypatch.setattr("sys.stdin", io.StringIO("One?\nTwo?\n"))
    verb("chat", "--n-ctx", "2048", "--ratio", "4", "-n", "4")
    size = ("--n-ctx", "1024", "--n-score", "64", "--caches", "f16,xkv:2")
    verb("eval", "--text", str(text), *size, "--json", str(out))
    rows = {row["cache"]: row for row in json.loads(out.read_text())["rows"]}
    assert rows["f16"]["kld_mean"] < 1e-3
    assert rows["xkv:2"]["kld_mean"] < 0.5


@pytest.mark.parametrize("name", ["gemma3", "qwen35", "gpt-oss-moe"])
def test_a_conversation_goes_on(name: str, arch: Callable[[str], Path]) -> None:
    """A call that begins as the one before did gives what a fresh cache gives; a hybrid model reads it again."""
    options = {"ratio": 4, "calibrate": False}
    with closing(Llama(arch(name), n_ctx=1024, xkv=options, verbose=False, seed=1)) as llm:
        llm.create_completion(TEXT[:1200], max_tokens=4, temperature=0)
        again = llm.create_completion(TEXT[:1300], max_tokens=4, temperature=0)["choices"][0]["text"]
        llm.reset()
        fresh = llm.create_completion(TEXT[:1300], max_tokens=4, temperature=0)["choices"][0]["text"]
    assert (again == fresh) or ARCHS[name] != HYBRID
    assert again


def test_an_architecture_that_was_never_tested(arch: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xkv_gguf.llama.TESTED", frozenset({"llama"}))
    with pytest.warns(XkvWarning, match="architecture qwen3 was never tested with an xkv cache"):
        Llama(arch("qwen3"), n_ctx=1024, xkv={"ratio": 4, "calibrate": False}, verbose=False).close()


def test_layers_are_weighed_where_not_all_are_held(arch: Callable[[str], Path], tmp_path: Path) -> None:
    model, text = arch("llama4-moe"), tmp_path / "text.txt"
    text.write_text(TEXT)
    words = ["convert", str(model), "--tokens", "2048", "--weigh", "layers", "--data", str(text), "--quiet"]
    assert main(words) == 0
    info = read_sidecar(model.with_suffix(".xkv.gguf")).info
    assert [group.layers for group in info.groups] == [(1, 3)]
    assert info.scale_k[0] == info.scale_k[2] == 1.0
    assert info.scale_k[1] != 1.0
