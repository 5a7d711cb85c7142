"""A number hidden in a 6000-token document: xkv finds it wherever f16 does.

Three depths by default, all ten with --all-depths.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from xkv_gguf import Llama
from xkv_gguf.convert.pipeline import ensure_sidecar
from xkv_gguf.convert.settings import default_threads
from xkv_gguf.haystack import Haystack, Needle, build_haystack, make_needle

pytestmark = [pytest.mark.model, pytest.mark.slow]

N_CTX = 8192
N_DOCUMENT = 6000
DEPTHS = [0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95]
QUICK_DEPTHS = (0.05, 0.45, 0.95)
TEXT_SEED = 21


def open_model(path: Path, kv_mode: str) -> Llama:
    threads = min(4, default_threads())
    return Llama(path, kv_mode=kv_mode, n_ctx=N_CTX, n_threads=threads, n_threads_batch=threads, verbose=False)


@pytest.fixture(scope="module")
def xkv(demo_model: Path) -> Iterator[Llama]:
    """The model on an xkv cache with default settings and the default sidecar."""
    ensure_sidecar(demo_model)
    llm = open_model(demo_model, "xkv")
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def f16(demo_model: Path) -> Iterator[Llama]:
    llm = open_model(demo_model, "f16")
    yield llm
    llm.close()


def document(llm: Llama, needle: Needle, depth: float) -> Haystack:
    def count(text: str) -> int:
        return len(llm.tokenize(text.encode(), add_bos=False))

    return build_haystack(count, N_DOCUMENT, [needle], [depth], TEXT_SEED)


def answer(llm: Llama, hay: Haystack) -> str:
    # a prefix kept from the document before would have been compressed in other blocks
    llm.reset()
    llm._ctx.kv_cache_clear()
    message = {"role": "user", "content": hay.prompt()}
    reply = llm.create_chat_completion([message], temperature=0.0, max_tokens=32)
    return str(reply["choices"][0]["message"]["content"])


@pytest.mark.parametrize("depth", DEPTHS)
def test_xkv_finds_what_f16_finds(depth: float, xkv: Llama, request: pytest.FixtureRequest) -> None:
    if depth not in QUICK_DEPTHS and not request.config.getoption("--all-depths"):
        pytest.skip("only with --all-depths")
    needle = make_needle(round(100 * depth))
    hay = document(xkv, needle, depth)
    assert 0.95 * N_DOCUMENT < hay.n_tokens < 1.05 * N_DOCUMENT
    said = answer(xkv, hay)
    if needle.found_in(said):
        return
    # f16 is asked only where it matters
    plain = answer(request.getfixturevalue("f16"), hay)
    assert not needle.found_in(plain), f"depth {depth}: f16 says {plain!r}, xkv says {said!r}, not {needle.answer}"
    pytest.skip(f"depth {depth}: f16 does not find it either")
