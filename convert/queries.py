"""How much an error of each number of K costs: as much as the queries that meet it are large. Pure functions.

A score is the product of a query and a key, so an error e of the key's number i changes it by q_i e. Numbers whose
queries are large need more bits; multiplying K by the root mean square of its queries (and dividing queries by it)
makes errors of all numbers weigh the same, for the choice of directions as well as for their bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]

LEAST = 1e-3
"""Mean square of a number's queries, at least, as a share of the mean of all: a query can be larger than in
calibration."""


def key_scales(energy: Sequence[F64]) -> list[npt.NDArray[np.float32]]:
    """What K is multiplied with.

    Parameters
    ----------
    energy : sequence of ndarray, shape (n_embd_k,) each
        By layer: mean square of the queries that meet each number of K.

    Returns
    -------
    list of ndarray of float32
        Above 0; their mean square over all layers is about 1. Ones where queries are 0 or not finite.
    """
    mean = float(np.mean(np.concatenate(energy)))
    if not mean > 0 or not np.isfinite(mean):  # what is not finite shows in K and V, by layer
        return [np.ones(len(e), dtype=np.float32) for e in energy]
    return [np.sqrt(np.maximum(e / mean, LEAST)).astype(np.float32) for e in energy]
