"""How the bytes of a store are divided while it is not full. Pure functions.

A store that is allocated for n_ctx tokens is empty at first. In each of a few stages, the same bytes are divided among
fewer tokens, which get more directions and more bits; a full stage is coded anew for the next one. So short contexts
lose less, and bases are computed from tokens that were rounded finely.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from xkv_gguf.convert.plan import Prices, Segment, Statistics, distortion, plan_segments
from xkv_gguf.convert.sizes import SLOT_PAD

LAST = 1.5
"""Tokens of the full store over those of the stage before, at whose end the last bases are computed: the later the
better they fit, but what was stored until then is rounded once more."""

GROWTH = 3.0
"""Tokens of any other stage over those of the one before."""

FEWEST = 512
"""Tokens of the first stage, at least."""

NEGLIGIBLE = 0.01
"""A stage that loses less than this share of what the full store loses has no stage before it."""

TENSOR_PAD = 128
"""Bytes that a tensor can take beyond its own, so that the next one is aligned."""


@dataclass(frozen=True)
class Stage:
    """Segments while at most `n_slot` tokens are stored."""

    n_slot: int
    segments: tuple[Segment, ...]


def plan_stages(
    stats: Statistics,
    segments: Sequence[Segment],
    n_slot: int,
    n_bytes: int,
    types: Sequence[str],
    max_segments: int,
    bases: Mapping[str, str],
) -> tuple[Stage, ...]:
    """The stages before a store is full.

    Parameters
    ----------
    stats : Statistics
    segments : sequence of Segment
        Of the full store.
    n_slot : int
        Tokens that the full store has room for.
    n_bytes : int
        Bytes of its coefficients and bases.
    types : sequence of str
        Coefficient types that may be used, by descending bytes.
    max_segments : int
        Most segments of one kind of one group.
    bases : mapping of str to str
        Type of the directions by the type of their coefficients.

    Returns
    -------
    tuple of Stage
        By ascending `n_slot`; none takes more than `n_bytes`, or loses more than the stage after it.
    """
    n_tensor = sum((1 + stats.count[g]) * max_segments for g in range(len(stats.first))) * 2
    budget = n_bytes - TENSOR_PAD * n_tensor
    lost = full = distortion(stats, segments)
    found: list[Stage] = []
    size = int(n_slot / LAST)
    while size >= FEWEST and lost > NEGLIGIBLE * full:
        size -= size % SLOT_PAD
        stage = plan_segments(stats, types, max_segments, Prices(size, bases), budget)
        if stage is None or distortion(stats, stage) > lost:
            break
        lost = distortion(stats, stage)
        found.append(Stage(size, stage))
        size = int(size / GROWTH)
    return tuple(reversed(found))
