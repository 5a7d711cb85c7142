"""A full context goes on: the oldest tokens are removed and the others moved, with llama-cpp-python's own calls."""

from __future__ import annotations

import numpy as np
import pytest

from xkv_gguf import Llama
from xkv_gguf.base.divergence import kl_divergence, log_softmax

from .conftest import Open

N_CTX = 256
TEXT = b"The river ran past the old mill, and no one in the village could say who had built it. "


def shift(llm: Llama, n_keep: int) -> None:
    """Remove half of what follows the first n_keep tokens."""
    n_discard = (llm.n_tokens - n_keep) // 2
    assert llm._ctx.kv_cache_seq_rm(0, n_keep, n_keep + n_discard)
    llm._ctx.kv_cache_seq_shift(0, n_keep + n_discard, -1, -n_discard)
    llm.n_tokens -= n_discard


def read(llm: Llama, tokens: list[int], n_keep: int) -> np.ndarray:
    """Logits after each batch of a text that is longer than the context."""
    found = []
    for i in range(0, len(tokens), 32):
        part = tokens[i : i + 32]
        if llm.n_tokens + len(part) > N_CTX:
            shift(llm, n_keep)
        llm.eval(part)
        found.append(np.ctypeslib.as_array(llm._ctx.get_logits(), (1, llm.n_vocab()))[0].copy())
    return np.array(found)


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize("n_keep", [0, 1, 100])
def test_ten_contexts(n_keep: int, open_llama: Open) -> None:
    """As near to the plain cache after ten contexts as in the first one."""
    found = []
    for mode in ("f16", "xkv"):
        llm = open_llama(mode, n_ctx=N_CTX, n_batch=64, **({"xkv": {"coef_ratio": 4}} if mode == "xkv" else {}))
        words = llm.tokenize(TEXT, add_bos=True)
        found.append(read(llm, (words * (1 + 10 * N_CTX // len(words)))[: 10 * N_CTX], n_keep))
        assert llm.n_tokens <= N_CTX
        llm.close()
    plain, xkv = map(log_softmax, found)
    divergence = kl_divergence(plain, xkv)
    assert np.isfinite(divergence).all()
    assert divergence[len(divergence) // 2 :].mean() <= max(0.1, 2 * divergence[: len(divergence) // 10].mean())
