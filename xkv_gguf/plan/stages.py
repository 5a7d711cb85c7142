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
from .segments import KINDS, Prices, Segment, Statistics, distortion, of_groups, plan_segments
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


@dataclass(frozen=True)
class Share:
    """What one device has of a store: the groups that are there, and the bytes of their coefficients and bases."""

    groups: tuple[int, ...]
    n_bytes: int


def plan_stages(
    stats: Statistics,
    shape: ModelShape,
    segments: Sequence[Segment],
    n_slot: int,
    shares: Sequence[Share],
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
    shares : sequence of Share
        Of each device. Bytes stay where they are: in every stage, a device has those of the full store.
    types : sequence of str
        Coefficient types that may be used, by descending bytes.
    max_segments : int
        Most segments of one kind of one group.
    prices : Prices
        Of the full store.

    Returns
    -------
    tuple of Stage
        By ascending `n_slot`; none takes more than its shares, or is predicted to lose more than the stage after it.
    """
    lost = full = distortion(stats, segments)
    plain = _plain_stage(stats, shape, shares)
    fewest = max(FEWEST, GROWTH * plain.n_slot if plain else 0)
    found: list[Stage] = []
    size = int(n_slot / GROWTH)
    while size >= fewest and lost > NEGLIGIBLE * full:
        size -= size % SLOT_PAD
        fresh = _divide(stats, shares, types, max_segments, replace(prices, slots=size))
        if fresh is None or distortion(stats, fresh) > lost:
            break
        lost = distortion(stats, fresh)
        found.append(Stage(size, fresh))
        size = int(size / GROWTH)
    if plain and plain.n_slot < n_slot and plain.distortion(stats) <= lost:
        found.append(plain)
    return tuple(reversed(found))


def _divide(
    stats: Statistics, shares: Sequence[Share], types: Sequence[str], max_segments: int, prices: Prices
) -> tuple[Segment, ...] | None:
    """Segments of every group within the bytes of its device; None where those of one are too few."""
    found: list[Segment] = []
    for share in shares:
        own = of_groups(stats, share.groups)
        n_tensor = sum((1 + len(layers)) * max_segments for layers in own.layers) * 2
        charges = {
            (i, kind): prices.charges[g, kind]
            for i, g in enumerate(share.groups)
            for kind in KINDS
            if (g, kind) in prices.charges
        }
        segments = plan_segments(
            own, types, max_segments, replace(prices, charges=charges), share.n_bytes - TENSOR_PAD * n_tensor
        )
        if segments is None:
            return None
        found += [replace(segment, group=share.groups[segment.group]) for segment in segments]
    return tuple(sorted(found, key=lambda segment: segment.group))


def _plain_stage(stats: Statistics, shape: ModelShape, shares: Sequence[Share]) -> Stage | None:
    """K and V as they are; None where nothing fits, or a head is not whole blocks."""
    if not shape.quantizable:
        return None
    room = []
    for share in shares:
        layers = [layer for g in share.groups for layer in stats.layers[g]]
        numbers = sum(shape.dim(kind, layers) for kind in KINDS)
        budget = share.n_bytes - TENSOR_PAD * 2 * len(layers)
        room.append(int(budget / (numbers * TYPES[PLAIN].bytes)))
    n_slot = min(room)
    n_slot -= n_slot % SLOT_PAD
    return Stage(n_slot, type=PLAIN) if n_slot >= FEWEST else None
