"""States in caches of another n_ctx, stage, plan or window: exact at full rank, refused where they do not fit."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from xkv_gguf.runtime import native

from .conftest import Tiny
from .harness import GGML_F16, lib, open_context
from .sidecars import Bases
from .state import load, save
from .test_full_rank import TOL_F32, TOL_FLASH, deviation
from .test_segments import error
from .test_stages import params

N_TOKEN = 600
KINDS: dict[str, dict[str, bool]] = {
    "static": {},
    "online": {"online": True},
    "cold": {"online": True, "calibrated": False},
    "stock": {"fused": False},
}
FULL = ((128, "f32"),)
# n_ctx and stages: where 600 tokens are plain, in a stage with bases, in the last one
PLACES: dict[str, tuple[int, dict[int, Any]]] = {
    "plain": (2048, {1024: "f32"}),
    "stage": (2048, {256: "f32", 768: ((64, "f32"), (64, "f16"))}),
    "last": (1024, {256: "f32", 512: FULL}),
    "only": (768, {}),
}


def cache(bases: Bases, place: str, how: str, types: Any = FULL) -> dict[str, Any]:
    n_ctx, stages = PLACES[place]
    return {"n_ctx": n_ctx, "xkv": params(bases, types, stages, **KINDS[how])}


def plain_logits(one: Tiny, tokens: list[int]) -> tuple[Any, Any]:
    """Of what follows: an f32 cache without flash attention, and one with it, whose error is what a cache may have."""
    found = []
    for kind in ({"flash_attn": False}, {"exact": False}):
        with open_context(one.model, n_ctx=1024, **kind) as ctx:
            ctx.feed(tokens[:N_TOKEN], 50)
            found.append(ctx.feed(tokens[N_TOKEN : N_TOKEN + 120], 8))
    return found[0], found[1]


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize("source", PLACES)
def test_full_rank(source: str, how: str, tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """The invariant after a move, from every stage into every other one, with what follows going on to be stored."""
    one = tiny("llama")
    bases = one.bases(4, 64)
    expected, flash = plain_logits(one, tokens)
    with open_context(one.model, **cache(bases, source, how)) as ctx:
        ctx.feed(tokens[:N_TOKEN], 50)
        assert native.seq_tokens(ctx.ptr, 0)[1] > 400
        state = save(ctx)
    for target in PLACES.keys() - {source}:
        with open_context(one.model, **cache(bases, target, how)) as ctx:
            native.attach(ctx.ptr)
            assert load(ctx, state), native.last_error()
            ctx.n_past[0] = N_TOKEN
            found = ctx.feed(tokens[N_TOKEN : N_TOKEN + 120], 8)
            assert sum(native.seq_tokens(ctx.ptr, 0)) == N_TOKEN + 120
            assert deviation(found, expected) <= TOL_FLASH * deviation(flash, expected) + TOL_F32, target


@pytest.mark.parametrize(("source", "target"), [(True, False), (False, True)])
@pytest.mark.parametrize("place", PLACES)
def test_between_the_op_and_stock_ops(
    place: str, source: bool, target: bool, tiny: Callable[[str], Tiny], tokens: list[int]
) -> None:
    """Packed coefficients and those of stock ops are of the same numbers."""
    one = tiny("llama")
    bases = one.bases(4, 64)
    n_ctx, stages = PLACES[place]
    expected, flash = plain_logits(one, tokens)
    kinds = [{"n_ctx": n_ctx, "xkv": params(bases, FULL, stages, fused=fused)} for fused in (source, target)]
    with open_context(one.model, **kinds[0]) as ctx:
        ctx.feed(tokens[:N_TOKEN], 50)
        state = save(ctx)
    with open_context(one.model, **kinds[1]) as ctx:
        native.attach(ctx.ptr)
        assert load(ctx, state), native.last_error()
        ctx.n_past[0] = N_TOKEN
        found = ctx.feed(tokens[N_TOKEN : N_TOKEN + 120], 8)
    assert deviation(found, expected) <= TOL_FLASH * deviation(flash, expected) + TOL_F32


@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("how", ["static", "online"])
def test_one_sequence_beside_another(how: str, unified: bool, tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """Into another sequence, whose stream others use with bases of their own that have moved on, or not."""
    one = tiny("llama")
    bases = one.bases(4, 64)
    expected, flash = plain_logits(one, tokens)
    with open_context(one.model, **cache(bases, "last", how)) as ctx:
        ctx.feed(tokens[:N_TOKEN], 50)
        state = save(ctx, 0)
    kind: Any = {"n_seq_max": 2, "unified": unified, "xkv": cache(bases, "plain", how)["xkv"]}
    with open_context(one.model, n_ctx=2048 if unified else 4096, **kind) as ctx:
        ctx.feed(tokens[:N_TOKEN], 50)
        assert load(ctx, state, 1), native.last_error()
        assert [sum(native.seq_tokens(ctx.ptr, seq)) for seq in (0, 1)] == [N_TOKEN, N_TOKEN]
        ctx.n_past[1] = N_TOKEN
        for seq in (1, 0):
            found = ctx.feed(tokens[N_TOKEN : N_TOKEN + 120], 8, seq=seq)
            assert deviation(found, expected) <= TOL_FLASH * deviation(flash, expected) + TOL_F32


def test_a_window_with_less_room(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """Exact tokens that have no room leave for the store, as they would have; rows take the window's type."""
    one = tiny("llama")
    bases = one.bases(4, 64)
    expected, flash = plain_logits(one, tokens)
    kind = cache(bases, "last", "online")
    with open_context(one.model, n_ubatch=512, **kind) as ctx:
        ctx.feed(tokens[:N_TOKEN], 400)
        n_exact = native.seq_tokens(ctx.ptr, 0)[0]
        state = save(ctx)
    with open_context(one.model, n_ubatch=32, **kind) as ctx:
        assert n_exact > 32 + 4 + 40 + 64
        assert not load(ctx, state)
        assert f"{n_exact} exact tokens, the window has room for" in native.last_error()
        assert "xkv_attach" in native.last_error()
        native.attach(ctx.ptr)
        assert load(ctx, state), native.last_error()
        assert sum(native.seq_tokens(ctx.ptr, 0)) == N_TOKEN
        ctx.n_past[0] = N_TOKEN
        found = ctx.feed(tokens[N_TOKEN : N_TOKEN + 120], 8)
    assert deviation(found, expected) <= TOL_FLASH * deviation(flash, expected) + TOL_F32
    with open_context(one.model, window=GGML_F16, **kind) as ctx:
        native.attach(ctx.ptr)
        assert load(ctx, state), native.last_error()
        ctx.n_past[0] = N_TOKEN
        found = ctx.feed(tokens[N_TOKEN : N_TOKEN + 120], 8)
    assert deviation(found, expected) <= 2 * deviation(flash, expected)


@pytest.mark.parametrize("n_token", [300, 512, 700, 1024])
def test_a_full_context_in_a_window_with_less_room(
    n_token: int, tiny: Callable[[str], Tiny], tokens: list[int]
) -> None:
    """The store has room for all that leaves."""
    one = tiny("llama")
    kind = {**cache(one.bases(4, 64), "only", "static"), "n_ctx": n_token}
    with open_context(one.model, n_ubatch=n_token // 2, **kind) as ctx:
        ctx.feed((tokens * 2)[:n_token], n_token // 2)
        state = save(ctx)
    with open_context(one.model, n_ubatch=32, **kind) as ctx:
        native.attach(ctx.ptr)
        assert load(ctx, state), native.last_error()
        assert sum(native.seq_tokens(ctx.ptr, 0)) == n_token


@pytest.mark.parametrize("how", ["static", "online"])
def test_few_directions(how: str, tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """A state that moves loses about what the coarser of both caches loses."""
    one = tiny("llama")
    bases = one.bases(4, 64)
    coarse, fine = ((64, "q8_0"), (32, "q4_0")), ((96, "q8_0"), (32, "q5_0"))
    expected, _ = plain_logits(one, tokens)
    lost: dict[tuple[str, str], float] = {}
    caches = {"coarse": coarse, "fine": fine}
    for source, types in caches.items():
        with open_context(one.model, **cache(bases, "only", how, types)) as ctx:
            ctx.feed(tokens[:N_TOKEN], 50)
            state = save(ctx)
            lost[source, source] = error(ctx.feed(tokens[N_TOKEN : N_TOKEN + 120], 8), expected)
        for target in caches.keys() - {source}:
            with open_context(one.model, **{**cache(bases, "only", how, caches[target]), "n_ctx": 1024}) as ctx:
                native.attach(ctx.ptr)
                assert load(ctx, state), native.last_error()
                ctx.n_past[0] = N_TOKEN
                lost[source, target] = error(ctx.feed(tokens[N_TOKEN : N_TOKEN + 120], 8), expected)
    assert lost["fine", "fine"] < 0.5 * lost["coarse", "coarse"]
    assert lost["fine", "coarse"] < 1.2 * lost["coarse", "coarse"]
    assert lost["coarse", "fine"] < 1.2 * lost["coarse", "coarse"]


def test_what_does_not_fit(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """One line with both numbers, and nothing changes."""
    one = tiny("llama")
    bases = one.bases(4, 64)
    with open_context(one.model, **cache(bases, "last", "online")) as ctx:
        ctx.feed(tokens[:800], 50)
        state, single = save(ctx), save(ctx, 0)
    with open_context(one.model, n_ctx=512, xkv=cache(bases, "only", "online")["xkv"]) as ctx:
        native.attach(ctx.ptr)
        ctx.feed(tokens[:100], 50)
        before = save(ctx)
        for given in ((state, None), (single, 0)):
            assert not load(ctx, *given)
            assert native.last_error() == "the state has 800 tokens, expected at most 512; raise n_ctx"
        assert save(ctx) == before
    kind: Any = {"n_ctx": 1024, "n_seq_max": 2, "unified": True, "xkv": cache(bases, "only", "online")["xkv"]}
    with open_context(one.model, **kind) as ctx:
        ctx.feed(tokens[:300], 50)
        assert not load(ctx, single, 1)
        assert native.last_error() == "the state has 800 tokens, expected at most 724; raise n_ctx"


def test_a_move_needs_the_context(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    one = tiny("llama")
    bases = one.bases(4, 64)
    with open_context(one.model, **cache(bases, "stage", "online")) as ctx:
        ctx.feed(tokens[:N_TOKEN], 50)
        state = save(ctx)
    with open_context(one.model, **cache(bases, "plain", "online")) as ctx:
        assert not load(ctx, state)
        assert "xkv_attach" in native.last_error()
        assert lib.llama_memory_seq_pos_max(ctx.memory, 0) == -1


@pytest.mark.parametrize("fill", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("how", ["static", "online"])
def test_a_state_is_no_larger_than_what_is_in_use(
    fill: float, how: str, tiny: Callable[[str], Tiny], tokens: list[int]
) -> None:
    """Rows of exact tokens, coefficients of used chunks, bases that are the stream's own, and a little about each."""
    one = tiny("llama")
    n_ctx = 1024
    xkv = params(one.bases(4, 64), ((64, "q8_0"), (64, "q4_0")), {}, **KINDS[how])
    with open_context(one.model, n_ctx=n_ctx, xkv=xkv) as ctx:
        ctx.feed((tokens * 2)[: int(fill * n_ctx)], 50)
        n_exact, n_stored = native.seq_tokens(ctx.ptr, 0)
        parts = dict(native.report(ctx.ptr))
        size = len(save(ctx))
        own = native.online_info(ctx.ptr, 0).n_update > 0
    row = 4 * (128 + 128)  # K and V of all layers in f32
    n_chunk = -(-n_stored // 64)
    slots = -(-(n_ctx - 4 - 40) // 64) * 64 + 64
    slots += -slots % 256
    coef = (parts["K coefficients"] + parts["V coefficients"]) / slots * 64
    used = row * n_exact + coef * n_chunk + parts["bases and means"] * own
    about = 64 * n_exact + 256 * n_chunk + 1024
    assert size <= used + about
    assert size >= 0.9 * (row * n_exact + coef * n_chunk)
    assert np.isclose(fill, (n_exact + n_stored) / n_ctx, atol=0.01)


@pytest.mark.parametrize("how", KINDS)
def test_what_follows_is_the_same_to_the_last_bit(how: str, tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """Through flushes, changes of stage and renewals: tokens have the cells that they had."""
    one = tiny("llama")
    types, stages = ((64, "q8_0"), (64, "q4_0")), {256: "q8_0", 512: ((96, "q8_0"), (32, "q5_0"))}
    kind: Any = {"n_ctx": 1024, "xkv": params(one.bases(4, 64), types, stages, **KINDS[how])}
    with open_context(one.model, **kind) as ctx:
        ctx.feed(tokens[:230], 50)
        state = save(ctx)
        expected = ctx.feed(tokens[230:900], 50)
        info = native.online_info(ctx.ptr, 0)
        last = save(ctx)
    with open_context(one.model, **kind) as ctx:
        assert load(ctx, state), native.last_error()
        ctx.n_past[0] = 230
        np.testing.assert_array_equal(ctx.feed(tokens[230:900], 50), expected)
        again = native.online_info(ctx.ptr, 0)
        assert (again.n_check, again.n_update) == (info.n_check, info.n_update)
        assert len(save(ctx)) == len(last)


@pytest.mark.parametrize("unified", [True, False])
def test_a_plain_stage_needs_bases(unified: bool, tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """Without calibration they are made at the end of a plain stage, of a cache that has nothing else."""
    one = tiny("llama")
    bases = one.bases(4, 64)
    with open_context(one.model, **cache(bases, "plain", "cold")) as ctx:
        ctx.feed(tokens[:N_TOKEN], 50)
        state = save(ctx, 0)
    kind: Any = {"n_ctx": 2048, "n_seq_max": 2, "unified": unified, "xkv": cache(bases, "only", "cold")["xkv"]}
    with open_context(one.model, **kind) as ctx:
        ctx.feed(tokens[:20], 50)
        ctx.feed(tokens[:30], 50, seq=1)
        before = save(ctx)
        assert not load(ctx, state, 1)
        assert "without calibration; evaluate the prompt again" in native.last_error()
        assert save(ctx) == before


def hashed(data: bytes) -> int:
    """FNV-1a."""
    res = 0xCBF29CE484222325
    for byte in data:
        res = ((res ^ byte) * 0x100000001B3) % 2**64
    return res


def test_more_directions_than_the_stage_has(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    one = tiny("llama")
    xkv = params(one.bases(4, 64), ((64, "q8_0"), (32, "q4_0")), {}, **KINDS["online"])
    with open_context(one.model, n_ctx=1024, xkv=xkv) as ctx:
        ctx.feed(tokens[:300], 50)
        state = save(ctx)
    begin = state.index(b"XKVS") + 8
    size = struct.unpack_from("<Q", state, begin)[0]
    data = state[begin + 16 : begin + 16 + size]
    found = data.replace(struct.pack("<QI", 1, 96), struct.pack("<QI", 1, 128), 1)
    assert found != data
    found = state[:begin] + struct.pack("<QQ", size, hashed(found)) + found + state[begin + 16 + size :]
    with open_context(one.model, n_ctx=1024, xkv=xkv) as ctx:
        assert not load(ctx, found)
        assert "a saved state has 128 directions of group 0, whose stage has 96" in native.last_error()
        assert load(ctx, state), native.last_error()
