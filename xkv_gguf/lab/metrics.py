"""How far a cache's next-token distributions are from those of the exact cache: arithmetic only.

All logarithms are natural, so divergences are in nats. The calculations are in float64, whatever the logits are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..base.divergence import Array, Floats, kl_divergence, log_softmax
from ..errors import XkvError

ROWS = 16  # at a time: a vocabulary of 150k tokens takes 19 MiB per array and 16 rows


@dataclass(frozen=True)
class Scores:
    """What is known of each scored token, arrays of shape (n,).

    Attributes
    ----------
    kld : array of float64
        Kullback-Leibler divergence of the distribution that the token was drawn from, in nats.
    same_top : array of bool
        Whether both distributions have the same most probable token.
    nll : array of float64
        Minus the log of the probability that the cache under test gave the token, in nats.
    """

    kld: Floats
    same_top: npt.NDArray[np.bool_]
    nll: Floats


def score(reference: Array, logits: Array, tokens: Array) -> Scores:
    """Compare the logits of two caches at the same tokens.

    Parameters
    ----------
    reference, logits : array, shape (n, n_vocab)
        Logits of the exact cache and of the cache under test; row i is what they expect token i to be.
    tokens : array of int, shape (n,)
        The tokens that are really there.

    Returns
    -------
    Scores
        The most probable token is the first one among equals, as in llama-perplexity.
    """
    n = len(tokens)
    found = Scores(np.empty(n), np.empty(n, dtype=np.bool_), np.empty(n))
    for start in range(0, n, ROWS):
        rows = slice(start, min(start + ROWS, n))
        log_p, log_q = log_softmax(reference[rows]), log_softmax(logits[rows])
        found.kld[rows] = kl_divergence(log_p, log_q)
        found.same_top[rows] = log_p.argmax(axis=-1) == log_q.argmax(axis=-1)
        found.nll[rows] = -np.take_along_axis(log_q, np.asarray(tokens[rows])[:, None], axis=-1)[:, 0]
    return found


def join(parts: Iterable[Scores]) -> Scores:
    """Scores of several batches as one."""
    parts = list(parts)
    return Scores(
        np.concatenate([part.kld for part in parts]),
        np.concatenate([part.same_top for part in parts]),
        np.concatenate([part.nll for part in parts]),
    )


def percentile(values: Array, fraction: float) -> float:
    """The value that a fraction of all values does not exceed.

    As ``llama-perplexity --kl-divergence`` defines it: with the values sorted and x = fraction * (n - 1), linear
    between the values number floor(x) and floor(x) + 1, counted from 0. The median is the one at 0.5.

    Parameters
    ----------
    values : array, shape (n,)
        In any order; n >= 1.
    fraction : float
        0 to 1.

    Returns
    -------
    float
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    x = min(max(fraction, 0.0), 1.0) * (len(ordered) - 1)
    below = int(x)
    above = min(below + 1, len(ordered) - 1)
    share = x - below
    return float((1 - share) * ordered[below] + share * ordered[above])


def summarize(scores: Scores) -> dict[str, float]:
    """The figures of a row.

    Parameters
    ----------
    scores : Scores
        Of at least one token.

    Returns
    -------
    dict
        kld_mean, kld_median, kld_p99, kld_p999 in nats; top1, the share of tokens with `same_top`; ppl, the
        perplexity exp(mean of nll).

    Raises
    ------
    XkvError
        A figure is not finite: the model gave logits that are no numbers.
    """
    figures = {
        "kld_mean": float(scores.kld.mean()),
        "kld_median": percentile(scores.kld, 0.5),
        "kld_p99": percentile(scores.kld, 0.99),
        "kld_p999": percentile(scores.kld, 0.999),
        "top1": float(scores.same_top.mean()),
        "ppl": float(np.exp(scores.nll.mean())),
    }
    for name, value in figures.items():
        if not np.isfinite(value):
            raise XkvError(f"{name} is {value}: the model's logits are not all finite numbers")
    return figures
