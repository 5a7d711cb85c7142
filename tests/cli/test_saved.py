"""`run --prompt-cache` and `chat --session`: what is restored in a fresh process goes on with the same tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ..tiny import weights, write_tiny
from .test_cli import error_line, in_a_process

PROMPT = "".join(f"{i} stones in the river, " for i in range(20)) + "x"
COMMON = ("--no-calibration", "--n-ctx", "1024", "--threads", "1", "--temp", "0", "-n", "16")
LINES = ["How many stones are there in the river?", "And now?", "Which one is the last?"]


def run(folder: Path, model: Path, prompt: str, *more: str, cache: tuple[str, ...] = COMMON) -> dict[str, Any]:
    (folder / "prompt.txt").write_text(prompt)
    done = in_a_process(folder, "run", str(model), "-f", "prompt.txt", "--json", *cache, *more)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def chat(folder: Path, model: Path, lines: list[str], *more: str, cache: tuple[str, ...] = COMMON) -> list[str]:
    done = in_a_process(folder, "chat", str(model), *cache, *more, stdin="\n".join(lines) + "\n")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def check_run(folder: Path, model: Path, prompt: str, more: str, cache: tuple[str, ...], *style: str) -> None:
    saved = ("--prompt-cache", "p.state", *style)
    fresh = run(folder, model, prompt, *style, cache=cache)
    first = run(folder, model, prompt, *saved, cache=cache)
    before = (folder / "p.state").read_bytes()
    again = run(folder, model, prompt, *saved, cache=cache)
    assert (folder / "p.state").read_bytes() == before
    assert first["text"] == again["text"] == fresh["text"] != ""
    assert (first["cached_tokens"], again["cached_tokens"]) == (0, first["prompt_tokens"] - 1)
    longer = run(folder, model, prompt + more, *saved, cache=cache)
    assert 0.8 * first["prompt_tokens"] < longer["cached_tokens"] < longer["prompt_tokens"] - 1
    assert run(folder, model, prompt + more, *saved, cache=cache)["cached_tokens"] == longer["prompt_tokens"] - 1
    other = run(folder, model, more, *saved, cache=cache)
    assert other["text"] == run(folder, model, more, *style, cache=cache)["text"]


def check_chat(folder: Path, model: Path, lines: list[str], cache: tuple[str, ...]) -> None:
    whole = chat(folder, model, lines, cache=cache)
    parts = [chat(folder, model, [line], "--session", "c.state", cache=cache) for line in lines]
    assert [line for part in parts for line in part] == whole
    assert len(whole) >= len(lines)


def test_run_with_a_prompt_cache(tiny_model: Path, tmp_path: Path) -> None:
    check_run(tmp_path, tiny_model, PROMPT, "and some more of them.", COMMON, "--raw")


def test_a_session_goes_on(tiny_model: Path, tmp_path: Path) -> None:
    check_chat(tmp_path, tiny_model, LINES, COMMON)


def test_a_session_is_written_after_every_answer(tiny_model: Path, tmp_path: Path) -> None:
    chat(tmp_path, tiny_model, [LINES[0], "/reset"], "--session", "c.state")
    once = chat(tmp_path, tiny_model, [LINES[1]], "--session", "c.state")
    assert once == chat(tmp_path, tiny_model, [LINES[1]])
    before = (tmp_path / "c.state").read_bytes()
    chat(tmp_path, tiny_model, ["/stats"], "--session", "c.state")
    assert (tmp_path / "c.state").read_bytes() == before


def test_what_cannot_be_taken_up(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, and the file stays as it is."""
    monkeypatch.chdir(tmp_path)
    run(tmp_path, tiny_model, PROMPT, "--raw", "--prompt-cache", "p.state")
    before = Path("p.state").read_bytes()
    assert "is no session of chat" in error_line(capsys, "chat", str(tiny_model), *COMMON, "--session", "p.state")
    write_tiny(Path("other.gguf"), weights(1))
    of_prompt = ("-p", "x", "--raw", "--prompt-cache", "p.state")
    assert "state p.state: saved with model" in error_line(capsys, "run", "other.gguf", *COMMON, *of_prompt)
    small = ("--no-calibration", "--n-ctx", "512", *COMMON[3:])
    assert "tokens, this context has room for 512; raise" in error_line(
        capsys, "run", str(tiny_model), *small, *of_prompt
    )
    assert Path("p.state").read_bytes() == before
    Path("p.state").write_bytes(before[:-1])
    assert "damaged or cut short" in error_line(capsys, "run", str(tiny_model), *COMMON, *of_prompt)
    nowhere = ("-p", "x", "--prompt-cache", "no/p.state")
    assert "the folder no does not exist" in error_line(capsys, "run", str(tiny_model), *COMMON, *nowhere)


@pytest.mark.slow
@pytest.mark.model
def test_the_demo_model(demo_model: Path, sidecar: Path, tmp_path: Path) -> None:
    cache = ("--sidecar", str(sidecar), "--n-ctx", "2048", "--threads", "2", "--temp", "0", "-n", "12")
    text = "The ferry to Harlow leaves at seven. " * 40
    check_run(tmp_path, demo_model, text, "When does the ferry leave?", cache)
    check_chat(tmp_path, demo_model, [f"{text} When does it leave?", "Where does it go?"], cache)
