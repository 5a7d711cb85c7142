"""The plain stage of a store: K and V as they are, before there are too many for that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from xkv_gguf.runtime import native

from .conftest import Tiny
from .harness import GGML_Q8_0, open_context
from .test_full_rank import TOL_F32, deviation
from .test_segments import error
from .test_stages import FULL, N_CTX, params
from .tiny_models import N_LAYER

# of random directions: at least the bytes of the plain stage, and so far off that no test passes by it
LOW = ((128, "f32"),)


@pytest.mark.parametrize(("n_batch", "fused"), [(1, True), (1, False), (4, False), (64, True)])
def test_plain_stage_is_a_q8_0_cache(n_batch: int, fused: bool, tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """With every path of attention: as far from f32 as a q8_0 cache is, and then from its tokens to low rank."""
    one = tiny("llama")
    bases = one.bases(4, 64)
    given = params(bases, ((128, "q8_0"),), {512: "q8_0"}, online=True, fused=fused)
    found = []
    for kind in ({"flash_attn": False}, {"window": GGML_Q8_0}, {"xkv": given}):
        with open_context(one.model, n_ctx=N_CTX, **kind) as ctx:
            rows = [ctx.feed(tokens[:300], 100), ctx.feed(tokens[300:364], n_batch)]
            if "xkv" in kind:
                assert native.seq_tokens(ctx.ptr, 0)[1] > 200
                assert native.online_info(ctx.ptr, 0).n_check == 0
            rows.append(ctx.feed(tokens[364:800], 100)[-50:])
            found.append(rows)
    plain, q8_0, xkv = found
    assert error(xkv[1], plain[1]) <= 1.5 * error(q8_0[1], plain[1])
    assert error(xkv[2], plain[2]) <= 3 * error(q8_0[2], plain[2])


def few_queries(one: Tiny, xkv: native.ScopeParams | None, tokens: list[int], n_threads: int = 1) -> np.ndarray:
    """Logits of single tokens and of batches of 4, after a prompt most of which is stored."""
    with open_context(one.model, n_ctx=N_CTX, xkv=xkv, flash_attn=xkv is not None, n_threads=n_threads) as ctx:
        ctx.feed(tokens[:220], 8)
        found = np.concatenate([ctx.feed(tokens[220:244], 1), ctx.feed(tokens[244:284], 4)])
        if xkv:
            assert 120 < native.seq_tokens(ctx.ptr, 0)[1] < 256
    return found


@pytest.mark.parametrize(("types", "n_update"), [(((128, "q2_0"),), 0), (((32, "q8_0"),), 0), (((64, "q8_0"),), 1)])
def test_new_bases_only_where_more_is_lost_than_expected(
    types: tuple[tuple[int, str], ...], n_update: int, tiny: Callable[[str], Tiny], tokens: list[int]
) -> None:
    """All directions in 2 bits lose as much of any text; of random ones, half lose more than their spectrum says."""
    one = tiny("llama")
    given = params(one.bases(4, 64), types, {256: "q8_0"}, online=True)
    with open_context(one.model, n_ctx=N_CTX, xkv=given) as ctx:
        ctx.feed(tokens[:600], 8)
        info = native.online_info(ctx.ptr, 0)
    assert info.n_check == 1
    assert info.n_update == n_update
    assert (info.residual > 1.15 * info.expected) == bool(n_update)


def test_some_bases_are_new_and_others_stay(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """K in all directions keeps its basis, half the directions of V don't fit and are renewed."""
    one = tiny("llama")
    bases = one.bases(4, 64)
    parts = {kind: bases.params(types=types).segments for kind, types in (("k", FULL), ("v", ((64, "q8_0"),)))}
    segments = tuple(s for kind, some in parts.items() for s in some if s.kind == kind)
    with open_context(one.model, n_ctx=N_CTX, flash_attn=False) as ctx:
        plain = ctx.feed(tokens[:700], 8)[600:]
    errors = []
    for online in (False, True):
        given = replace(params(bases, FULL, {256: "q8_0"}, online=online), segments=segments)
        with open_context(one.model, n_ctx=N_CTX, xkv=given) as ctx:
            errors.append(error(ctx.feed(tokens[:700], 8)[600:], plain))
            assert native.online_info(ctx.ptr, 0).n_update == int(online)
    assert 0 < errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("type_name", ["f32", "q8_0"])
@pytest.mark.parametrize("name", ["llama-gqa", "minicpm3"])
def test_fused_equal_stock_ops(
    name: str, type_name: str, n_threads: int, tiny: Callable[[str], Tiny], tokens: list[int]
) -> None:
    """With several KV heads, queries that share them, and heads of V that are smaller than those of K."""
    one = tiny(name)
    bases = one.bases(4, 32)
    plain = few_queries(one, None, tokens)
    found, expected = (
        few_queries(one, params(bases, LOW, {256: type_name}, fused=fused), tokens, n_threads)
        for fused in (True, False)
    )
    if type_name == "f32":
        assert deviation(found, expected) <= TOL_F32
        assert deviation(found, plain) <= TOL_F32
    else:
        assert 0 < error(found, plain) <= 1.2 * error(expected, plain) + 1e-3


def test_fused_ops_are_used(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    one = tiny("llama-gqa")
    counts = {}
    for fused in (True, False):
        nodes: list[int] = []
        given = params(one.bases(4, 32), LOW, {256: "q8_0"}, fused=fused)
        with open_context(one.model, n_ctx=N_CTX, xkv=given, on_node=lambda nodes=nodes: nodes.append(0)) as ctx:
            ctx.feed(tokens[:200], 8)
            nodes.clear()
            ctx.decode((0, tokens[:1]))
        counts[fused] = len(nodes)
    assert counts[True] + 12 * N_LAYER < counts[False]


def test_restores_from_a_plain_stage(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """Removing the last tokens brings the chunk that is cut back to the window."""
    one = tiny("llama")
    given = params(one.bases(4, 64), FULL, {512: "f32"})
    with open_context(one.model, n_ctx=N_CTX, xkv=given) as ctx:
        first = ctx.feed(tokens[:400], 8)
        assert ctx.seq_rm(0, 130)
        again = ctx.feed(tokens[130:400], 8)
    np.testing.assert_allclose(again, first[130:], atol=TOL_F32)


def test_heads_that_are_no_multiples_of_32(tiny: Callable[[str], Tiny]) -> None:
    one = tiny("llama-heads-of-20")
    with (
        pytest.raises(AssertionError, match="heads of layer 0 have 20 numbers of K and 20 of V"),
        open_context(one.model, n_ctx=N_CTX, xkv=params(one.bases(), ((40, "f32"),), {512: "f32"})),
    ):
        pass
