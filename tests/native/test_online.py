"""Bases that follow the prompt: exact where nothing is lost, better than static ones where they don't fit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from xkv_gguf.runtime import native

from .conftest import Tiny
from .harness import lib, open_context
from .test_full_rank import TOL_F32, TOL_FLASH, deviation
from .test_segments import error

# random bases don't fit any prompt
RANK = 64
WIDE_RANK = 1152
"""Of 1536 numbers: a renewal turns at most 512 directions and leaves those in the middle as they are."""


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_full_rank_is_left_alone(name: str, tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """Where nothing is lost, bases are checked and stay, and the cache equals the plain one."""
    one = tiny(name)
    with open_context(one.model, flash_attn=False) as ctx:
        plain = ctx.feed(tokens[:400], 8)
    with open_context(one.model, xkv=one.bases().params(online=True, n_prior=200)) as ctx:
        found = ctx.feed(tokens[:400], 8)
        info = native.online_info(ctx.ptr, 0)
    assert deviation(found, plain) <= TOL_F32
    assert info.n_check > 0
    assert info.n_update == 0
    assert info.residual < 1e-4


def test_better_than_static(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """Half the directions, of a basis that does not fit: after an update less of the next tokens is lost."""
    one = tiny("llama")
    with open_context(one.model, flash_attn=False) as ctx:
        plain = ctx.feed(tokens[:200], 8)[180:]
    errors, residuals = {}, []
    for online in (False, True):
        params = one.bases(4, 32).params(rank=RANK, online=online, n_prior=0)
        with open_context(one.model, xkv=params) as ctx:
            errors[online] = error(ctx.feed(tokens[:200], 8)[180:], plain)
            for start in range(200, 500, 20):
                ctx.feed(tokens[start : start + 20], 8)
                residuals.append(native.online_info(ctx.ptr, 0).residual)
            info = native.online_info(ctx.ptr, 0)
        assert (info.n_update > 0) == online
    assert errors[True] < errors[False]
    assert residuals[:15] == [0.0] * 15  # never checked
    assert 0.05 < residuals[-1] < 0.9 * residuals[15]


def test_without_calibration(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """Bases come from the first tokens alone; with all ranks they span everything, and the cache is exact."""
    one = tiny("llama")
    with open_context(one.model, flash_attn=False) as ctx:
        plain = ctx.feed(tokens[:400], 8)
    noise = []
    for flash_attn in (False, True):
        with open_context(one.model, exact=False, flash_attn=flash_attn) as ctx:
            noise.append(ctx.feed(tokens[:400], 8))
    for group_size, frame in ((1, 32), (2, 32)):
        params = one.bases(group_size, frame).params(online=True, calibrated=False)
        with open_context(one.model, xkv=params) as ctx:
            found = ctx.feed(tokens[:400], 8)
            info = native.online_info(ctx.ptr, 0)
        assert info.n_update == info.n_check > 0
        # the basis is computed in f32 from f32 sums
        assert deviation(found, plain) <= TOL_FLASH * deviation(*noise) + TOL_F32, group_size
    params = one.bases(4, 32).params(rank=RANK, online=True, calibrated=False)
    with open_context(one.model, xkv=params) as ctx:
        assert error(ctx.feed(tokens[:200], 8)[180:], plain[180:200]) < 1.0


def test_without_bases_at_all(tiny: Callable[[str], Tiny]) -> None:
    from xkv_gguf.errors import OptionError

    params = tiny("llama").bases().params(online=False, calibrated=False)
    with pytest.raises(OptionError, match="online is 0 and there is no sidecar"), native.scope(params):
        pass


def test_streams_have_their_own(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """A sequence's bases are written when it needs other ones, are counted, and leave the other sequence alone."""
    one = tiny("llama")
    params = one.bases(4, 32).params(rank=RANK, online=True, n_prior=100)
    shape = {"n_ctx": 1024, "n_seq_max": 2, "unified": False}
    with open_context(one.model, xkv=params, **shape) as ctx:
        bases = dict(native.report(ctx.ptr))["bases and means"]
        first = ctx.feed(tokens[:400], 8, seq=0)
        grown = dict(native.report(ctx.ptr))["bases and means"]
        assert native.online_info(ctx.ptr, 0).n_update > 0
        assert native.online_info(ctx.ptr, 1).n_check == 0
        second = ctx.feed(tokens[500:900], 8, seq=1)
        both = dict(native.report(ctx.ptr))["bases and means"]
        # side by side in one batch
        pair = ctx.decode((0, tokens[:1]), (1, tokens[1:2]))
        assert ctx.seq_rm(0, 0)
        dropped = dict(native.report(ctx.ptr))["bases and means"]
    assert bases < grown < both
    assert dropped == grown
    with open_context(one.model, xkv=params, **shape) as ctx:
        alone = ctx.feed(tokens[500:900], 8, seq=1)
        alone_next = ctx.decode((1, tokens[1:2]))
    assert deviation(second, alone) <= TOL_F32
    assert deviation(pair[1:], alone_next) <= TOL_F32
    with open_context(one.model, xkv=params) as ctx:  # one stream changes the calibrated bases in place
        assert deviation(first, ctx.feed(tokens[:400], 8)) <= TOL_F32


def test_copy_takes_the_bases_along(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    one = tiny("llama")
    params = one.bases(4, 32).params(rank=RANK, online=True, n_prior=100)
    with open_context(one.model, xkv=params, n_ctx=1024, n_seq_max=2) as ctx:
        ctx.feed(tokens[:400], 8, seq=0)
        lib.llama_memory_seq_cp(ctx.memory, 0, 1, -1, -1)
        ctx.n_past[1] = ctx.n_past[0]
        assert native.online_info(ctx.ptr, 1) == native.online_info(ctx.ptr, 0)
        pair = [ctx.decode((seq, tokens[400:404])) for seq in (0, 1)]
    assert deviation(*pair) <= TOL_F32


def test_clear_goes_back_to_calibrated(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    one = tiny("llama")
    with open_context(one.model, xkv=one.bases(4, 32).params(rank=RANK, online=True, n_prior=100)) as ctx:
        before = ctx.feed(tokens[:400], 8)
        lib.llama_memory_clear(ctx.memory, True)
        ctx.n_past.clear()
        assert native.online_info(ctx.ptr, 0).n_check == 0
        after = ctx.feed(tokens[:400], 8)
    assert deviation(after, before) <= TOL_F32


def test_wide_full_rank_is_left_alone(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    one = tiny("llama-wide")
    with open_context(one.model, flash_attn=False) as ctx:
        plain = ctx.feed(tokens[:184], 8)
    with open_context(one.model, xkv=one.bases(4, 32, 1.5).params(online=True, n_prior=40)) as ctx:
        found = ctx.feed(tokens[:184], 8)
        info = native.online_info(ctx.ptr, 0)
    assert deviation(found, plain) <= TOL_F32
    assert (info.n_check > 0, info.n_update) == (True, 0)


@pytest.mark.parametrize("types", [((WIDE_RANK, "f32"),), ((256, "q8_0"), (512, "q4_0"), (384, "q2_0"))])
def test_wide_follows_a_new_text(
    tiny: Callable[[str], Tiny], tokens: list[int], types: tuple[tuple[int, str], ...]
) -> None:
    """More directions than are turned: less is lost of each text after a renewal, and what is stored stays right."""
    one = tiny("llama-wide")
    text = [t % 30 for t in tokens[:160]] + [30 + t % 31 for t in tokens[160:416]]
    with open_context(one.model, flash_attn=False) as ctx:
        plain = ctx.feed(text, 32)
    errors, residuals = {}, []
    for online in (False, True):
        params = one.bases(4, 64, 1.5).params(types=types, online=online, n_prior=50)
        with open_context(one.model, xkv=params) as ctx:
            found = []
            for start in range(0, len(text), 32):
                found.append(ctx.feed(text[start : start + 32], 32))
                residuals.append(native.online_info(ctx.ptr, 0).residual)
            logits = np.concatenate(found)
            errors[online] = [error(logits[at : at + 96], plain[at : at + 96]) for at in (128, 320)]
            info = native.online_info(ctx.ptr, 0)
        assert info.n_update >= 2 if online else info.n_check == 0
    assert all(new < old for new, old in zip(errors[True], errors[False], strict=True)), errors
    assert residuals[-1] < 0.9 * max(residuals), residuals


@pytest.mark.parametrize(("rank", "n_token", "n_ubatch"), [(WIDE_RANK, 320, 32), (448, 768, 640)])
def test_wide_without_calibration(
    rank: int, n_token: int, n_ubatch: int, tiny: Callable[[str], Tiny], tokens: list[int]
) -> None:
    """The first bases have as many directions as are turned, or as there are tokens; later ones are added to them."""
    one = tiny("llama-wide")
    text = (tokens * 3)[:n_token]
    with open_context(one.model, n_ctx=1024, n_ubatch=n_ubatch, flash_attn=False) as ctx:
        plain = ctx.feed(text, n_ubatch)
    params = one.bases(4, 32, 1.5).params(rank=rank, online=True, calibrated=False)
    with open_context(one.model, n_ctx=1024, n_ubatch=n_ubatch, xkv=params) as ctx:
        found = ctx.feed(text, n_ubatch)
        info = native.online_info(ctx.ptr, 0)
    assert info.n_update == info.n_check >= 1
    assert error(found[-64:], plain[-64:]) < 1.0
