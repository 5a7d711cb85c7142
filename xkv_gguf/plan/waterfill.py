"""The search behind `plan`: types along descending variance for many sources under one budget. Pure maths.

Everything is counted in steps of 32 directions. For a price per byte, the best segmentation of each source is found
exactly by dynamic programming, for many prices at a time; the price is then refined until the budget is met, and what
is left is spent by single moves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

STEP = 32
"""Directions in a step."""

F64 = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

PRICES = 32
ROUNDS = 4
PRICE_RANGE = 1e-12


@dataclass(frozen=True)
class Problem:
    """N sources of up to J steps, T types by descending bytes.

    Attributes
    ----------
    gains : ndarray, shape (N, J)
        Variance of the directions of each step, descending; 0 beyond the end.
    costs : ndarray, shape (N, T, J)
        Bytes of a step in each type: what the budget counts.
    charges : ndarray, shape (N, J)
        Bytes that the work of a step counts as beside them where steps are compared; not part of the budget.
    keep : ndarray, shape (T,)
        Share of the variance that a type keeps.
    granules : ndarray of int, shape (N, T)
        Steps that a segment is a multiple of; 0 where the type cannot be used.
    ends : ndarray of int, shape (N,)
        Steps that hold directions. Only the last granule of a source may reach beyond.
    max_segments : int
    """

    gains: F64
    costs: F64
    charges: F64
    keep: F64
    granules: Counts
    ends: Counts
    max_segments: int

    def total(self, counts: Counts) -> float:
        """Bytes of a plan, counts of steps of shape (N, T)."""
        return float(sum(self.value(n, counts[n])[0] for n in range(len(counts))))

    def charge(self, source: int, counts: Counts) -> float:
        """Bytes that the work of one source counts as, counts of shape (T,)."""
        return float(self.charges[source, : int(counts.sum())].sum())

    def value(self, source: int, counts: Counts) -> tuple[float, float]:
        """Bytes and variance kept of one source, counts of shape (T,)."""
        cost = gain = 0.0
        start = 0
        for t in np.flatnonzero(counts):
            end = start + int(counts[t])
            cost += float(self.costs[source, t, start:end].sum())
            gain += float(self.gains[source, start:end].sum() * self.keep[t])
            start = end
        return cost, gain

    def least_cost(self) -> float:
        """Bytes of the smallest plan."""
        return self.total(self.least())

    def least(self) -> Counts:
        """Counts of the smallest plan."""
        return _solve(self, np.ones(1), with_gains=False)[..., 0]


def fill(problem: Problem, budget: float) -> Counts | None:
    """Steps of each type by source, shape (N, T), with the least distortion; None when nothing fits into the budget."""
    best = problem.least()
    slack = 1e-9 * abs(budget)
    if problem.total(best) > budget + slack:
        return None
    cheapest = problem.costs[:, :, :1].min(axis=1)
    high = float((problem.gains / cheapest).max()) * 1e3
    low = high * PRICE_RANGE
    for _ in range(ROUNDS if high > 0 else 0):
        prices = np.geomspace(high, low, PRICES)
        found = _solve(problem, prices)
        fits = 0
        while fits < PRICES and problem.total(found[..., fits]) <= budget + slack:
            best = found[..., fits]
            fits += 1
        if fits in (0, PRICES):
            break
        high, low = float(prices[fits - 1]), float(prices[fits])
    return _spend(problem, best.copy(), budget + slack)


def _solve(problem: Problem, prices: F64, with_gains: bool = True) -> Counts:
    """Best counts for each price, shape (N, T, prices)."""
    n_source, n_type, n_step = problem.costs.shape
    n_seg, n_price = problem.max_segments, len(prices)
    gain = np.concatenate([np.zeros((n_source, 1)), np.cumsum(problem.gains, axis=1)], axis=1) * with_gains
    priced = problem.costs + problem.charges[:, None] * with_gains
    cost = np.concatenate([np.zeros((n_source, n_type, 1)), np.cumsum(priced, axis=2)], axis=2)
    rows, cols = np.arange(n_source)[:, None], np.arange(n_type)[None, :]

    # stay[j]: best value of the first j steps whose last type is t, in s + 1 segments; go[j]: the same before a
    # segment of type t begins. Both of shape (N, T, S, prices).
    stay = np.full((n_step + 1, n_source, n_type, n_seg, n_price), np.inf)
    go = stay.copy()
    go[0, :, :, 0] = 0.0
    for j in range(1, n_step + 1):
        before = j - problem.granules
        usable = (problem.granules > 0) & (before >= 0) & (before < problem.ends[:, None])
        before = np.where(usable, before, 0)
        kept = (gain[:, j, None] - gain[rows, before]) * problem.keep
        spent = cost[rows, cols, j] - cost[rows, cols, before]
        block = np.where(usable[..., None], prices * spent[..., None] - kept[..., None], np.inf)
        stay[j] = np.minimum(stay[before, rows, cols], go[before, rows, cols]) + block[:, :, None, :]
        go[j, :, 1:, 1:] = np.minimum.accumulate(stay[j], axis=1)[:, :-1, :-1]
    return _walk_back(problem, stay, go)


def _walk_back(problem: Problem, stay: F64, go: F64) -> Counts:
    _, n_source, n_type, n_seg, n_price = stay.shape
    ends = stay[1:].transpose(1, 4, 0, 2, 3).reshape(n_source, n_price, -1)
    j, t, s = np.unravel_index(ends.argmin(axis=2), (len(stay) - 1, n_type, n_seg))
    j = j + 1
    n, p = np.indices((n_source, n_price))
    counts: Counts = np.zeros((n_source, n_type, n_price), dtype=np.int64)
    types = np.arange(n_type)
    while (j > 0).any():
        live = j > 0
        size = np.where(live, problem.granules[n, t], 0)
        np.add.at(counts, (n, t, p), size)
        j = j - size
        begins = live & (go[j, n, t, s, p] <= stay[j, n, t, s, p])
        s_before = np.where(begins & (s > 0), s - 1, s)
        earlier: Any = np.where(
            types < t[..., None], stay[j[..., None], n[..., None], types, s_before[..., None], p[..., None]], np.inf
        )
        t = np.where(begins & (j > 0), earlier.argmin(axis=2), t)
        s = s_before
    return counts


def _spend(problem: Problem, counts: Counts, budget: float) -> Counts:
    """Spend what a plan leaves of the budget: single granules, or one type's in place of another's."""
    left = budget - problem.total(counts)
    moves = [_moves(problem, n, row) for n, row in enumerate(counts)]
    while True:
        best: tuple[float, int, int] | None = None
        for n, options in enumerate(moves):
            for i, (cost, charge, gain, _) in enumerate(options):
                rate = gain / max(cost + charge, 1e-300)
                if cost <= left and (best is None or rate > best[0]):
                    best = (rate, n, i)
        if best is None:
            return counts
        _, n, i = best
        cost, _, _, counts[n] = moves[n][i]
        left -= cost
        moves[n] = _moves(problem, n, counts[n])


def _moves(problem: Problem, source: int, counts: Counts) -> list[tuple[float, float, float, Counts]]:
    """Extra bytes, extra charge, extra variance kept (above 0), and counts after every single move of one source."""
    sizes = problem.granules[source]
    cost, gain = problem.value(source, counts)
    charge = problem.charge(source, counts)
    moves = []
    usable = [int(t) for t in np.flatnonzero(sizes)]
    for add in usable:
        for remove in (None, *usable):
            after = counts.copy()
            after[add] += sizes[add]
            if remove is not None:
                after[remove] -= sizes[remove]
            if remove == add or after.min() < 0 or not _allowed(problem, source, after):
                continue
            new_cost, new_gain = problem.value(source, after)
            if new_gain > gain * (1 + 1e-12):
                moves.append((new_cost - cost, problem.charge(source, after) - charge, new_gain - gain, after))
    return moves


def _allowed(problem: Problem, source: int, counts: Counts) -> bool:
    used = np.flatnonzero(counts)
    starts_of_last = np.cumsum(counts)[used] - problem.granules[source][used]
    return len(used) <= problem.max_segments and bool((starts_of_last < problem.ends[source]).all())
