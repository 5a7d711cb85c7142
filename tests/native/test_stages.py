"""Stages of the store: exact at full rank, better while few tokens are stored, and from the start after clearing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from xkv_gguf.errors import OptionError
from xkv_gguf.plan.stages import Stage
from xkv_gguf.runtime import native

from .conftest import Tiny
from .harness import lib, open_context
from .sidecars import Bases
from .test_full_rank import TOL_F32, TOL_FLASH, deviation
from .test_segments import error

N_CTX = 1024
FULL = ((128, "f32"),)
COARSE = ((64, "q8_0"), (64, "q2_0"))


def params(
    bases: Bases, types: Sequence[tuple[int, str]], stages: dict[int, Sequence[tuple[int, str]] | str], **kind: bool
) -> native.ScopeParams:
    """Cache parameters whose stages have `types`, or are plain with a type, for a number of slots."""
    early = tuple(
        Stage(n_slot, type=t) if isinstance(t, str) else Stage(n_slot, bases.params(types=tuple(t)).segments)
        for n_slot, t in stages.items()
    )
    return replace(bases.params(types=tuple(types), **kind), stages=early)


@pytest.mark.parametrize("how", ["static", "online", "cold"])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(("name", "frame"), [("llama", 32), ("qwen2", 64), ("gpt2", 256)])
def test_equals_plain_cache(
    name: str, frame: int, plain: bool, how: str, tiny: Callable[[str], Tiny], tokens: list[int]
) -> None:
    """The full-rank invariant, through two changes of stage with a few queries and many."""
    one = tiny(name)
    bases = one.bases(2, frame)
    full = ((len(bases.basis["k"][0]), "f32"),)
    stages = {256: "f32" if plain else full, 512: full}
    for n_batch in (8, 64):
        found = []
        for kind in (
            {"flash_attn": False},
            {"exact": False},
            {"xkv": params(bases, full, stages, online=how != "static", calibrated=how != "cold")},
        ):
            with open_context(one.model, n_ctx=N_CTX, **kind) as ctx:
                found.append(ctx.feed(tokens[:900], n_batch))
                if "xkv" in kind:
                    info = native.online_info(ctx.ptr, 0)
                    assert (info.n_check >= 2) == (how != "static")
                    assert info.n_update == 0 if how != "cold" else info.n_update >= 2  # nothing is lost
        expected, flash, xkv = found
        assert deviation(xkv, expected) <= TOL_FLASH * deviation(flash, expected) + TOL_F32


@pytest.mark.parametrize("calibrated", [True, False])
def test_large_groups(calibrated: bool, tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """Groups of more numbers than a space of bases may have: what the tokens span is found, of stored ones too."""
    one = tiny("llama-heads-of-288")
    bases = one.bases(4, 32)
    assert len(bases.basis["k"][0]) == 4 * 288
    types, stages = ((512, "f32"),), {512: "f32"}
    found = []
    for kind in (
        {"flash_attn": False},
        {"xkv": params(bases, types, stages)},
        {"xkv": params(bases, types, stages, online=True, calibrated=calibrated, n_prior=0)},
    ):
        with open_context(one.model, n_ctx=N_CTX, **kind) as ctx:
            found.append(ctx.feed(tokens[:800], 8)[-200:])
            if "xkv" in kind:
                assert native.online_info(ctx.ptr, 0).n_update == (kind["xkv"].online)
    plain, random, adapted = found
    # a space of 640 directions of the sidecar, which are random here, leaves room for 64 others
    assert error(adapted, plain) <= (0.95 if calibrated else 0.6) * error(random, plain)


def test_fewer_tokens_are_more_exact(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """In the same bytes; once the store is full, what was stored in stages is about as good as without them."""
    one = tiny("llama")
    bases = one.bases(4, 64)
    errors, sizes = [], []
    with open_context(one.model, n_ctx=N_CTX, flash_attn=False) as ctx:
        plain = ctx.feed(tokens[:900], 16)
    for stages in ({}, {256: ((128, "q8_0"),), 512: ((64, "q8_0"), (64, "q4_0"))}):
        with open_context(one.model, n_ctx=N_CTX, xkv=params(bases, COARSE, stages)) as ctx:
            found = ctx.feed(tokens[:900], 16)
            sizes.append(native.report(ctx.ptr))
        errors.append([error(found[a:b], plain[a:b]) for a, b in ((200, 280), (400, 480), (800, 900))])
    without, staged = errors
    assert sizes[0] == sizes[1]
    assert staged[0] < 0.1 * without[0]
    assert staged[1] < 0.5 * without[1]
    assert staged[2] < 1.2 * without[2]


@pytest.mark.parametrize("online", [False, True])
def test_starts_again(online: bool, tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """A cleared or emptied cache gives what a new one gives."""
    one = tiny("llama")
    given = params(one.bases(4, 64), COARSE, {256: FULL, 512: ((128, "q4_0"),)}, online=online)
    with open_context(one.model, n_ctx=N_CTX, xkv=given) as ctx:
        first = ctx.feed(tokens[:900], 32)
        assert ctx.seq_rm(0, 0)
        again = ctx.feed(tokens[:900], 32)
        lib.llama_memory_clear(ctx.memory, True)
        ctx.n_past.clear()
        cleared = ctx.feed(tokens[:900], 32)
    np.testing.assert_array_equal(again, first)
    np.testing.assert_array_equal(cleared, first)


def test_several_sequences_of_one_stream(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """They share the stages, and a removed one makes room without going back."""
    one = tiny("llama")
    bases = one.bases(4, 32)
    full = ((128, "f32"),)
    found = []
    for kind in ({"flash_attn": False}, {"xkv": params(bases, full, {256: full, 512: full}, online=True)}):
        with open_context(one.model, n_ctx=N_CTX, n_seq_max=2, unified=True, **kind) as ctx:
            rows = [ctx.feed(tokens[i * 100 : i * 100 + 100], 8, seq=i % 2) for i in range(8)]
            assert ctx.seq_rm(1, 0)
            rows.append(ctx.feed(tokens[800:1000], 8, seq=1))
            found.append(np.concatenate(rows))
    assert deviation(found[1], found[0]) <= TOL_F32


def test_streams_have_none(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """Streams of their own fill at different times: each has the full store's segments from the start."""
    one = tiny("llama")
    bases = one.bases(4, 64)
    found = []
    for stages in ({}, {256: ((128, "q8_0"),)}):
        with open_context(one.model, n_ctx=2 * N_CTX, n_seq_max=2, xkv=params(bases, COARSE, stages)) as ctx:
            found.append(ctx.feed(tokens[:300], 30, seq=1))
    np.testing.assert_array_equal(found[0], found[1])


def test_a_stage_that_is_too_large_is_left_out(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    one = tiny("llama")
    bases = one.bases(4, 64)
    found = []
    for stages in ({}, {768: FULL}):
        with open_context(one.model, n_ctx=N_CTX, xkv=params(bases, ((32, "q8_0"),), stages)) as ctx:
            found.append(ctx.feed(tokens[:300], 30))
    np.testing.assert_array_equal(found[0], found[1])


@pytest.mark.parametrize(
    ("slots", "text"), [((200,), "multiple of 256"), ((512, 256), "above those of the stage before"), ((0,), "0 slots")]
)
def test_bad_stages(slots: tuple[int, ...], text: str, tiny: Callable[[str], Tiny]) -> None:
    bases = tiny("llama").bases(4)
    given = params(bases, FULL, {})
    stages = tuple(Stage(n, given.segments) for n in slots)
    with pytest.raises(OptionError, match=text), native.scope(replace(given, stages=stages)):
        pass


def test_stage_beyond_the_store(tiny: Callable[[str], Tiny]) -> None:
    one = tiny("llama")
    with (
        pytest.raises(AssertionError, match="a stage has 4096 slots, expected below"),
        open_context(one.model, n_ctx=N_CTX, xkv=params(one.bases(4), FULL, {4096: FULL})),
    ):
        pass


def test_few_tokens_that_are_left_start_over(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """After a cut, tokens of an earlier stage than the store's go back to the window; they lose nothing by it."""
    one = tiny("llama")
    bases = one.bases(4, 64)
    full = ((len(bases.basis["k"][0]), "f32"),)
    prompt, after = tokens[:120], tokens[500:780]
    with open_context(one.model, n_ctx=N_CTX, flash_attn=False) as ctx:
        ctx.feed(prompt, 8)
        plain = ctx.feed(after, 8)
    with open_context(one.model, n_ctx=N_CTX, xkv=params(bases, full, {256: full, 512: full})) as ctx:
        ctx.feed(tokens[:900], 8)
        assert native.seq_tokens(ctx.ptr, 0)[1] > 700
        assert ctx.seq_rm(0, 700)  # too many to go back
        assert native.seq_tokens(ctx.ptr, 0)[1] > 400
        assert ctx.seq_rm(0, len(prompt))
        assert native.seq_tokens(ctx.ptr, 0) == (len(prompt), 0)
        assert deviation(ctx.feed(after, 8), plain) <= TOL_F32


def test_exact_tokens_that_are_left_start_over(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """Where a cut leaves exact tokens only, bases that followed the others go, too."""
    one = tiny("llama")
    found = []
    for before in ([], tokens[300:900]):
        with open_context(one.model, n_ctx=N_CTX, xkv=params(one.bases(4, 64), COARSE, {}, online=True)) as ctx:
            ctx.feed(tokens[:4], 4)
            ctx.feed(before, 50) if before else None
            assert ctx.seq_rm(0, 4)
            found.append(ctx.feed(tokens[4:300], 50))
    assert deviation(found[1], found[0]) <= TOL_F32


def test_sequences_that_are_left_start_over(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """What sequences share stays shared on its way back."""
    one = tiny("llama")
    bases = one.bases(4, 64)
    full = ((len(bases.basis["k"][0]), "f32"),)
    prompt = tokens[:200]
    plain, xkv = {"flash_attn": False}, {"xkv": params(bases, full, {256: full, 512: full})}
    found = []
    for kind in (plain, xkv):
        with open_context(one.model, n_ctx=N_CTX, n_seq_max=2, unified=True, **kind) as ctx:
            ctx.feed(prompt, 8)
            lib.llama_memory_seq_cp(ctx.memory, 0, 1, -1, -1)
            ctx.n_past[1] = len(prompt)
            ctx.feed(tokens[200:800], 8)
            assert ctx.seq_rm(0, len(prompt))
            found.append(np.concatenate([ctx.feed(tokens[800:850], 8, seq) for seq in (1, 0)]))
    assert deviation(found[1], found[0]) <= TOL_F32
