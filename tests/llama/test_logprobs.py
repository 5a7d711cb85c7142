"""Log-probabilities of completions are those of the logits that `eval` gives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

from xkv_gguf import Llama

PROMPT = "One,two;three."


@pytest.fixture(params=[True, False], ids=["bos", "no-bos"])
def model(request: pytest.FixtureRequest, tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model, whose tokenizer puts a BOS in front or not."""
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny_model.read_bytes())
    if not request.param:
        reader = GGUFReader(path, "r+")
        reader.fields["tokenizer.ggml.add_bos_token"].parts[-1][0] = False
        del reader
    return path


@pytest.fixture(params=["xkv", "f16"])
def llm(request: pytest.FixtureRequest, model: Path) -> Iterator[Llama]:
    options = {"xkv": {"calibrate": False}} if request.param == "xkv" else {}
    made = Llama(model, kv_mode=request.param, n_ctx=512, logits_all=True, n_threads=1, verbose=False, **options)
    yield made
    made.close()


def expected(llm: Llama, tokens: list[int]) -> list[float]:
    """Of all tokens but the first."""
    llm.reset()
    llm.eval(tokens)
    rows = llm.logits_to_logprobs(llm.scores[: len(tokens)])
    return [float(rows[i, token]) for i, token in enumerate(tokens[1:])]


def test_of_an_answer_and_an_echoed_prompt(llm: Llama) -> None:
    bare: Any = llm(PROMPT, max_tokens=5, temperature=0.0, logprobs=3, logit_bias={2: -1e9})
    answer = llm._told[1][: bare["usage"]["completion_tokens"]]  # more than five where a character has several bytes
    echoed: Any = llm(PROMPT, max_tokens=5, temperature=0.0, logprobs=3, echo=True, logit_bias={2: -1e9})
    prompt = llm.tokenize(PROMPT.encode())
    has_bos = prompt[0] == llm.token_bos()
    # the bias makes no difference to what is told
    values = expected(llm, prompt + answer)
    found = echoed["choices"][0]["logprobs"]
    n_prompt = len(prompt) - has_bos
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    assert np.allclose(found["token_logprobs"][1:], values[has_bos:], atol=2e-2)
    assert len(found["tokens"]) == len(found["text_offset"]) == len(found["top_logprobs"]) == n_prompt + len(answer)
    assert "".join(found["tokens"][:n_prompt]) == PROMPT
    assert found["text_offset"][:n_prompt] == list(range(n_prompt))
    for token, value, top in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True):
        assert value is None or (top[token] == value and max(top.values()) >= value)
    alone = bare["choices"][0]["logprobs"]["token_logprobs"]
    assert np.allclose(alone, found["token_logprobs"][n_prompt:], atol=2e-2)


def test_of_an_echoed_prompt_that_is_cached(llm: Llama) -> None:
    options: Any = {"max_tokens": 1, "temperature": 0.0, "logprobs": 1, "echo": True}
    first, again = llm(PROMPT, **options), llm(PROMPT, **options)
    assert np.allclose(
        first["choices"][0]["logprobs"]["token_logprobs"][1:],
        again["choices"][0]["logprobs"]["token_logprobs"][1:],
        atol=2e-2,
    )
