"""Numbers hidden in a 6000-token document: xkv finds them wherever f16 does.

One at each end by default, and ten depths one by one with --all-depths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from xkv_gguf import Llama
from xkv_gguf.lab.haystack import Haystack, build_haystack, make_needle
from xkv_gguf.runtime.threads import default_threads

pytestmark = [pytest.mark.model, pytest.mark.slow]

N_CTX = 8192
N_DOCUMENT = 6000
DEPTHS = [0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95]
QUICK_DEPTHS = (0.05, 0.95)
TEXT_SEED = 21


def open_model(path: Path, kv_mode: str, **kwargs: Any) -> Llama:
    threads = min(4, default_threads())
    settings = {"n_ctx": N_CTX, "n_threads": threads, "n_threads_batch": threads, "verbose": False, **kwargs}
    return Llama(path, kv_mode=kv_mode, **settings)


@pytest.fixture(scope="module")
def xkv(demo_model: Path, sidecar: Path) -> Iterator[Llama]:
    """The model on an xkv cache with default settings."""
    llm = open_model(demo_model, "xkv", xkv={"sidecar": str(sidecar)})
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def f16(demo_model: Path) -> Iterator[Llama]:
    llm = open_model(demo_model, "f16")
    yield llm
    llm.close()


def document(llm: Llama, depths: Sequence[float]) -> Haystack:
    def count(text: str) -> int:
        return len(llm.tokenize(text.encode(), add_bos=False))

    needles = [make_needle(round(100 * depth)) for depth in depths]
    return build_haystack(count, N_DOCUMENT, needles, depths, TEXT_SEED)


def answers(llm: Llama, hay: Haystack) -> list[str]:
    """What is said to the question about each needle; the document is read once."""
    # a prefix kept from the document before would have been compressed in other blocks
    llm.reset()
    llm._ctx.kv_cache_clear()
    found = []
    for i in range(len(hay.needles)):
        message = {"role": "user", "content": hay.prompt(i)}
        reply = llm.create_chat_completion([message], temperature=0.0, max_tokens=32)
        found.append(str(reply["choices"][0]["message"]["content"]))
    return found


@pytest.mark.parametrize("depths", [QUICK_DEPTHS, *((depth,) for depth in DEPTHS)], ids=str)
def test_xkv_finds_what_f16_finds(depths: tuple[float, ...], xkv: Llama, request: pytest.FixtureRequest) -> None:
    if depths != QUICK_DEPTHS and not request.config.getoption("--all-depths"):
        pytest.skip("only with --all-depths")
    hay = document(xkv, depths)
    assert 0.95 * N_DOCUMENT < hay.n_tokens < 1.05 * N_DOCUMENT
    said = answers(xkv, hay)
    missed = [i for i, needle in enumerate(hay.needles) if not needle.found_in(said[i])]
    if not missed:
        return
    # f16 is asked only where it matters
    plain = answers(request.getfixturevalue("f16"), hay)
    for i in missed:
        needle = hay.needles[i]
        assert not needle.found_in(plain[i]), (
            f"{depths[i]}: f16 says {plain[i]!r}, xkv {said[i]!r}, not {needle.answer}"
        )
    pytest.skip(f"depths {[depths[i] for i in missed]}: f16 does not find them either")
