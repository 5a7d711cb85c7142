"""How the bytes of a store are divided while it is not full. Pure functions.

A store that is allocated for n_ctx tokens is empty at first. In each of a few stages, the same bytes are divided among
fewer tokens, which get more directions and more bits; a full stage is coded anew for the next one. The first stage is
plain: while K and V fit as they are, in 8 bits, they are kept so. Short contexts lose and cost what they do with a q8_0
cache, and the first bases of the prompt are computed from tokens that were rounded to 8 bits only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .coef_types import TYPES
from .segments import Prices, Segment, Statistics, distortion, plan_segments
from .sizes import SLOT_PAD, ModelShape

GROWTH = 2.0
"""Tokens of a stage, and of the full store, over those of the stage before, at least. The plain stage is as long as it
fits. The later a stage ends the better the next one's bases fit, but what was stored before is rounded once more."""

FEWEST = 512
"""Tokens of the first stage, at least."""

NEGLIGIBLE = 0.01
"""A stage that loses less than this share of what the full store loses has none before it but the plain one."""

PLAIN = "q8_0"
"""What K and V are stored in while they are kept as they are."""

TENSOR_PAD = 128
"""Bytes that a tensor can take beyond its own, so that the next one is aligned."""


@dataclass(frozen=True)
class Stage:
    """What is stored while there are at most `n_slot` tokens: segments; without any, K and V themselves in `type`."""

    n_slot: int
    segments: tuple[Segment, ...] = ()
    type: str = PLAIN

    def distortion(self, stats: Statistics) -> float:
        """Predicted, see `plan.distortion`."""
        lost = distortion(stats, self.segments)
        return lost if self.segments else lost * TYPES[self.type].noise


def plan_stages(
    stats: Statistics,
    shape: ModelShape,
    segments: Sequence[Segment],
    n_slot: int,
    n_bytes: int,
    types: Sequence[str],
    max_segments: int,
    prices: Prices,
) -> tuple[Stage, ...]:
    """The stages before a store is full.

    Parameters
    ----------
    stats : Statistics
    shape : ModelShape
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
    prices : Prices
        Of the full store.

    Returns
    -------
    tuple of Stage
        By ascending `n_slot`; none takes more than `n_bytes`, or is predicted to lose more than the stage after it.
    """
    n_tensor = sum((1 + len(layers)) * max_segments for layers in stats.layers) * 2
    budget = n_bytes - TENSOR_PAD * n_tensor
    lost = full = distortion(stats, segments)
    plain = _plain_stage(shape, n_bytes)
    fewest = max(FEWEST, GROWTH * plain.n_slot if plain else 0)
    found: list[Stage] = []
    size = int(n_slot / GROWTH)
    while size >= fewest and lost > NEGLIGIBLE * full:
        size -= size % SLOT_PAD
        fresh = plan_segments(stats, types, max_segments, replace(prices, slots=size), budget)
        if fresh is None or distortion(stats, fresh) > lost:
            break
        lost = distortion(stats, fresh)
        found.append(Stage(size, fresh))
        size = int(size / GROWTH)
    if plain and plain.n_slot < n_slot and plain.distortion(stats) <= lost:
        found.append(plain)
    return tuple(reversed(found))


def _plain_stage(shape: ModelShape, n_bytes: int) -> Stage | None:
    """K and V as they are; None where nothing fits, or a head is not whole blocks."""
    if not shape.quantizable:
        return None
    budget = n_bytes - TENSOR_PAD * 2 * len(shape.embd_k)
    n_slot = int(budget / (shape.numbers * TYPES[PLAIN].bytes))
    n_slot -= n_slot % SLOT_PAD
    return Stage(n_slot, type=PLAIN) if n_slot >= FEWEST else None
