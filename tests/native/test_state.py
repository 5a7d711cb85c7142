"""Saved states: what is loaded goes on as what was saved, and what cannot be loaded changes nothing."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xkv_gguf.runtime import native

from .conftest import Tiny
from .harness import Context, lib, open_context
from .state import load, save
from .test_full_rank import TOL_F32, deviation
from .test_segments import error
from .test_stages import COARSE, N_CTX, params

KINDS = {
    "static": {},
    "online": {"online": True},
    "cold": {"online": True, "calibrated": False},
    "stock": {"fused": False},
}


def given(one: Tiny, how: str, staged: bool = True) -> Any:
    """A cache with two stages before the last one, the first plain."""
    bases = one.bases(4, 64)
    return params(bases, COARSE, {256: "q8_0", 512: ((128, "q4_0"),)} if staged else {}, **KINDS[how])


def goes_on(ctx: Context, tokens: list[int], seq: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits of single tokens, and of a prompt that has tokens leave the window."""
    return ctx.feed(tokens[:20], 1, seq), ctx.feed(tokens[20:120], 50, seq)


def same(found: tuple[np.ndarray, np.ndarray], expected: tuple[np.ndarray, np.ndarray]) -> bool:
    """But for rounding: cells can have other places, and a sum that is a little different can round to another code."""
    rows = [deviation(a, b) for part in zip(found, expected, strict=True) for a, b in zip(*part, strict=True)]
    return max(rows) <= 50 * TOL_F32 and float(np.median(rows)) <= TOL_F32


@pytest.mark.parametrize("n_token", [30, 200, 400, 800])
@pytest.mark.parametrize("how", KINDS)
def test_all_sequences(how: str, n_token: int, tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """In every stage; into a new context, and into one that holds something else."""
    one = tiny("llama")
    xkv = given(one, how)
    with open_context(one.model, n_ctx=N_CTX, xkv=xkv) as ctx:
        ctx.feed(tokens[:n_token], 50)
        state = save(ctx)
        counts = native.seq_tokens(ctx.ptr, 0)
        expected = goes_on(ctx, tokens[n_token:])
    for other in ([], tokens[300:900]):
        with open_context(one.model, n_ctx=N_CTX, xkv=xkv) as ctx:
            if other:
                ctx.feed(other, 50)
            assert load(ctx, state), native.last_error()
            assert native.seq_tokens(ctx.ptr, 0) == counts
            ctx.n_past[0] = n_token
            assert save(ctx) == state
            assert same(goes_on(ctx, tokens[n_token:]), expected)


@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("how", KINDS)
def test_one_sequence(how: str, unified: bool, tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """Into another sequence of another context, with the bases that it needs."""
    one = tiny("llama")
    kind: Any = {"n_ctx": 2 * N_CTX, "n_seq_max": 2, "unified": unified, "xkv": given(one, how, staged=unified)}
    with open_context(one.model, **kind) as ctx:
        ctx.feed(tokens[:400], 50)
        state = save(ctx, 0)
        expected = goes_on(ctx, tokens[400:])
    with open_context(one.model, **kind) as ctx:
        assert load(ctx, state, 1), native.last_error()
        ctx.n_past[1] = 400
        assert same(goes_on(ctx, tokens[400:], 1), expected)


def test_a_file_of_one_sequence(tiny: Callable[[str], Tiny], tokens: list[int], tmp_path: Path) -> None:
    """By llama_state_seq_save_file, into another sequence of a context whose own bases have moved on."""
    one = tiny("llama")
    path = str(tmp_path / "seq.bin").encode()
    kind: Any = {"n_ctx": 2 * N_CTX, "n_seq_max": 2, "xkv": given(one, "online", staged=False)}
    with open_context(one.model, **kind) as ctx:
        ctx.feed(tokens[:400], 50)
        given_tokens = (lib.llama_token * 400)(*tokens[:400])
        assert lib.llama_state_seq_save_file(ctx.ptr, path, 0, given_tokens, 400) > 0
        expected = goes_on(ctx, tokens[400:])
    found, n = (lib.llama_token * 500)(), ctypes.c_size_t()
    with open_context(one.model, **kind) as ctx:
        ctx.feed(tokens[500:], 50, seq=1)
        other = ctx.feed(tokens[300:900], 50)
        before = save(ctx, 0)
        assert lib.llama_state_seq_load_file(ctx.ptr, path, 1, found, 500, ctypes.byref(n)) > 0, native.last_error()
        assert list(found[: n.value]) == tokens[:400]
        assert save(ctx, 0) == before
        ctx.n_past[1] = 400
        assert same(goes_on(ctx, tokens[400:], 1), expected)
    assert np.isfinite(other).all()
    data = (tmp_path / "seq.bin").read_bytes()
    with open_context(one.model, **kind) as ctx:
        ctx.feed(tokens[:100], 50)
        before = save(ctx, 0)
        for wrong in (data[:-100], data[:2000] + b"x" + data[2001:]):
            (tmp_path / "seq.bin").write_bytes(wrong)
            assert lib.llama_state_seq_load_file(ctx.ptr, path, 0, found, 500, ctypes.byref(n)) == 0
            assert save(ctx, 0) == before


def test_beside_another_sequence(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """In a shared stream, a sequence comes back as it was where stage and bases are still those of the others."""
    one = tiny("llama")
    kind: Any = {"n_ctx": 2 * N_CTX, "n_seq_max": 2, "unified": True}
    with open_context(one.model, xkv=given(one, "static", staged=False), **kind) as ctx:
        ctx.feed(tokens[:300], 50)
        ctx.feed(tokens[300:600], 50, seq=1)
        state = save(ctx, 1)
        expected = goes_on(ctx, tokens[600:], 1)
        assert ctx.seq_rm(1, 0)
        assert load(ctx, state, 1), native.last_error()
        ctx.n_past[1] = 300
        assert same(goes_on(ctx, tokens[600:], 1), expected)


def test_beside_others_that_went_on(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """Where the others' stage and bases are others by now, it takes them and loses as much as if it were read there."""
    one = tiny("llama")
    kind: Any = {"n_ctx": 2 * N_CTX, "n_seq_max": 2, "unified": True}
    with open_context(one.model, flash_attn=False, **kind) as ctx:
        ctx.feed(tokens[:300], 50)
        plain = ctx.feed(tokens[300:400], 50)
    lost = []
    with open_context(one.model, xkv=given(one, "online"), **kind) as ctx:
        ctx.feed(tokens[:300], 50)
        early = save(ctx, 0)
        assert ctx.seq_rm(0, 0)
        ctx.feed(tokens[300:900], 50, seq=1)
        counts = native.seq_tokens(ctx.ptr, 1)
        for read in (True, False):
            if read:
                ctx.feed(tokens[:300], 50)
            else:
                assert ctx.seq_rm(0, 0)
                assert load(ctx, early, 0), native.last_error()
                ctx.n_past[0] = 300
            lost.append(error(ctx.feed(tokens[300:400], 50), plain))
        assert sum(native.seq_tokens(ctx.ptr, 1)) == sum(counts)
    assert lost[1] <= 1.2 * lost[0]


def test_what_cannot_be_taken_changes_nothing(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    one = tiny("llama")
    xkv = given(one, "online")
    with open_context(one.model, n_ctx=N_CTX, xkv=xkv) as ctx:
        ctx.feed(tokens[:400], 50)
        state = save(ctx)
    at = state.index(b"XKVS")
    rng = np.random.default_rng(0)
    flips = [at + 24 + int(i) for i in rng.integers(0, len(state) - at - 24, 40)]
    wrong = [state[:i] + bytes([state[i] ^ 64]) + state[i + 1 :] for i in (at, at + 4, *flips)]
    wrong += [state[: int(n)] for n in rng.integers(at, len(state) - 1, 20)]
    with open_context(one.model, n_ctx=N_CTX, xkv=xkv) as ctx:
        ctx.feed(tokens[500:800], 50)
        before = save(ctx)
        for data in wrong:
            assert not load(ctx, data)
            assert native.last_error()
            assert "\n" not in native.last_error()
        assert save(ctx) == before
        assert load(ctx, state)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"n_ctx": 512}, "the state has 800 tokens, expected at most 512; raise n_ctx"),
        ({"how": "static"}, "the state is of a cache with online on, this one has it off"),
        ({"groups": 2}, "another sidecar or model"),
    ],
)
def test_states_of_other_caches(
    change: dict[str, Any], why: str, tiny: Callable[[str], Tiny], tokens: list[int]
) -> None:
    import re

    one = tiny("llama")
    with open_context(one.model, n_ctx=N_CTX, xkv=given(one, "online")) as ctx:
        ctx.feed(tokens[:800], 50)
        state = save(ctx)
    xkv = given(one, change.get("how", "online"))
    if "groups" in change:
        xkv = params(one.bases(2, 64), ((32, "q8_0"), (32, "q4_0")), {}, online=True)
    kind: Any = {"n_ctx": change.get("n_ctx", N_CTX), "xkv": xkv}
    with open_context(one.model, **kind) as ctx:
        ctx.feed(tokens[:100], 50)
        before = save(ctx)
        assert not load(ctx, state)
        assert re.search(why, native.last_error()), native.last_error()
        assert save(ctx) == before


def test_a_sequence_that_shares_all_with_another(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """It is not alone: the other one keeps its tokens, stage and bases."""
    one = tiny("llama")
    kind: Any = {"n_ctx": 2 * N_CTX, "n_seq_max": 2, "unified": True, "xkv": given(one, "online")}
    with open_context(one.model, **kind) as ctx:
        ctx.feed(tokens[:300], 50)
        lib.llama_memory_seq_cp(ctx.memory, 0, 1, -1, -1)
        ctx.n_past[1] = 300
        early = save(ctx, 1)
        ctx.feed(tokens[300:600], 50, seq=1)
        before = save(ctx, 0)
        assert not load(ctx, save(ctx, 1), 1)
        assert "this cache has room for 3; load it into an empty context" in native.last_error()
        assert save(ctx, 0) == before
        assert load(ctx, early, 1), native.last_error()
        assert save(ctx, 0) == before


def test_a_state_is_cut_before_the_first_batch(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    one = tiny("llama")
    xkv = given(one, "static")
    with open_context(one.model, n_ctx=N_CTX, xkv=xkv) as ctx:
        ctx.feed(tokens[:400], 50)
        state = save(ctx)
        assert ctx.seq_rm(0, 333)
        expected = ctx.feed(tokens[333:360], 1)
    with open_context(one.model, n_ctx=N_CTX, xkv=xkv) as ctx:
        assert load(ctx, state)
        assert ctx.seq_rm(0, 333)  # inside a chunk
        ctx.n_past[0] = 333
        assert deviation(ctx.feed(tokens[333:360], 1), expected) <= 50 * TOL_F32


def test_a_state_after_shifts(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """Frames below 0, holes, tokens of one position; and a shift before the first batch, which is made up for there."""
    one = tiny("llama")
    xkv = given(one, "static")
    with open_context(one.model, n_ctx=N_CTX, xkv=xkv) as ctx:
        ctx.feed(tokens[:400], 50)
        assert ctx.seq_rm(0, 0, 20)
        lib.llama_memory_seq_add(ctx.memory, 0, 20, -1, -20)
        lib.llama_memory_seq_div(ctx.memory, 0, 100, 200, 2)
        state = save(ctx)
        lib.llama_memory_seq_add(ctx.memory, 0, 100, -1, 13)
        ctx.n_past[0] = 393
        expected = ctx.feed(tokens[400:420], 1)
    for attached in (True, False):
        with open_context(one.model, n_ctx=N_CTX, xkv=xkv) as ctx:
            assert load(ctx, state), native.last_error()
            if attached:
                native.attach(ctx.ptr)
            lib.llama_memory_seq_add(ctx.memory, 0, 100, -1, 13)
            if not attached:
                with pytest.raises(AssertionError):
                    save(ctx)
                assert "before the context's first batch" in native.last_error()
            ctx.n_past[0] = 393
            assert deviation(ctx.feed(tokens[400:420], 1), expected) <= 50 * TOL_F32
