"""Drafts: the same text as without, for prompts of any length, and without the logits of all tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_cpp.llama_speculative import LlamaDraftModel, LlamaPromptLookupDecoding

from xkv_gguf import Llama
from xkv_gguf.errors import OptionError

from .conftest import Open

REPEATED = "The cat sat on the mat. The dog lay by the fire. " * 12


class Stubborn(LlamaDraftModel):
    """Drafts of ten tokens that are always wrong."""

    def __call__(self, input_ids: Any, /, **kwargs: Any) -> Any:
        return np.full(10, 40, dtype=np.intc)


def text(llm: Llama, prompt: Any, n: int = 12, **kwargs: Any) -> str:
    reply: Any = llm(prompt, max_tokens=n, temperature=0.0, **kwargs)
    return str(reply["choices"][0]["text"])


@pytest.mark.model
@pytest.mark.parametrize("draft", [LlamaPromptLookupDecoding(), Stubborn()], ids=["lookup", "stubborn"])
@pytest.mark.parametrize("mode", ["xkv", "f16"])
def test_a_prompt_longer_than_a_batch(mode: str, draft: LlamaDraftModel, open_llama: Open) -> None:
    plain, drafted = (open_llama(mode, n_batch=64, draft_model=one) for one in (None, draft))
    assert len(plain.tokenize(REPEATED.encode())) > plain.n_batch
    expected = text(plain, REPEATED)
    assert "cat" in expected
    assert text(drafted, REPEATED) == expected
    # and once more, after a prefix that is there
    more = REPEATED + " And then the"
    assert text(drafted, more) == text(plain, more)
    assert not drafted._logits_all and len(drafted.scores) == drafted.n_batch


@pytest.mark.parametrize("n_batch", [1, 3, 512])
@pytest.mark.parametrize("mode", ["xkv", "f16"])
def test_drafts_that_are_longer_than_a_batch(mode: str, n_batch: int, tiny_model: Path) -> None:
    options = {"xkv": {"calibrate": False}} if mode == "xkv" else {}

    def answer(**kwargs: Any) -> str:
        llm = Llama(tiny_model, kv_mode=mode, n_ctx=512, n_threads=1, verbose=False, **options, **kwargs)
        try:
            return text(llm, [30 + i % 7 for i in range(60)], 30, logit_bias={2: -1e9})
        finally:
            llm.close()

    assert answer(draft_model=LlamaPromptLookupDecoding(), n_batch=n_batch) == answer()


def test_all_logits_where_they_are_asked_for(tiny_model: Path) -> None:
    draft = LlamaPromptLookupDecoding()
    llm = Llama(tiny_model, kv_mode="f16", n_ctx=512, draft_model=draft, logits_all=True, verbose=False, n_threads=1)
    prompt = [30 + i % 7 for i in range(60)]
    reply: Any = llm(prompt, max_tokens=4, temperature=0.0, logprobs=1)
    assert len(reply["choices"][0]["logprobs"]["token_logprobs"]) > 0
    llm.close()
    llm = Llama(tiny_model, kv_mode="f16", n_ctx=512, draft_model=draft, verbose=False, n_threads=1)
    with pytest.raises(OptionError, match="logprobs: with a draft model, they need"):
        llm(prompt, max_tokens=4, logprobs=1)
    llm.close()
