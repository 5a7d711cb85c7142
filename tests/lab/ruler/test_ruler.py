"""The verb on the demo model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from xkv_gguf import Llama
from xkv_gguf.cli import main
from xkv_gguf.lab.ruler import run as ruler_run
from xkv_gguf.lab.ruler.prompt import Prompter
from xkv_gguf.lab.ruler.run import answer
from xkv_gguf.lab.ruler.task import Sample, Turn, fit, n_tokens
from xkv_gguf.lab.ruler.tasks import TASKS


@pytest.fixture(scope="module")
def f16(demo_model: Path) -> Iterator[Llama]:
    llm = Llama(demo_model, kv_mode="f16", n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False)
    yield llm
    llm.close()


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["--tasks", "niah"], "--tasks: 'niah' is unknown"),
        (["--caches", "f16,f17"], "'f17' is unknown, did you mean 'f16'"),
        (["--caches", "xkv:4:n_windo=64"], "xkv option 'n_windo' is unknown, did you mean 'n_window'"),
        (["--length", "9000"], "--length: 9000, expected at most 8192, the context of "),
        (["--length", "1k"], "--length: '1k' is no whole number"),
        (["--length", "0"], "--length: 0, expected 1 or more"),
        (["--samples", "0"], "--samples: 0, expected 1 or more"),
        (["--threads", "0"], "--threads: 0, expected 1 or more"),
        (["--n-ubatch", "0"], "--n-ubatch: 0, expected 1 or more"),
        (["--json", "no/such/folder/out.json"], "the folder no/such/folder does not exist"),
        (["no/such/model.gguf"], "model no/such/model.gguf: no such file"),
    ],
)
def test_errors_are_one_line(
    argv: list[str], expected: str, demo_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = [] if argv[0].endswith(".gguf") else [str(demo_model)]
    assert main(["ruler", *model, "--caches", "f16", *argv]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert expected in err and err.count("\n") == 1


@pytest.mark.model
def test_a_short_length_is_refused_before_any_sample(
    demo_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ruler_run, "answer", None)
    argv = ["--length", "512,400", "--tasks", "fwe,vt", "--caches", "f16", "--samples", "2", "--threads", "1"]
    assert main(["ruler", str(demo_model), *argv]) == 1
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("xkv-gguf: --length: 400 is too short for the task vt, expected 5")


@pytest.mark.model
@pytest.mark.parametrize("name", sorted(TASKS))
def test_prompts_of_the_model_fill_their_length(name: str, f16: Llama) -> None:
    prompter = Prompter(f16)
    task = TASKS[name]
    sample = fit(task, 2048, 0, 0, prompter.cost)
    assert 0.9 * 2048 <= n_tokens(task, sample, prompter.cost) <= 2048
    text = f16.detokenize(prompter.first(sample), special=True).decode()
    assert text.startswith("<|im_start|>") and text.count("<|im_start|>assistant") == 1
    assert text.endswith(f"<|im_start|>assistant\n{sample.turns[0].prefix}")


@pytest.mark.model
def test_a_model_without_a_chat_template_goes_on_with_the_text(f16: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(f16.metadata, "tokenizer.chat_template")
    prompter = Prompter(f16)
    sample = Sample("Document.", (Turn("First?", "It is", ("a",)), Turn("Second?", "It is", ("b",))))
    assert f16.detokenize(prompter.first(sample)).decode().endswith("Document.\nFirst? It is")
    assert f16.detokenize(prompter.following(sample.turns[1])).decode() == "\nSecond? It is"


@pytest.mark.model
def test_later_turns_are_appended_to_one_cache(f16: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated: list[int] = []
    evaluate = f16.eval

    def count(tokens: list[int]) -> None:
        evaluated.append(len(tokens))
        evaluate(tokens)

    monkeypatch.setattr(f16, "eval", count)
    prompter = Prompter(f16)
    numbers = {"Lisbon": "4071953", "Oslo": "8812364"}
    document = " ".join(f"The number of {city} is {number}." for city, number in numbers.items())
    turns = [Turn(f"Which number has {city}?", f"{city} has the number", (value,)) for city, value in numbers.items()]
    sample = Sample(document, tuple(turns))
    first = answer(f16, prompter, sample, 12)
    assert len(first) == 2 and first[1]["score"] == 1.0
    prefills = [n for n in evaluated if n > 1]
    # at most the last token of an answer, which was sampled but not evaluated, comes again
    assert prefills[0] == len(prompter.first(sample))
    assert 0 <= prefills[1] - len(prompter.following(turns[1])) <= 1
    # nothing remains of one sample in the next
    assert answer(f16, prompter, sample, 12) == first


@pytest.mark.model
@pytest.mark.slow
def test_scores_on_the_model(demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "ruler.json"
    argv = ["--length", "1024", "--tasks", "niah_single_1,multiturn", "--caches", "f16", "--samples", "1"]
    assert main(["ruler", str(demo_model), *argv, "--threads", "1", "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert [(row["cache"], row["task"], row["length"], row["n_samples"]) for row in result["rows"]] == [
        ("f16", "niah_single_1", 1024, 1),
        ("f16", "multiturn", 1024, 1),
    ]
    assert result["rows"][0]["score"] == 100.0
    assert result["rows"][0]["cache_bytes"] == 2 * 1024 * 30 * 2 * 3 * 64
    turns = result["rows"][1]["turn_scores"]
    assert len(turns) == 4 and result["rows"][1]["score"] == sum(turns) / 4
    assert result["command"].startswith(
        f"xkv-gguf ruler {demo_model.name} --length 1024 --tasks niah_single_1,multiturn"
    )
    assert len(result["model"]["fingerprint"]) == 64
    for sample in result["samples"]:
        assert 0.9 * 1024 <= sample["n_tokens"] <= 1024
        assert all(turn["references"] and turn["answer"] for turn in sample["turns"])
    assert [path.name for path in tmp_path.iterdir()] == ["ruler.json"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["task", "length", "f16"]
    assert lines[1].split() == ["niah_single_1", "1024", "100.0"]


@pytest.mark.model
def test_a_cache_without_calibration_needs_no_sidecar(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(llm: Llama, prompter: Prompter, sample: Sample, n_answer: int) -> list[dict[str, Any]]:
        assert llm.kv_mode == "xkv"
        return [{"question": "", "references": ["a"], "answer": "a", "score": 1.0}]

    monkeypatch.setattr(ruler_run, "answer", fake)
    monkeypatch.setattr("xkv_gguf.convert.pipeline.ensure_sidecar", None)
    argv = ["--length", "1024", "--tasks", "fwe", "--caches", "xkv:calibrate=false", "--samples", "1", "--threads", "1"]
    assert main(["ruler", str(demo_model), *argv]) == 0


@pytest.mark.model
def test_an_interrupted_run_goes_on_where_it_was(
    demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "ruler.json"
    asked: list[str] = []
    stop_at = 3

    def fake(llm: Llama, prompter: Prompter, sample: Sample, n_answer: int) -> list[dict[str, Any]]:
        if len(asked) == stop_at:
            raise KeyboardInterrupt
        asked.append(sample.document)
        return [{"question": "", "references": ["a"], "answer": "a", "score": 1.0}]

    monkeypatch.setattr(ruler_run, "answer", fake)
    argv = ["ruler", str(demo_model), "--length", "512", "--tasks", "niah_single_1,fwe", "--caches", "f16"]
    argv += ["--samples", "2", "--threads", "1", "--json", str(out)]
    assert main(argv) == 130
    assert "keeps the finished samples" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["ruler.json.partial"]

    assert main([*argv, "--seed", "1"]) == 1
    assert "holds parts of another model or with other settings" in capsys.readouterr().err

    stop_at = 99
    assert main(argv) == 0
    assert len(asked) == len(set(asked)) == 4
    result = json.loads(out.read_text())
    assert [(s["task"], s["index"]) for s in result["samples"]] == [
        ("niah_single_1", 0),
        ("niah_single_1", 1),
        ("fwe", 0),
        ("fwe", 1),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["ruler.json"]
