"""Attention sinks in the text: tokens whose values are nearly zero stay exact, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from xkv_gguf.runtime import native

from .conftest import Tiny
from .harness import Context, lib, open_context
from .sidecars import N_SINK
from .test_full_rank import TOL_F32, TOL_FLASH, deviation, run_paths
from .test_sequences import N_BATCH, check
from .tiny_models import SINK_TOKEN

FRAME = 32


def n_kept(ctx: Context, text: list[int], seq: int = 0) -> int:
    """Text sinks that were left out of the chunks: what is missing until whole chunks are stored."""
    _, n_stored = native.seq_tokens(ctx.ptr, seq)
    n_left = -(-n_stored // FRAME) * FRAME
    kept = n_left - n_stored
    assert text[N_SINK : N_SINK + n_left].count(SINK_TOKEN) >= kept
    return kept


@pytest.fixture
def text(tokens: list[int]) -> list[int]:
    """Random tokens, an attention sink at every 50th position and nowhere else."""
    return [
        SINK_TOKEN if i % 50 == 20 else (token or 1) if token != SINK_TOKEN else 8 for i, token in enumerate(tokens)
    ]


@pytest.mark.parametrize("n_text_sink", [0, 3, 16])
def test_they_stay_exact(n_text_sink: int, tiny: Callable[[str], Tiny], text: list[int]) -> None:
    """All of them, and no more than there is room for."""
    one = tiny("llama-sinks")
    with open_context(one.model, xkv=one.bases().params(n_text_sink=n_text_sink)) as ctx:
        ctx.feed(text[:400], N_BATCH)
        exact, stored = native.seq_tokens(ctx.ptr, 0)
        assert exact + stored == 400
        n_passed = text[N_SINK : N_SINK + stored].count(SINK_TOKEN)
        assert n_kept(ctx, text) == min(n_text_sink, n_passed)
        assert n_passed > 3


def test_ordinary_tokens_do_not(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    one = tiny("llama")
    with open_context(one.model, xkv=one.bases().params(n_text_sink=16)) as ctx:
        ctx.feed(tokens[:400], N_BATCH)
        assert native.seq_tokens(ctx.ptr, 0)[1] % FRAME == 0


@pytest.mark.parametrize(("group_size", "frame"), [(1, 32), (4, 128)])
def test_equals_plain_cache(group_size: int, frame: int, tiny: Callable[[str], Tiny], text: list[int]) -> None:
    """The full-rank invariant, with chunks that tokens are missing from."""
    one = tiny("llama-sinks")
    logits = []
    params = one.bases(group_size, frame).params(n_text_sink=5)
    for kind in ({"flash_attn": False}, {"exact": False}, {"xkv": params}):
        with open_context(one.model, **kind) as ctx:
            logits.append(run_paths(ctx, text))
    plain, flash, xkv = logits
    noise = max(deviation(flash[path], plain[path]) for path in plain)
    for path in plain:
        assert deviation(xkv[path], plain[path]) <= TOL_FLASH * noise + TOL_F32, path


@pytest.mark.parametrize(("p0", "p1"), [(130, -1), (120, -1), (121, -1), (60, 140), (70, 71), (0, -1)])
def test_remove(p0: int, p1: int, tiny: Callable[[str], Tiny], text: list[int]) -> None:
    """Cuts before, at and after a sink, holes, and everything; then go on with other tokens at the same positions."""
    one = tiny("llama-sinks")
    with (
        open_context(one.model, flash_attn=False) as plain,
        open_context(one.model, xkv=one.bases().params(n_absorb=64, n_text_sink=8)) as xkv,
    ):
        for ctx in (plain, xkv):
            ctx.feed(text[:270], N_BATCH)
            assert ctx.seq_rm(0, p0, p1)
        n_left = p0 if p1 < 0 else 270 - (p1 - p0)
        assert sum(native.seq_tokens(xkv.ptr, 0)) == n_left
        check(plain, xkv, text[300:450])
        if p1 < 0 and p0 > 0:
            assert lib.llama_memory_seq_pos_max(xkv.memory, 0) == p0 + 149


@pytest.mark.parametrize("unified", [False, True])
def test_sequences(unified: bool, tiny: Callable[[str], Tiny], text: list[int]) -> None:
    """Each sequence has sinks of its own; a copy has those of its source."""
    one = tiny("llama-sinks")
    shape = {"n_ctx": 1536, "n_seq_max": 3, "unified": unified}
    with (
        open_context(one.model, flash_attn=False, **shape) as plain,
        open_context(one.model, xkv=one.bases().params(n_absorb=64, n_text_sink=4), **shape) as xkv,
    ):
        for seq in range(2):
            check(plain, xkv, text[:300], seq)
            if not unified:
                assert n_kept(xkv, text, seq) == 4
        for ctx in (plain, xkv):
            lib.llama_memory_seq_cp(ctx.memory, 0, 2, -1, -1)
            ctx.n_past[2] = 300
            assert ctx.seq_rm(2, 200)
        for seq in (2, 0, 1):
            check(plain, xkv, text[400 + seq : 450], seq)
        for ctx in (plain, xkv):
            assert ctx.seq_rm(0, 0)
        check(plain, xkv, text[:200], 0)
        assert np.isfinite(xkv.decode((2, text[:1]))).all()
