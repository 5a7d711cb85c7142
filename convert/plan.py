"""How ranks are shared out. Pure functions of spectra."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from xkv_gguf.errors import OptionError

Spectrum = npt.NDArray[np.floating]

RANK_STEP = 32
"""Ranks grow in steps of one ggml quantization block."""

BYTES_PER_COEF: dict[str, float] = {"f32": 4.0, "f16": 2.0, "q8_0": 34 / 32, "q5_0": 22 / 32, "q4_0": 18 / 32}
"""Bytes that one coefficient takes, by ggml type name."""


def bytes_per_coef(type_name: str) -> float:
    """Bytes of one coefficient of a ggml type.

    Raises
    ------
    OptionError
        The type cannot hold coefficients.
    """
    try:
        return BYTES_PER_COEF[type_name]
    except KeyError as err:
        raise OptionError(f"coefficient type {type_name!r}: one of {', '.join(BYTES_PER_COEF)} expected") from err


def group_layers(n_layer: int, group_size: int) -> tuple[list[int], list[int]]:
    """Split layers into consecutive groups of at most `group_size`, as even as can be.

    Returns
    -------
    first, count : list of int
        First layer and number of layers of each group. 32 layers in groups of 5 give 5 5 5 5 4 4 4.

    Raises
    ------
    OptionError
        `group_size` is not in 1 .. `n_layer`.
    """
    if not 1 <= group_size <= n_layer:
        raise OptionError(f"group size {group_size}: 1 to {n_layer} (the model's layers) expected")
    n_group = -(-n_layer // group_size)
    small, extra = divmod(n_layer, n_group)
    count = [small + (i < extra) for i in range(n_group)]
    first = [sum(count[:i]) for i in range(n_group)]
    return first, count


def check_rank(rank: int, dim: int, what: str) -> None:
    """Check that a rank is a multiple of 32 below the dimension, or the dimension itself.

    Raises
    ------
    OptionError
        It is not; the text begins with `what`.
    """
    if rank == dim or (0 < rank < dim and rank % RANK_STEP == 0):
        return
    raise OptionError(f"{what} {rank}: a multiple of {RANK_STEP} below {dim}, or {dim}, expected")


def energy_kept(spectrum: Spectrum, rank: int) -> float:
    """Share of the variance that the first `rank` directions hold, 0 to 1 (1 for a spectrum of zeros)."""
    total = float(np.sum(spectrum, dtype=np.float64))
    return float(np.sum(spectrum[:rank], dtype=np.float64)) / total if total > 0 else 1.0


def ratio_range(dims_k: Sequence[int], dims_v: Sequence[int], bpc_k: float, bpc_v: float) -> tuple[float, float]:
    """Smallest and largest ratio to f16: every rank at its dimension, and every rank at 32.

    Parameters
    ----------
    dims_k, dims_v : sequence of int
        Dimensions of the groups.
    bpc_k, bpc_v : float
        Bytes of one coefficient of K and of V.
    """
    plain = 2.0 * (sum(dims_k) + sum(dims_v))
    full = bpc_k * sum(dims_k) + bpc_v * sum(dims_v)
    least = bpc_k * sum(min(RANK_STEP, d) for d in dims_k) + bpc_v * sum(min(RANK_STEP, d) for d in dims_v)
    return plain / full, plain / least


def plan_ranks(
    spectra_k: Sequence[Spectrum],
    spectra_v: Sequence[Spectrum],
    ratio: float,
    bytes_per_coef_k: float,
    bytes_per_coef_v: float,
) -> tuple[list[int], list[int]]:
    """Ranks that keep the most energy in a given number of bytes per token.

    Starts every group at rank 32 and gives the next 32 directions to the group and kind (K or V) where they hold the
    largest share of that group's variance per byte, as long as the budget lasts. Spectra descend, so the greedy
    choice is the best one up to the last step.

    Parameters
    ----------
    spectra_k, spectra_v : sequence of ndarray
        Per group, the variances per direction in descending order; their lengths are the groups' dimensions D.
    ratio : float
        f16 bytes per token of the whole plain cache over the coefficients' bytes per token.
    bytes_per_coef_k, bytes_per_coef_v : float
        Bytes of one coefficient of K and of V, see `BYTES_PER_COEF`.

    Returns
    -------
    rank_k, rank_v : list of int
        Multiples of 32, or exactly D.

    Raises
    ------
    OptionError
        The ratio is not a number that can be met; the text names the range that can.
    """
    dims_k = [len(s) for s in spectra_k]
    dims_v = [len(s) for s in spectra_v]
    spectra = [*spectra_k, *spectra_v]
    dims = dims_k + dims_v
    cost = [bytes_per_coef_k] * len(dims_k) + [bytes_per_coef_v] * len(dims_v)
    plain = 2.0 * sum(dims)
    ranks = [min(RANK_STEP, d) for d in dims]
    spent = sum(r * c for r, c in zip(ranks, cost, strict=True))
    lowest, highest = ratio_range(dims_k, dims_v, bytes_per_coef_k, bytes_per_coef_v)
    slack = 1e-9
    if not lowest * (1 - slack) <= ratio <= highest * (1 + slack):
        # rounded inwards, so that the printed ends can be asked for
        low, high = math.ceil(lowest * 1000) / 1000, math.floor(highest * 1000) / 1000
        raise OptionError(
            f"ratio {ratio:g}: {low:.3f} (full rank) to {high:.3f} (rank {RANK_STEP} everywhere) expected "
            "for this model and coefficient type"
        )
    budget = plain / ratio * (1 + slack)

    heap: list[tuple[float, int]] = []

    def push(i: int) -> None:
        if ranks[i] < dims[i]:
            step = spectra[i][ranks[i] : ranks[i] + RANK_STEP]
            total = float(np.sum(spectra[i], dtype=np.float64))
            gain = float(np.sum(step, dtype=np.float64)) / total if total > 0 else 0.0
            heapq.heappush(heap, (-gain / (len(step) * cost[i]), i))

    for i in range(len(spectra)):
        push(i)
    while heap:
        _, i = heapq.heappop(heap)
        step = min(RANK_STEP, dims[i] - ranks[i])
        if spent + step * cost[i] > budget:
            continue  # a cheaper kind may still fit
        ranks[i] += step
        spent += step * cost[i]
        push(i)
    n = len(dims_k)
    return ranks[:n], ranks[n:]
