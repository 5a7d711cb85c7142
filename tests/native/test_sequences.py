"""Operations on sequences: what is kept afterwards equals a plain cache that went through the same operations."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from xkv_gguf.runtime import native

from .conftest import Tiny
from .harness import Context, lib, open_context
from .state import save
from .test_full_rank import TOL_F32, TOL_FLASH, deviation

# flash attention never runs: batches are small enough for absorbed attention
N_BATCH = 8


@contextlib.contextmanager
def open_pair(one: Tiny, **kwargs: object) -> Iterator[tuple[Context, Context]]:
    """A plain f32 cache and an xkv cache of full rank."""
    with (
        open_context(one.model, flash_attn=False, **kwargs) as plain,
        open_context(one.model, xkv=one.bases().params(n_absorb=64), **kwargs) as xkv,
    ):
        yield plain, xkv


def check(plain: Context, xkv: Context, tokens: list[int], seq: int = 0) -> None:
    """Both continue a sequence alike."""
    assert deviation(xkv.feed(tokens, N_BATCH, seq), plain.feed(tokens, N_BATCH, seq)) <= TOL_F32


@pytest.mark.parametrize("keep", [250, 197, 131, 68, 67, 5, 4, 2, 0])
def test_remove_tail(keep: int, tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """Cut in the window, on a chunk's border, inside a chunk, at the sinks and at nothing; then go on."""
    with open_pair(tiny("llama")) as (plain, xkv):
        for ctx in (plain, xkv):
            ctx.feed(tokens[:270], N_BATCH)
            assert ctx.seq_rm(0, keep)
            assert lib.llama_memory_seq_pos_max(ctx.memory, 0) == keep - 1
        assert sum(native.seq_tokens(xkv.ptr, 0)) == keep
        check(plain, xkv, tokens[300:450])


def test_remove_tail_again_and_again(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """Cut chunks leave no holes behind: many regenerations fit into the context."""
    with open_pair(tiny("llama"), n_ctx=256) as (plain, xkv):
        for ctx in (plain, xkv):
            ctx.feed(tokens[:240], N_BATCH)
        for i in range(30):
            keep = 100 + (i * 7) % 30
            for ctx in (plain, xkv):
                assert ctx.seq_rm(0, keep)
            check(plain, xkv, tokens[i : i + 250 - keep])


def test_remove_inside(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """A hole over several chunks, the borders inside chunks."""
    with open_pair(tiny("llama")) as (plain, xkv):
        for ctx in (plain, xkv):
            ctx.feed(tokens[:270], N_BATCH)
            assert ctx.seq_rm(0, 50, 120)
        check(plain, xkv, tokens[300:400])


def test_clear_and_reuse(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    with open_pair(tiny("llama")) as (plain, xkv):
        for ctx in (plain, xkv):
            ctx.feed(tokens[:270], N_BATCH)
            lib.llama_memory_clear(ctx.memory, True)
            ctx.n_past.clear()
        assert native.seq_tokens(xkv.ptr, 0) == (0, 0)
        check(plain, xkv, tokens[100:400])


@pytest.mark.parametrize("unified", [False, True])
def test_sequences_do_not_mix(unified: bool, tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """Three sequences of different lengths, decoded together and apart, with many and with few queries."""
    with open_pair(tiny("llama"), n_ctx=1536, n_seq_max=3, unified=unified) as (plain, xkv):
        for seq in range(3):
            check(plain, xkv, tokens[100 * seq : 100 * seq + 150 + 60 * seq], seq)
        for i in range(0, 120, 2):
            parts = [(seq, tokens[i + 7 * seq : i + 7 * seq + 1]) for seq in range(3)]
            assert deviation(xkv.decode(*parts), plain.decode(*parts)) <= TOL_F32
        for ctx in (plain, xkv):
            assert ctx.seq_rm(1, 0)
        check(plain, xkv, tokens[40:200], 1)
        check(plain, xkv, tokens[0:50], 2)


@pytest.mark.parametrize("unified", [False, True])
def test_prompts_of_several_sequences_in_one_batch(
    unified: bool, tiny: Callable[[str], Tiny], tokens: list[int]
) -> None:
    """Materialized attention with several sequences: as close as the plain f16 cache with flash attention."""
    one = tiny("llama")
    shape = {"n_ctx": 1024, "n_seq_max": 2, "unified": unified}
    parts = [[(seq, tokens[i + 300 * seq : i + 300 * seq + 40]) for seq in range(2)] for i in range(0, 320, 40)]
    logits = []
    for kind in ({"flash_attn": False}, {"exact": False}, {"xkv": one.bases().params(n_absorb=0)}):
        with open_context(one.model, **shape, **kind) as ctx:
            logits.append(np.concatenate([ctx.decode(*part) for part in parts]))
    exact, flash, xkv = logits
    assert deviation(xkv, exact) <= TOL_FLASH * deviation(flash, exact) + TOL_F32


@pytest.mark.parametrize(("unified", "p1"), [(True, -1), (True, 150), (False, -1)])
def test_copy_sequence(unified: bool, p1: int, tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """A shared prefix, cut inside a chunk where sequences share cells, then two continuations."""
    with open_pair(tiny("llama"), n_ctx=1024, n_seq_max=2, unified=unified) as (plain, xkv):
        for ctx in (plain, xkv):
            ctx.feed(tokens[:250], N_BATCH)
            lib.llama_memory_seq_cp(ctx.memory, 0, 1, 0 if p1 > 0 else -1, p1)
            ctx.n_past[1] = p1 if p1 > 0 else 250
        check(plain, xkv, tokens[300:400], 1)
        check(plain, xkv, tokens[500:600], 0)
        for ctx in (plain, xkv):
            assert ctx.seq_rm(0, 0)
        check(plain, xkv, tokens[600:700], 1)


@pytest.mark.parametrize(("p0", "p1"), [(0, 150), (70, 150), (130, -1), (60, 61), (230, 245)])
def test_copy_a_part_between_streams(p0: int, p1: int, tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """llama.cpp's own copies whole streams, so that the rest is removed from the copy."""
    with open_pair(tiny("llama"), n_ctx=1024, n_seq_max=2) as (plain, xkv):
        for ctx in (plain, xkv):
            ctx.feed(tokens[:250], N_BATCH)
        lib.llama_memory_seq_cp(xkv.memory, 0, 1, p0, p1)
        lib.llama_memory_seq_cp(plain.memory, 0, 1, -1, -1)
        assert plain.seq_rm(1, 0, p0) or p0 == 0
        assert p1 < 0 or plain.seq_rm(1, p1)
        assert sum(native.seq_tokens(xkv.ptr, 1)) == (250 if p1 < 0 else p1) - p0
        for ctx in (plain, xkv):
            ctx.n_past[1] = 250 if p1 < 0 else p1
        check(plain, xkv, tokens[300:400], 1)
        check(plain, xkv, tokens[500:600], 0)


def test_a_part_into_a_stream_with_tokens(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """Bases and coefficients of two streams do not mix: refused in one line, until the cache is cleared."""
    one = tiny("llama")
    with open_context(one.model, n_ctx=1024, n_seq_max=2, xkv=one.bases().params()) as ctx:
        ctx.feed(tokens[:200], N_BATCH)
        ctx.feed(tokens[:20], N_BATCH, 1)
        lib.llama_memory_seq_cp(ctx.memory, 0, 1, 50, 100)
        assert "a part can be copied into an empty stream only" in str(native.take_refusal(ctx.ptr))
        with pytest.raises(AssertionError, match="llama_decode returned -2"):
            ctx.decode((0, tokens[:1]))


def test_copies_share_chunks(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """In one stream a copy takes no room in the store, a part of a chunk neither."""
    one = tiny("llama")
    with open_context(one.model, n_ctx=512, n_seq_max=2, unified=True, xkv=one.bases().params()) as ctx:
        ctx.feed(tokens[:400], N_BATCH)
        lib.llama_memory_seq_cp(ctx.memory, 0, 1, 0, 170)
        assert sum(native.seq_tokens(ctx.ptr, 1)) == 170
        ctx.n_past[1] = 170
        ctx.feed(tokens[400:512], N_BATCH, 1)  # the context holds 512 tokens


@pytest.mark.parametrize("unified", [False, True])
def test_keep_one_sequence(unified: bool, tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """All tokens of others are removed, of other streams too, as llama.h says; llama.cpp's own keeps those."""
    with open_pair(tiny("llama"), n_ctx=1536, n_seq_max=3, unified=unified) as (plain, xkv):
        for ctx in (plain, xkv):
            for seq in range(3):
                ctx.feed(tokens[100 * seq : 100 * seq + 200], N_BATCH, seq)
            lib.llama_memory_seq_keep(ctx.memory, 1)
            for seq in (0, 2):
                assert ctx is plain or native.seq_tokens(xkv.ptr, seq) == (0, 0)
                assert ctx.seq_rm(seq, 0)
        for seq in range(3):
            check(plain, xkv, tokens[400:500], seq)


@pytest.mark.parametrize("n_draft", [1, 4, 8])
def test_a_draft_is_rolled_back(n_draft: int, tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """Of tokens that are in the window nothing has to be made anew: the cache is as it was, to the last bit."""
    one = tiny("llama")
    with open_context(one.model, xkv=one.bases().params(type_coef="q8_0")) as ctx:
        ctx.feed(tokens[:200], N_BATCH)
        before = save(ctx, 0)
        for _ in range(3):
            ctx.decode((0, tokens[:n_draft]))
            assert save(ctx, 0) != before
            assert ctx.seq_rm(0, 200)
            assert save(ctx, 0) == before


def test_full_context(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """The context holds n_ctx tokens, and says so when one more is asked for."""
    with open_pair(tiny("llama"), n_ctx=512) as (plain, xkv):
        check(plain, xkv, tokens[:512])
        with pytest.raises(AssertionError, match="llama_decode returned 1"):
            xkv.decode((0, tokens[:1]))


def test_idle_sequence_leaves_room(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """In a unified cache, full micro-batches of one sequence do not crowd out those of another."""
    one = tiny("llama")
    shape = {"n_ctx": 1536, "n_seq_max": 3, "unified": True, "n_ubatch": 512}
    logits = []
    for kind in ({"flash_attn": False}, {"exact": False}, {"xkv": one.bases().params()}):
        with open_context(one.model, **shape, **kind) as ctx:
            parts = [ctx.decode((seq, tokens[100 * seq : 100 * seq + 500])) for seq in range(3)]
            logits.append(np.concatenate([*parts, ctx.decode((0, tokens[:5]))]))
    exact, flash, xkv = logits
    assert deviation(xkv, exact) <= TOL_FLASH * deviation(flash, exact) + TOL_F32


@pytest.mark.parametrize("cut", [0, 1])
def test_copy_then_cut(cut: int, tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """A copy between streams is done when it is asked for: a cut inside a chunk right after it holds."""
    with open_pair(tiny("llama"), n_ctx=1024, n_seq_max=2) as (plain, xkv):
        for ctx in (plain, xkv):
            ctx.feed(tokens[:250], N_BATCH)
            lib.llama_memory_seq_cp(ctx.memory, 0, 1, -1, -1)
            ctx.n_past[1] = 250
            assert ctx.seq_rm(cut, 130)
        for seq in range(2):
            check(plain, xkv, tokens[300 + seq : 400], seq)


def test_sequence_that_does_not_exist(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    one = tiny("llama")
    with open_context(one.model, n_ctx=1024, n_seq_max=2, unified=True, xkv=one.bases().params()) as ctx:
        with pytest.raises(AssertionError, match="llama_decode returned -"):
            ctx.decode((2, tokens[:3]))
        assert not ctx.seq_rm(2, 0)
        ctx.decode((1, tokens[:3]))


@pytest.mark.parametrize("flushed", [8, 120])
@pytest.mark.parametrize("p1", [50, 100])
def test_copy_over_an_earlier_copy(p1: int, flushed: int, tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """A part first, cut inside a chunk, then more: no token is there twice, in the window or in a chunk of its own."""
    with open_pair(tiny("llama"), n_ctx=1024, n_seq_max=2, unified=True) as (plain, xkv):
        for ctx in (plain, xkv):
            ctx.feed(tokens[:200], N_BATCH)
            lib.llama_memory_seq_cp(ctx.memory, 0, 1, 0, p1)
            ctx.feed(tokens[200 : 200 + flushed], N_BATCH)
            lib.llama_memory_seq_cp(ctx.memory, 0, 1, -1, -1)
            ctx.n_past[1] = 200 + flushed
        assert sum(native.seq_tokens(xkv.ptr, 1)) == 200 + flushed
        for seq in range(2):
            check(plain, xkv, tokens[400 + seq : 450], seq)
