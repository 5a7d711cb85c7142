"""Which directions are kept, and with how many bits: reverse water-filling over all groups, K and V together.

Pure functions of spectra. A direction of relative variance v costs `v * noise(type)` when it is stored and `v` when it
is dropped. At the best plan, a byte more buys the same everywhere; that price is found by bisection, and what is left
of the budget then goes where it helps most. The work of a direction can be charged beside its bytes: the budget is
still one of bytes, but they go to directions that gain more for their work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from ..errors import OptionError
from .coef_types import TYPES
from .waterfill import STEP, Problem, fill

Spectrum = npt.NDArray[np.floating]
Kind = Literal["k", "v"]
KINDS: tuple[Kind, ...] = ("k", "v")
Layers = tuple[int, ...]
"""Layers of a group, ascending."""

MAX_SEGMENTS = 4

MOST_RISE = 0.02
"""Share by which the predicted distortion may rise at most where the plan chooses the price of work itself."""

WORK_PRICES = (0.25, 0.125, 0.0625)
"""Prices of work that the plan chooses from, before none."""


@dataclass(frozen=True)
class Segment:
    """Directions of one kind of one group, after those of the segment before.

    Coefficients are in `type`, the directions themselves in `type_basis`.
    """

    group: int
    kind: Kind
    rank: int
    type: str
    type_basis: str = "q8_0"


@dataclass(frozen=True)
class Statistics:
    """What a plan needs to know of a model's groups of layers.

    Attributes
    ----------
    layers : tuple of tuple of int
        Of each group.
    spectra : dict of str to tuple of ndarray
        By kind and group: variance along each of the group's D directions, descending. Empty for V that is a part of K.
    weights : dict of str to tuple of float
        By kind and group: what one unit of relative distortion costs.
    frame : int
        Tokens per chunk.
    kld_scale : float
        Mean divergence of the next-token distribution, in nats, per unit of distortion; 0 when unknown.
    held : dict of str to tuple of int
        By kind and group: the directions that are known, of which a plan takes the first ones. Empty: all D.
    """

    layers: tuple[Layers, ...]
    spectra: dict[Kind, tuple[Spectrum, ...]]
    weights: dict[Kind, tuple[float, ...]]
    frame: int
    kld_scale: float = 0.0
    held: dict[Kind, tuple[int, ...]] = field(default_factory=dict)

    def most(self, group: int, kind: Kind) -> int:
        """Most directions that a plan can take, D or less."""
        return self.held[kind][group] if self.held else self.dim(group, kind)

    def dim(self, group: int, kind: Kind) -> int:
        """Numbers per token of one kind of a group: D."""
        return len(self.spectra[kind][group])

    def variances(self, group: int, kind: Kind) -> npt.NDArray[np.float64]:
        """Weighted share of the variance along each direction, shape (D,); zeros for a spectrum of zeros."""
        spectrum = np.asarray(self.spectra[kind][group], dtype=np.float64)
        total = spectrum.sum()
        return self.weights[kind][group] * spectrum / total if total > 0 else np.zeros_like(spectrum)


@dataclass(frozen=True)
class Charge:
    """What the work of one direction counts as, in bytes per stored token: among the first `lead`, and beyond."""

    lead: int
    within: float
    beyond: float

    def steps(self, n_step: int) -> npt.NDArray[np.float64]:
        """Bytes per stored token of each step of 32 directions, shape (n_step,)."""
        return STEP * np.where(np.arange(n_step) * STEP < self.lead, self.within, self.beyond)


@dataclass(frozen=True)
class Prices:
    """What is counted against a budget, and what else is weighed.

    Attributes
    ----------
    slots : int
        Tokens that the store has room for; 1 to count bytes per token.
    bases : mapping of str to str
        Type of the directions by the type of their coefficients.
    basis_sets : int
        Times that a direction's bytes in the basis count: 0 to leave them out, more than 1 where streams have bases of
        their own.
    charges : mapping of (group, kind) to Charge
        What work counts as at a price of 1, see `work.work_charges`; empty where work does not matter.
    work_price : float or None
        How much of the charges counts. None takes the highest of `WORK_PRICES` with which the predicted distortion is
        at most `MOST_RISE` above that without.
    """

    slots: int
    bases: Mapping[str, str] = field(hash=False)
    basis_sets: int = 1
    charges: Mapping[tuple[int, Kind], Charge] = field(default_factory=dict, hash=False)
    work_price: float | None = None


def of_groups(stats: Statistics, groups: Sequence[int]) -> Statistics:
    """The same statistics of some groups, which count from 0 there."""
    return replace(
        stats,
        layers=tuple(stats.layers[g] for g in groups),
        spectra={kind: tuple(stats.spectra[kind][g] for g in groups) for kind in KINDS},
        weights={kind: tuple(stats.weights[kind][g] for g in groups) for kind in KINDS},
        held={kind: tuple(stats.held[kind][g] for g in groups) for kind in KINDS} if stats.held else {},
    )


def keep_at_most(stats: Statistics, max_rank: int) -> Statistics:
    """The same statistics, of which a plan takes at most `max_rank` directions of each kind and group."""
    held: dict[Kind, tuple[int, ...]] = {
        kind: tuple(min(max_rank, stats.most(g, kind)) for g in range(len(stats.layers))) for kind in KINDS
    }
    return replace(stats, held=held)


def energy_kept(spectrum: Spectrum, rank: int) -> float:
    """Share of the variance that the first `rank` directions hold, 0 to 1 (1 for a spectrum of zeros)."""
    total = float(np.sum(spectrum, dtype=np.float64))
    return float(np.sum(spectrum[:rank], dtype=np.float64)) / total if total > 0 else 1.0


def assumed_spectrum(dim: int) -> Spectrum:
    """Variances that are assumed where nothing was measured: direction i has 1 / (i + 8)^1.5.

    An assumption about the shape only: a heavy tail after a steep beginning. It decides how many bits each direction
    gets until bases are learnt, which directions these are it does not say.
    """
    result: Spectrum = (np.arange(dim) + 8.0) ** -1.5
    return result


def granule(type_name: str, kind: Kind, frame: int) -> int:
    """Directions that a segment of a type is a multiple of; 0 when the type cannot be used.

    A row of K is a token, so that a quantization block lies along the directions. A row of V is a direction, so that
    a block lies along the tokens of a chunk and has to fit into it.
    """
    block = TYPES[type_name].block
    if kind == "k":
        return max(STEP, block)
    return STEP if frame % block == 0 else 0


def stored_rank(segment: Segment) -> int:
    """Coefficients per token of a segment: its rank, and zeros up to a whole block of K (of 32 directions of V)."""
    step = max(STEP, TYPES[segment.type].block) if segment.kind == "k" else STEP
    return -(-segment.rank // step) * step


def plan_segments(
    stats: Statistics, types: Sequence[str], max_segments: int, prices: Prices, budget: float
) -> tuple[Segment, ...] | None:
    """The segments with the least distortion in a budget.

    Parameters
    ----------
    stats : Statistics
    types : sequence of str
        Coefficient types that may be used, by descending bytes.
    max_segments : int
        Most segments of one kind of one group.
    prices : Prices
    budget : float
        Bytes, for what `prices` counts.

    Returns
    -------
    tuple of Segment, or None
        By group, K before V, then by descending variance; None when even the smallest plan is over the budget. Every
        kind of every group keeps at least one segment.
    """
    problem, names = _problem(stats, types, max_segments, prices)

    def found(work_price: float) -> tuple[Segment, ...] | None:
        counts = fill(replace(problem, charges=work_price * problem.charges), budget)
        return None if counts is None else _segments(stats, counts, names, prices)

    if prices.work_price is not None:
        return found(prices.work_price)
    free = found(0.0)
    if free is None or not prices.charges:
        return free
    most = (1 + MOST_RISE) * distortion(stats, free)
    for work_price in WORK_PRICES:
        steered = found(work_price)
        if steered is not None and distortion(stats, steered) <= most:
            return steered
    return free


def _segments(
    stats: Statistics, counts: npt.NDArray[np.int64], names: Sequence[str], prices: Prices
) -> tuple[Segment, ...]:
    """Segments of steps by source and type, shape (N, T)."""
    segments = []
    for row, (g, kind) in zip(counts, sources(stats), strict=True):
        left = stats.most(g, kind)
        for name, n in zip(names, row, strict=True):
            if n > 0:
                segments.append(Segment(g, kind, min(int(n) * STEP, left), name, prices.bases[name]))
                left -= segments[-1].rank
    return tuple(segments)


def least_cost(stats: Statistics, types: Sequence[str], max_segments: int, prices: Prices) -> float:
    """Bytes of the smallest plan; parameters as in `plan_segments`."""
    return _problem(stats, types, max_segments, prices)[0].least_cost()


def same_rank(
    stats: Statistics, rank: int | tuple[int, int] | None, type_name: str, type_basis: str
) -> tuple[Segment, ...]:
    """One segment for every kind of every group, of the same rank (at most all known directions) or of all (None).

    A pair is of K and of V.

    Raises
    ------
    OptionError
        The rank is no multiple of what the type needs, or the type cannot be used for V.
    """
    segments = []
    for g, kind in sources(stats):
        step, dim = granule(type_name, kind, stats.frame), stats.most(g, kind)
        wanted = rank[KINDS.index(kind)] if isinstance(rank, tuple) else rank
        if step == 0:
            raise OptionError(
                f"type {type_name} for V: its blocks of {TYPES[type_name].block} tokens do not fit into chunks of "
                f"{stats.frame}; use another type"
            )
        if wanted is not None and wanted < dim and (wanted < 1 or wanted % step):
            raise OptionError(f"rank {wanted}: a multiple of {step} (for {type_name}), or 'full', expected")
        segments.append(Segment(g, kind, dim if wanted is None else min(wanted, dim), type_name, type_basis))
    return tuple(segments)


def distortion(stats: Statistics, segments: Sequence[Segment]) -> float:
    """Predicted distortion: over all groups and kinds, the weighted share of the variance that is lost.

    Dropped directions lose theirs, stored ones the noise of their type and of their basis's.
    """
    done = dict.fromkeys(sources(stats), 0)
    lost = sum(float(stats.variances(*source).sum()) for source in done)
    for segment in segments:
        source = (segment.group, segment.kind)
        kept = float(stats.variances(*source)[done[source] : done[source] + segment.rank].sum())
        lost -= kept * (1 - TYPES[segment.type].noise - TYPES[segment.type_basis].noise)
        done[source] += segment.rank
    return max(0.0, lost)


def sources(stats: Statistics) -> list[tuple[int, Kind]]:
    """Groups and kinds that are stored, K before V: V that is a part of K is not."""
    return [(g, kind) for g in range(len(stats.layers)) for kind in KINDS if stats.dim(g, kind) > 0]


def _problem(
    stats: Statistics, types: Sequence[str], max_segments: int, prices: Prices
) -> tuple[Problem, tuple[str, ...]]:
    """The plan in steps of 32 directions, and the types that its columns stand for."""
    found = sources(stats)
    steps = {(kind, t): granule(t, kind, stats.frame) for kind in KINDS for t in types}
    for kind in {kind for _, kind in found}:
        if not any(steps[kind, t] for t in types):
            raise OptionError(
                f"coefficient types {'+'.join(types)}: none has blocks that fit into chunks of {stats.frame} tokens, "
                f"as {kind.upper()} needs; allow a type with smaller blocks"
            )
    dims = np.array([stats.dim(*source) for source in found])
    # a segment may end inside a block where the directions end, so the last block counts as whole
    longest = max(step for step in steps.values()) // STEP
    most = np.array([stats.most(*source) for source in found])
    n_step = int(-(-most.max() // STEP)) + longest - 1
    gains = np.zeros((len(found), n_step))
    for i, source in enumerate(found):
        padded = np.zeros(n_step * STEP)
        padded[: most[i]] = stats.variances(*source)[: most[i]]
        gains[i] = padded.reshape(n_step, STEP).sum(axis=1)
    costs = np.empty((len(found), len(types), n_step))
    for j, t in enumerate(types):
        basis_bytes = TYPES[prices.bases[t]].bytes * prices.basis_sets
        costs[:, j] = STEP * (TYPES[t].bytes * prices.slots + basis_bytes * dims[:, None])
    keep = np.array([1 - TYPES[t].noise - TYPES[prices.bases[t]].noise for t in types])
    granules = np.array([[steps[kind, t] // STEP for t in types] for _, kind in found])
    ends = -(-most // STEP)
    charges = np.zeros((len(found), n_step))
    for i, source in enumerate(found):
        if source in prices.charges:
            charges[i] = prices.slots * prices.charges[source].steps(n_step)
    return Problem(gains, costs, charges, keep, granules, ends, min(max_segments, len(types))), tuple(types)
