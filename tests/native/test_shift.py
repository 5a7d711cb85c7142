"""Positions that are shifted or divided, at full rank: equal to a plain f32 cache that went through the same."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from xkv_gguf.runtime import native

from .conftest import Tiny
from .harness import GGML_Q8_0, Context, lib, open_context
from .state import load, save
from .test_full_rank import TOL_F32, deviation
from .test_segments import error
from .test_sequences import N_BATCH, check, open_pair
from .test_stages import params

FULL = ((128, "f32"),)

# llama.cpp's shift of K multiplies by YaRN's magnitude once more each time, and the plain cache is no reference
SHIFTED = ("llama", "llama-gqa", "llama3-factors", "qwen2", "qwen3", "stablelm", "gpt2", "minicpm3", "deepseek2")


def add(ctx: Context, p0: int, p1: int, shift: int, seq: int = 0) -> None:
    lib.llama_memory_seq_add(ctx.memory, seq, p0, p1, shift)
    settle_past(ctx, seq)


def settle_past(ctx: Context, seq: int = 0) -> None:
    """The next token follows the last one."""
    ctx.n_past[seq] = lib.llama_memory_seq_pos_max(ctx.memory, seq) + 1


def discard(ctx: Context, n_keep: int, n_discard: int, seq: int = 0) -> None:
    """What llama.cpp's programs do at a full context."""
    assert ctx.seq_rm(seq, n_keep, n_keep + n_discard)
    add(ctx, n_keep + n_discard, -1, -n_discard, seq)


def divide(ctx: Context, p0: int, p1: int, d: int) -> None:
    """Positions over d: llama.cpp's own turns K the wrong way, so that a plain cache is shifted token by token."""
    if native.is_xkv(ctx.ptr):
        lib.llama_memory_seq_div(ctx.memory, 0, p0, p1, d)
    else:
        for p in range(p0, ctx.n_past[0] if p1 < 0 else p1):
            lib.llama_memory_seq_add(ctx.memory, 0, p, p + 1, p // d - p)
    settle_past(ctx)


@contextlib.contextmanager
def open_pair_with(one: Tiny, given: native.ScopeParams, **kwargs: object) -> Iterator[tuple[Context, Context]]:
    with (
        open_context(one.model, flash_attn=False, **kwargs) as plain,
        open_context(one.model, xkv=given, **kwargs) as xkv,
    ):
        yield plain, xkv


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("p0", "p1", "shift"),
    [(4, -1, 7), (0, -1, 100), (100, -1, -1), (100, 180, -30), (68, 132, 5), (260, -1, 3), (0, -1, -50), (30, 90, -40)],
)
def test_shift(p0: int, p1: int, shift: int, fused: bool, tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """Whole chunks, cut ones, the window, tokens that fall below 0, and tokens that meet others."""
    one = tiny("llama")
    with open_pair_with(one, one.bases().params(n_absorb=64, fused=fused)) as (plain, xkv):
        for ctx in (plain, xkv):
            ctx.feed(tokens[:270], N_BATCH)
            if shift < 0 and p0 > 0:
                assert ctx.seq_rm(0, max(p0 + shift, 0), p0)
            add(ctx, p0, p1, shift)
        for of in (lib.llama_memory_seq_pos_min, lib.llama_memory_seq_pos_max):
            assert of(xkv.memory, 0) == of(plain.memory, 0)
        check(plain, xkv, tokens[300:400])


@pytest.mark.parametrize("name", SHIFTED)
def test_shift_of_each_kind(name: str, tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    one = tiny(name)
    with open_pair(one) as (plain, xkv):
        for ctx in (plain, xkv):
            assert lib.llama_memory_can_shift(ctx.memory)
            ctx.feed(tokens[:270], N_BATCH)
            discard(ctx, 20, 90)
        check(plain, xkv, tokens[300:400])


@pytest.mark.parametrize("name", ["llama-yarn", "deepseek2-yarn"])
def test_shift_keeps_the_magnitude(name: str, tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """All positions later by the same: RoPE sees distances only, also where YaRN scales keys."""
    one = tiny(name)
    found = []
    for shift in (0, 50):
        with open_context(one.model, n_ctx=1024, xkv=one.bases().params(n_absorb=64)) as ctx:
            ctx.feed(tokens[:270], N_BATCH)
            for _ in range(shift // 10):
                add(ctx, 0, -1, 10)
            found.append(ctx.feed(tokens[300:340], N_BATCH))
    assert deviation(found[1], found[0]) <= TOL_F32


def test_shift_takes_no_graph_where_chunks_are_whole(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """A chunk is moved by its position: shifted and taken back, a store of few bits gives the same logits."""
    one = tiny("llama")
    with open_context(one.model, xkv=one.bases(4, 32).params(rank=32, type_coef="q4_0")) as ctx:
        ctx.feed(tokens[:270], N_BATCH)
        first = ctx.decode((0, tokens[:1]))
        assert ctx.seq_rm(0, 270)
        for _ in range(10):
            add(ctx, 0, -1, 1000)
            add(ctx, 0, -1, -1000)
        np.testing.assert_allclose(ctx.decode((0, tokens[:1])), first, atol=1e-3 * np.abs(first).max())


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("n_keep", [0, 4, 100])
@pytest.mark.parametrize("stages", [False, True])
def test_full_context_again_and_again(
    n_keep: int, fused: bool, stages: bool, tiny: Callable[[str], Tiny], tokens: list[int]
) -> None:
    """Ten times n_ctx tokens through one context, three times with stock ops."""
    one = tiny("llama")
    n_ctx = 512
    n_token = (10 if fused else 3) * n_ctx
    given = (
        params(one.bases(2, 32), ((64, "f32"),), {256: "f32"}, online=True, fused=fused)
        if stages
        else one.bases(2, 32).params(n_absorb=64, fused=fused)
    )
    text = [int(t) for t in np.random.default_rng(2).integers(0, max(tokens), n_token)]
    with open_pair_with(one, given, n_ctx=n_ctx) as (plain, xkv):
        for i in range(0, len(text), 64):
            part = text[i : i + 64]
            for ctx in (plain, xkv):
                if ctx.n_past.get(0, 0) + len(part) > n_ctx:
                    discard(ctx, n_keep, (ctx.n_past[0] - n_keep) // 2)
            check(plain, xkv, part)


def test_bases_follow_a_context_that_shifts(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """What bases were made for is gone after a while: they are looked at again, although there are no more tokens."""
    one = tiny("llama")
    given = one.bases(4, 32).params(rank=64, type_coef="q8_0", online=True, n_prior=300)
    with open_context(one.model, n_ctx=512, xkv=given) as ctx:
        n_check = []
        for i in range(0, 4096, 8):
            if ctx.n_past.get(0, 0) + 8 > 512:
                discard(ctx, 4, 254)
                n_check.append(native.online_info(ctx.ptr, 0).n_check)
            ctx.feed(tokens[i % 900 : i % 900 + 8], N_BATCH)
    assert n_check[-1] >= n_check[0] + 3 and n_check[-1] <= len(n_check) + 3


def test_one_token_at_a_time(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """A context that stays full: each token takes the place of the oldest one."""
    with open_pair(tiny("llama"), n_ctx=256) as (plain, xkv):
        check(plain, xkv, tokens[:256])
        for token in tokens[256:600]:
            for ctx in (plain, xkv):
                discard(ctx, 4, 1)
            assert deviation(xkv.decode((0, [token])), plain.decode((0, [token]))) <= TOL_F32


@pytest.mark.parametrize("d", [2, 3])
@pytest.mark.parametrize(("p0", "p1"), [(0, -1), (50, 200), (68, 132), (250, -1)])
def test_divide(p0: int, p1: int, d: int, tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    with open_pair(tiny("llama")) as (plain, xkv):
        for ctx in (plain, xkv):
            ctx.feed(tokens[:270], N_BATCH)
            divide(ctx, p0, p1, d)
        assert xkv.n_past == plain.n_past
        check(plain, xkv, tokens[300:400])


def test_self_extend(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """Group attention as llama.cpp's programs have it: positions of groups are divided as the text goes on."""
    n, w = 4, 64
    with open_pair(tiny("llama")) as (plain, xkv):
        done = 0
        for i in range(0, 400, N_BATCH):
            check(plain, xkv, tokens[i : i + N_BATCH])
            while plain.n_past[0] >= done + w:
                ib = n * done // w
                bd = w // n * (n - 1)
                dd = w // n - ib * bd - w
                for ctx in (plain, xkv):
                    past = ctx.n_past[0]
                    add(ctx, done, past, ib * bd)
                    divide(ctx, done + ib * bd, done + ib * bd + w, n)
                    add(ctx, done + ib * bd + w, past + ib * bd, dd)
                done += w // n
        assert xkv.n_past == plain.n_past


def test_many_holes(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """Any number of holes, with a window without room; then the context is filled, for which chunks are packed."""
    with open_pair(tiny("llama"), n_ctx=512) as (plain, xkv):
        for ctx in (plain, xkv):
            ctx.feed(tokens[:500], N_BATCH)
        rng = np.random.default_rng(3)
        for _ in range(60):
            p0 = int(rng.integers(0, 440))
            for ctx in (plain, xkv):
                assert ctx.seq_rm(0, p0, p0 + 3)
        for of in (lib.llama_memory_seq_pos_min, lib.llama_memory_seq_pos_max):
            assert of(xkv.memory, 0) == of(plain.memory, 0)
        left = sum(native.seq_tokens(xkv.ptr, 0))
        assert left < 400
        check(plain, xkv, tokens[: 512 - left])
        assert native.seq_tokens(xkv.ptr, 0)[1] > 512 - 120


def test_shared_chunks(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """Holes and shifts where sequences share chunks: tokens of two sequences move for both, as in a plain cache."""
    with open_pair(tiny("llama"), n_ctx=1024, n_seq_max=2, unified=True) as (plain, xkv):
        for ctx in (plain, xkv):
            ctx.feed(tokens[:250], N_BATCH)
            lib.llama_memory_seq_cp(ctx.memory, 0, 1, 0, 190)
            ctx.n_past[1] = 190
        check(plain, xkv, tokens[300:380], 1)
        for p0 in (20, 60, 110, 150):
            for ctx in (plain, xkv):
                assert ctx.seq_rm(1, p0, p0 + 9)
        check(plain, xkv, tokens[380:400], 1)
        check(plain, xkv, tokens[400:450], 0)
        for ctx in (plain, xkv):
            add(ctx, 120, -1, 11)
            settle_past(ctx, 1)
        check(plain, xkv, tokens[500:550], 0)
        check(plain, xkv, tokens[550:600], 1)


def test_sinks_in_the_text_move(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    one = tiny("llama")
    given = one.bases().params(n_absorb=64, n_text_sink=8)
    with open_pair_with(one, given) as (plain, xkv):
        for ctx in (plain, xkv):
            ctx.feed(tokens[:400], N_BATCH)
            discard(ctx, 4, 150)
        check(plain, xkv, tokens[400:560])


def test_window_of_8_bits(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """A quantized window is turned as well: about as far off as without (llama.cpp's own crashes with heads of 32)."""
    one = tiny("llama")
    errors = []
    for shifted in (False, True):
        found = []
        for kind in ({"flash_attn": False}, {"xkv": one.bases().params(n_absorb=64), "window": GGML_Q8_0}):
            with open_context(one.model, **kind) as ctx:
                ctx.feed(tokens[:270], N_BATCH)
                if shifted:
                    discard(ctx, 4, 100)
                found.append(ctx.feed(tokens[300:340], N_BATCH))
        errors.append(error(found[1], found[0]))
    assert 0 < errors[1] <= 1.5 * errors[0]


@pytest.mark.parametrize("unified", [False, True])
def test_sequences_shift_on_their_own(unified: bool, tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    with open_pair(tiny("llama"), n_ctx=1024, n_seq_max=2, unified=unified) as (plain, xkv):
        for seq in range(2):
            check(plain, xkv, tokens[100 * seq : 100 * seq + 250], seq)
        for ctx in (plain, xkv):
            discard(ctx, 10, 100, 1)
        for seq in range(2):
            check(plain, xkv, tokens[500 + seq : 600], seq)


def test_a_shift_that_cannot_be(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """One line says why, and decoding does not go on as if it had worked."""
    one = tiny("llama")
    for call, given, why in (
        ("add", (5, 0, -1, 3), "seq_add of sequence 5, expected 0 to n_seq_max - 1 = 0"),
        ("add", (0, 0, -1, 2**30), "expected at most 1073741824 after it"),
        ("div", (0, 0, -1, 0), "seq_div of sequence 0 by 0, expected 1 or more"),
    ):
        with open_context(one.model, xkv=one.bases().params()) as ctx:
            ctx.feed(tokens[:200], N_BATCH)
            getattr(lib, f"llama_memory_seq_{call}")(ctx.memory, *given)
            assert why in str(native.take_refusal(ctx.ptr))
            with pytest.raises(AssertionError, match="llama_decode returned -2"):
                ctx.decode((0, tokens[:1]))
            lib.llama_memory_clear(ctx.memory, True)
            ctx.n_past.clear()
            ctx.decode((0, tokens[:1]))


def test_a_shift_before_the_first_batch(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """It waits for the context to be known, and is not saved before."""
    one = tiny("llama")
    given = one.bases().params(n_absorb=64)
    with open_context(one.model, xkv=given) as ctx:
        ctx.feed(tokens[:90], N_BATCH)
        state = save(ctx)
        add(ctx, 0, -1, 7)
        expected = ctx.feed(tokens[90:130], N_BATCH)
    with open_context(one.model, xkv=given) as ctx:
        assert load(ctx, state), native.last_error()
        add(ctx, 0, -1, 7)
        assert lib.llama_state_get_size(ctx.ptr) == 0
        assert "positions were shifted before the context's first batch" in native.last_error()
        native.attach(ctx.ptr)
        state = save(ctx)
    with open_context(one.model, xkv=given) as ctx:
        assert load(ctx, state), native.last_error()
        settle_past(ctx)
        assert deviation(ctx.feed(tokens[90:130], N_BATCH), expected) <= TOL_F32


def test_a_broken_cache_has_no_state(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    one = tiny("llama")
    with open_context(one.model, xkv=one.bases().params()) as ctx:
        ctx.feed(tokens[:90], N_BATCH)
        lib.llama_memory_seq_div(ctx.memory, 0, 0, -1, 0)
        native.clear_last_error()
        assert lib.llama_state_get_size(ctx.ptr) == 0
        assert "seq_div of sequence 0 by 0, expected 1 or more" in native.last_error()
        assert lib.llama_state_seq_get_size(ctx.ptr, 3) == 0
        assert "a state of sequence 3, expected below n_seq_max = 1" in native.last_error()


def test_positions_that_many_tokens_have(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """Of the tokens at the first positions those few stay that are sinks; the window has no room for all."""
    with open_pair(tiny("llama")) as (plain, xkv):
        for _ in range(3):
            for ctx in (plain, xkv):
                ctx.feed(tokens[:100], N_BATCH)
                divide(ctx, 0, -1, 100)
        assert xkv.n_past == plain.n_past
        check(plain, xkv, tokens[300:400])


def test_a_cut_without_room_changes_nothing(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """Parts of chunks whose positions overlap are not packed, however few tokens they have: the cache goes on."""
    one = tiny("llama")
    with open_context(one.model, n_ctx=512, n_seq_max=2, unified=True, xkv=one.bases().params()) as ctx:
        ctx.feed(tokens[:512], N_BATCH)
        add(ctx, 248, -1, -184)
        lib.llama_memory_seq_cp(ctx.memory, 0, 1, -1, -1)
        for p in range(64, 300, 4):
            before = [native.seq_tokens(ctx.ptr, seq) for seq in range(2)]
            if not ctx.seq_rm(1, p, p + 2):
                break
        else:
            pytest.fail("there is room for all parts")
        assert "chunks of the store are needed for parts of chunks" in str(native.take_refusal(ctx.ptr))
        assert [native.seq_tokens(ctx.ptr, seq) for seq in range(2)] == before
        assert native.take_refusal(ctx.ptr) is None
        assert ctx.seq_rm(1, 0) and ctx.seq_rm(0, 200)
        ctx.feed(tokens[:50], N_BATCH)
