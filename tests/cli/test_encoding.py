"""Text that is not UTF-8, and terminals that are not: letters are replaced, and nothing ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from xkv_gguf.base.text import clean_text
from xkv_gguf.cli import main

from .test_cli import RUN_MAIN

COMMON = ("--kv-mode", "f16", "--n-ctx", "512", "--threads", "1", "-n", "3", "--temp", "0")
NO_TEXT = b"caf\xe9"


def run(*argv: bytes | str, stdin: bytes = b"", encoding: str = "utf-8") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-c", RUN_MAIN, *argv]
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    return subprocess.run(command, input=stdin, capture_output=True, timeout=300, env=environment, check=False)


def test_surrogates_become_replacement_characters() -> None:
    assert clean_text(os.fsdecode(NO_TEXT)) == "caf\ufffd"
    assert clean_text("café 😀") == "café 😀"


def test_a_prompt_in_the_arguments(tiny_model: Path) -> None:
    done = run("run", str(tiny_model), "--raw", "-p", NO_TEXT, *COMMON)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_prompt_from_standard_input(tiny_model: Path) -> None:
    done = run("run", str(tiny_model), "--raw", "-f", "-", *COMMON, stdin=NO_TEXT)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_line_of_a_chat(tiny_model: Path) -> None:
    """The chat goes on: the next line is answered as well."""
    done = run("chat", str(tiny_model), *COMMON, stdin=NO_TEXT + b"\n/what\n")
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"/what is unknown" in done.stdout


@pytest.mark.model
def test_a_terminal_without_the_letters(demo_model: Path) -> None:
    prompt = "Emoji: 😀 😀 😀 😀"
    done = run("run", str(demo_model), "--raw", "-p", prompt, *COMMON, encoding="ascii")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.isascii()


def test_help_on_any_stream(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "convert" in capsys.readouterr().out
