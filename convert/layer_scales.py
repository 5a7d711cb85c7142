"""Scales of K and V by layer, so that a group's errors weigh the same in all of its layers. Pure functions.

A basis keeps what has most energy, whichever layer it comes from. But layers of one group can differ by more than ten
times in how much the model minds an error of a given energy. So K and V are multiplied by a number per layer before
they are stored: the root of what a unit of error costs there. The graph divides by it again where they are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from xkv_gguf.convert.capture import Sums
from xkv_gguf.plan.segments import KINDS, Kind
from xkv_gguf.sidecar.info import Group


def layer_scales(
    weights: Mapping[Kind, Sequence[float]], variances: Mapping[Kind, Sequence[float]]
) -> dict[Kind, tuple[float, ...]]:
    """Scales from what errors cost.

    Parameters
    ----------
    weights : mapping of kind to sequence of float
        By layer: what losing a share of its variance costs, above 0.
    variances : mapping of kind to sequence of float
        By layer: its variance, summed over its numbers.

    Returns
    -------
    dict of kind to tuple of float
        By layer: the root of weight over variance, of geometric mean 1 or nearly; 1 for a layer without variance.
    """
    found: dict[Kind, tuple[float, ...]] = {}
    for kind in KINDS:
        cost = np.array([w / v if v > 0 else np.nan for w, v in zip(weights[kind], variances[kind], strict=True)])
        known = np.isfinite(cost)
        logs = 0.5 * np.log(cost, where=known, out=np.zeros(len(cost)))
        logs[known] -= logs[known].mean() if known.any() else 0.0
        # few digits, so that rounding in the model's arithmetic does not show
        found[kind] = tuple(float(f"{scale:.3g}") for scale in np.exp(logs))
    return found


def scaled(sums: Sums, scales: Sequence[float], sizes: Sequence[int]) -> Sums:
    """Sums over a group's tokens as if each layer's numbers had been multiplied by its scale.

    Parameters
    ----------
    sums : Sums
    scales, sizes : sequence
        By layer of the group: its scale and its numbers per token.
    """
    by_number = np.repeat(np.asarray(scales, np.float64), sizes)
    return Sums(sums.gram * np.outer(by_number, by_number), sums.total * by_number, sums.n_tokens)


def group_weights(
    weights: Mapping[Kind, Sequence[float]], groups: Sequence[Group]
) -> tuple[dict[Kind, tuple[float, ...]], float]:
    """Weights of groups of scaled layers: the sums of their layers', of mean 1; and what they were divided by."""
    table = np.array([[sum(weights[kind][il] for il in g.layers) for g in groups] for kind in KINDS])
    mean = float(table.mean())
    return {kind: tuple(float(f"{w:.2g}") for w in row / mean) for kind, row in zip(KINDS, table, strict=True)}, mean
