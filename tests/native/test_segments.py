"""Coefficients in segments of several types, and windows of every type."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from xkv_gguf.errors import OptionError
from xkv_gguf.plan.segments import Segment
from xkv_gguf.runtime import native

from .conftest import Tiny
from .harness import GGML_F16, GGML_F32, GGML_Q8_0, open_context
from .test_full_rank import TOL_F32, deviation

MIXED = ((32, "q8_0"), (32, "q4_0"), (64, "q2_0"))


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square difference over the spread of what is expected."""
    return float(np.sqrt(((found - expected) ** 2).mean()) / expected.std())


def test_segments_of_exact_types_are_exact(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """The full-rank invariant holds where the directions are split, as far as f16 goes."""
    one = tiny("llama")
    with open_context(one.model, flash_attn=False) as ctx:
        plain = ctx.feed(tokens[:400], 8)
    with open_context(one.model, xkv=one.bases(4, 64).params(types=((96, "f32"), (32, "f16")))) as ctx:
        assert deviation(ctx.feed(tokens[:400], 8), plain) <= 20 * TOL_F32


def test_paths_agree(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """Absorbed and materialized attention read the same segments."""
    one = tiny("llama")
    logits = []
    for n_absorb in (8, 0):
        with open_context(one.model, xkv=one.bases(4, 64).params(types=MIXED, n_absorb=n_absorb)) as ctx:
            logits.append(ctx.feed(tokens[:200], 8)[180:])
    with open_context(one.model, flash_attn=False) as ctx:
        plain = ctx.feed(tokens[:200], 8)[180:]
    # soon after the first flush: what the paths round differently (queries to 8 bits) is less than what segments lose
    assert error(*logits) < 0.5 * error(logits[0], plain)


@pytest.mark.parametrize("n_absorb", [8, 0])
def test_error_falls_with_bits(n_absorb: int, tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    one = tiny("llama")
    with open_context(one.model, flash_attn=False) as ctx:
        plain = ctx.feed(tokens[:400], 8)
    errors = []
    for type_name in ("q4_0", "q2_0", "q1_0"):
        with open_context(one.model, xkv=one.bases(4, 128).params(type_coef=type_name, n_absorb=n_absorb)) as ctx:
            errors.append(error(ctx.feed(tokens[:400], 8), plain))
    assert 0 < errors[0] < errors[1] < errors[2] < 1.5


def test_bytes_follow_types(tiny: Callable[[str], Tiny]) -> None:
    """Coefficients take what their types say: per slot and group, 32 x 34/32 + 32 x 18/32 + 64 x 18/64 bytes."""
    one = tiny("llama")
    with open_context(one.model, n_ctx=1024, xkv=one.bases(4, 64).params(types=MIXED)) as ctx:
        parts = dict(native.report(ctx.ptr))
    n_slot = 1280  # 980 tokens are 16 chunks, one more for a chunk that is cut short, padded to 256 tokens
    for name in ("K coefficients", "V coefficients"):
        assert 0 <= parts[name] - n_slot * (34 + 18 + 18) < 256, name  # alignment


def test_window_types(tiny: Callable[[str], Tiny], tokens: list[int]) -> None:
    """A q8_0 window is close to an exact one on both paths, and takes its bytes."""
    one = tiny("llama")
    found, sizes = {}, {}
    for n_absorb in (8, 0):
        for window in (GGML_F32, GGML_F16, GGML_Q8_0):
            params = one.bases(2, 32).params(n_absorb=n_absorb)
            with open_context(one.model, window=window, xkv=params) as ctx:
                found[n_absorb, window] = ctx.feed(tokens[:400], 8)
                sizes[window] = dict(native.report(ctx.ptr))["sinks and window"]
        # tiny random models blow small differences up: the first tokens tell
        exact, half, eight = (found[n_absorb, window][:40] for window in (GGML_F32, GGML_F16, GGML_Q8_0))
        assert error(half, exact) < 0.01
        assert error(half, exact) < error(eight, exact) < 0.2
    assert sizes[GGML_F32] == 2 * sizes[GGML_F16]
    assert sizes[GGML_Q8_0] == pytest.approx(sizes[GGML_F16] * 34 / 64, rel=0.01)


@pytest.mark.parametrize(
    ("segments", "text"),
    [
        ((), "no segments for K of group 0"),
        ((Segment(9, "k", 32, "q8_0"),), "segment 0 has group 9"),
        ((Segment(0, "v", 64, "q1_0"),), "blocks of 128 tokens, but chunks are 32"),
        ((Segment(0, "v", 32, "q2_0"),), "blocks of 64 tokens, but chunks are 32"),
        ((Segment(0, "k", 33, "q8_0"), Segment(0, "k", 31, "q5_0")), "has rank 33, expected a multiple of 32"),
    ],
)
def test_impossible_segments(segments: tuple[Segment, ...], text: str, tiny: Callable[[str], Tiny]) -> None:
    from dataclasses import replace

    params = tiny("llama").bases(2, 32).params()
    rest = tuple(s for s in params.segments if segments and (s.group, s.kind) != (segments[0].group, segments[0].kind))
    with pytest.raises(OptionError, match=text), native.scope(replace(params, segments=segments + rest)):
        pass
