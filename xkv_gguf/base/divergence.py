"""Divergence of next-token distributions, in nats. In float64, whatever the logits are."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]


def log_softmax(logits: Array) -> Floats:
    """Log-probabilities from logits.

    Parameters
    ----------
    logits : array, shape (..., n_vocab)

    Returns
    -------
    array of float64, the same shape
        Their exponentials add up to 1 along the last axis.
    """
    shifted: Floats = np.asarray(logits).astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def kl_divergence(log_p: Floats, log_q: Floats) -> Floats:
    """Kullback-Leibler divergence KL(p || q) = sum of p (log p - log q), in nats.

    A token to which p gives no probability adds nothing, by the limit of x log x. The sum is never negative; what
    rounding takes below 0 is cut off.

    Parameters
    ----------
    log_p, log_q : array of float64, shape (..., n_vocab)

    Returns
    -------
    array of float64, shape (...)
    """
    p = np.exp(log_p)
    with np.errstate(invalid="ignore"):  # -inf minus -inf, which np.where leaves out
        terms = np.where(p > 0, p * (log_p - log_q), 0.0)
    return np.asarray(np.maximum(terms.sum(axis=-1), 0.0))
