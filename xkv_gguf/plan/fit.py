"""What fits into a memory: the longest context, the largest cache. Pure functions over sizes that others find out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .segments import KINDS, Layers, Segment, stored_rank
from .sizes import CTX_STEP, ModelShape, padded_ctx

RATIOS = (4.0, 2.0, 1.0)
"""f16's bytes over the most that a cache is given: more than a quarter only where none that small can be made."""

SOLVE_BYTES = 16 << 20
"""Eigenproblems in work take about so much (XKV_ONLINE_BYTES), where one fits."""

TRIES = 8
CLOSE = 0.005
"""Share of a budget for which no further one is tried."""


@dataclass(frozen=True)
class Taken:
    """Bytes of a model with one context.

    Attributes
    ----------
    weights : int
    cache : int
        With windowed layers and recurrent state, where the model has them.
    compute : int
        Compute buffers, and the cells of an xkv cache through which a micro-batch passes.
    renewals : int
        The most that flushes, renewals and changes of stage of an xkv cache take for a moment, see `renewal_bytes`.
    """

    weights: int
    cache: int
    compute: int
    renewals: int = 0

    @property
    def allocated(self) -> int:
        """Bytes that are there all the time."""
        return self.weights + self.cache + self.compute

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.allocated + self.renewals


def renewal_bytes(shape: ModelShape, layers: Sequence[Layers], segments: Sequence[Sequence[Segment]]) -> int:
    """The most that flushes and renewals take for a moment: the widest group's bases in f32, twice, and eigenproblems.

    Parameters
    ----------
    shape : ModelShape
    layers : sequence of tuple of int
        Of each group.
    segments : sequence of sequence of Segment
        Of each stage that has bases.
    """
    widest = max(
        sum(
            stored_rank(s) * shape.dim(kind, layers[group])
            for kind in KINDS
            for s in stage
            if (s.group, s.kind) == (group, kind)
        )
        for stage in segments
        for group in range(len(layers))
    )
    return SOLVE_BYTES + 8 * widest


def longest(size: Callable[[int], int | None], memory: int, most: int) -> int | None:
    """The longest context that fits into a memory.

    Parameters
    ----------
    size : callable
        Bytes in all of a context of so many tokens, which grow with them; None where such a cache is out of reach,
        which short contexts are.
    memory : int
    most : int
        Tokens that are enough.

    Returns
    -------
    int or None
        A multiple of `CTX_STEP`, or `most` rounded up to one. None where none fits.
    """
    low, high = CTX_STEP, padded_ctx(most)
    low_size, high_size = size(low), size(high)
    if high_size is not None and high_size <= memory:
        return high
    if low_size is not None and low_size > memory:
        return None
    for turn in range(64):
        if high - low <= CTX_STEP:
            break
        middle = (low + high) // 2
        # sizes are straight lines but for steps: where those mislead, halves get there
        if turn % 4 < 3 and low_size is not None and high_size is not None:
            middle = low + (high - low) * (memory - low_size) // (high_size - low_size)
        middle = min(max(middle // CTX_STEP * CTX_STEP, low + CTX_STEP), high - CTX_STEP)
        found = size(middle)
        if found is None or found <= memory:
            low, low_size = middle, found
        else:
            high, high_size = middle, found
    return None if low_size is None else low


def largest_budget(take: Callable[[int], tuple[int, int]], memory: int, most: int) -> int | None:
    """The bytes of the largest cache with which all fits into a memory.

    Parameters
    ----------
    take : callable
        From a budget to the bytes of its cache, and bytes in all.
    memory : int
    most : int
        Bytes of a cache that are enough.

    Returns
    -------
    int or None
        None where what is beside the cache leaves no room.
    """
    best, budget = None, most
    for _ in range(TRIES):
        cache, total = take(budget)
        if total <= memory:
            best = max(budget, best or 0)
        # what is beside this cache leaves so much; beside another one, nearly so, and beside a smaller one maybe more
        left = memory - (total - cache)
        budget = min(most, left) if left > 0 else min(cache, budget) // 2
        if budget <= 0 or (best is not None and budget <= best * (1 + CLOSE)):
            break
    return best
