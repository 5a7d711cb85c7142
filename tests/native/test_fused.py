"""Fused ops of the CPU against the stock ops that they replace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from xkv_gguf.runtime import native

from .conftest import Tiny
from .harness import GGML_F16, GGML_F32, GGML_Q8_0, open_context
from .test_full_rank import TOL_F32, deviation
from .test_segments import error
from .tiny_models import MODELS, N_LAYER

PROMPT = 200


def few_queries(one: Tiny, params: native.ScopeParams | None, tokens: list[int], **shape: object) -> np.ndarray:
    """Logits of single tokens and of batches of 8 and 3, after a prompt and before it is all in the store."""
    with open_context(one.model, xkv=params, flash_attn=params is not None, **shape) as ctx:
        ctx.feed(tokens[:PROMPT], 8)
        parts = [ctx.feed(tokens[PROMPT + i : PROMPT + i + 24], n) for i, n in ((0, 1), (24, 8), (48, 3))]
    return np.concatenate(parts)


def test_they_are_used(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """A layer of the CPU takes a fraction of the nodes, with and without stored tokens."""
    one = tiny("llama")
    counts = {}
    for fused in (True, False):
        nodes: list[int] = []
        params = one.bases(2, 32).params(fused=fused)
        with open_context(one.model, xkv=params, on_node=lambda nodes=nodes: nodes.append(0)) as ctx:
            ctx.feed(tokens[:200], 8)
            nodes.clear()
            ctx.decode((0, tokens[:1]))
        counts[fused] = len(nodes)
    assert counts[True] + 12 * N_LAYER < counts[False]


@pytest.mark.parametrize(("name", "n_threads"), [*((name, 1) for name in MODELS), ("llama", 3)])
def test_equal_stock_ops(name: str, n_threads: int, tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """In f32, at full and at low rank, and against the plain cache."""
    one = tiny(name)
    bases = one.bases(2, 32)
    plain = few_queries(one, None, tokens)
    assert deviation(few_queries(one, bases.params(), tokens, n_threads=n_threads), plain) <= TOL_F32
    found, expected = (
        few_queries(one, bases.params(rank=32, fused=fused), tokens, n_threads=n_threads) for fused in (True, False)
    )
    assert deviation(found, expected) <= TOL_F32


@pytest.mark.parametrize(
    "types",
    [
        *(((128, name),) for name in ("f16", "q8_0", "q5_0", "q4_0", "q2_0", "q1_0")),
        ((32, "f32"), (32, "q8_0"), (64, "q2_0")),
        ((32, "f16"), (32, "q8_0"), (32, "q5_0"), (32, "q4_0")),
    ],
)
def test_types(types: tuple[tuple[int, str], ...], tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """Both round queries to 8 bits, so that they are equally far from the plain cache."""
    one = tiny("llama")
    bases = one.bases(4, 128)
    plain = few_queries(one, None, tokens)
    found, expected = (few_queries(one, bases.params(types=types, fused=fused), tokens) for fused in (True, False))
    assert error(found, expected) < 0.5 * error(expected, plain) + 1e-3
    assert error(found, plain) < 1.2 * error(expected, plain) + 1e-3


def test_each_layer_has_its_lead(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """With a tolerance of 1 nothing but the lead counts."""
    one = tiny("llama")
    params = replace(one.bases(2, 32).params(), tolerance=1.0)

    def run(lead: int, *leads: int) -> np.ndarray:
        return few_queries(one, replace(params, n_lead=lead, leads=leads), tokens)

    short, long = run(32), run(64)
    assert not np.array_equal(short, long)
    np.testing.assert_array_equal(run(32, *(64,) * N_LAYER), long)
    mixed = run(32, 64)
    assert not np.array_equal(mixed, short) and not np.array_equal(mixed, long)


@pytest.mark.parametrize("window", [GGML_F32, GGML_F16, GGML_Q8_0])
def test_windows(window: int, tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """Stock ops round queries to the window's type, the fused ones do not."""
    one = tiny("llama")
    plain = few_queries(one, None, tokens)
    found, expected = (
        few_queries(one, one.bases(2, 32).params(fused=fused), tokens, window=window) for fused in (True, False)
    )
    assert error(found, plain) < 1.2 * error(expected, plain) + 1e-3


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("unified", [False, True])
def test_sequences(online: bool, unified: bool, tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """Sequences of different lengths, one without stored tokens, with bases of their own, and after a removal."""
    one = tiny("llama")
    found = []
    for fused in (True, False):
        params = one.bases(4, 32).params(rank=32, online=online, fused=fused, n_prior=100)
        with open_context(one.model, n_ctx=1536, n_seq_max=3, unified=unified, xkv=params, n_threads=2) as ctx:
            for seq, n in enumerate((300, 20, 170)):
                ctx.feed(tokens[100 * seq : 100 * seq + n], 8, seq)
            assert (native.online_info(ctx.ptr, 0).n_update > 0) == online
            logits = [ctx.decode(*((s, tokens[9 * i + s :][:1]) for s in range(3))) for i in range(8)]
            assert ctx.seq_rm(0, 100)
            logits += [ctx.decode(*((s, tokens[9 * i + s :][:1]) for s in range(3))) for i in range(8)]
        found.append(np.concatenate(logits))
    # adapted bases differ by what rounding does to eigenvectors of variances that are nearly the same
    assert deviation(*found) <= (5 if online else 1) * TOL_F32
