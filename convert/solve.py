"""From Gram sums to bases, means and spectra. Pure maths in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from xkv_gguf.errors import CalibrationError

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Basis:
    """Principal directions of one kind (K or V) of one group.

    Attributes
    ----------
    basis : ndarray of float64, shape (D, D)
        Row i is the i-th unit eigenvector of the covariance, by descending variance.
    mean : ndarray of float64, shape (D,)
    spectrum : ndarray of float64, shape (D,)
        Variance along each direction, descending, never negative.
    """

    basis: F64
    mean: F64
    spectrum: F64


def covariance(gram: F64, total: F64, n_tokens: int) -> tuple[F64, F64]:
    """Covariance and mean from sums of outer products and of vectors.

    Parameters
    ----------
    gram : ndarray of float64, shape (D, D)
        Sum of x x^T over the tokens.
    total : ndarray of float64, shape (D,)
        Sum of x.
    n_tokens : int
        Number of tokens, at least 1.

    Returns
    -------
    cov, mean : ndarray of float64, shapes (D, D) and (D,)
    """
    mean = total / n_tokens
    cov = gram / n_tokens - np.outer(mean, mean)
    return 0.5 * (cov + cov.T), mean


def fix_signs(rows: F64) -> F64:
    """Turn every row so that its entry of largest magnitude (the first one of equals) is positive."""
    peak = np.argmax(np.abs(rows), axis=1)
    signs = np.where(rows[np.arange(len(rows)), peak] < 0, -1.0, 1.0)
    return rows * signs[:, None]


def solve_gram(gram: F64, total: F64, n_tokens: int, what: str) -> Basis:
    """Centre the Gram sums and find the principal directions.

    Parameters
    ----------
    gram, total, n_tokens
        See `covariance`.
    what : str
        Which statistics these are, for error texts: "K of layers 0-4".

    Returns
    -------
    Basis

    Raises
    ------
    CalibrationError
        There are no tokens, or the sums hold values that are not finite.
    """
    import torch

    if n_tokens < 1:
        raise CalibrationError(f"{what}: no tokens were captured; more calibration text is needed")
    if not (np.isfinite(gram).all() and np.isfinite(total).all()):
        bad = int(np.flatnonzero(~(np.isfinite(total) & np.isfinite(np.diagonal(gram))))[:1].sum())
        raise CalibrationError(
            f"{what}: the captured sums are not finite (first at number {bad}); the model computes NaN or infinity"
        )
    cov, mean = covariance(gram, total, n_tokens)
    values: Any
    vectors: Any
    try:
        values, vectors = torch.linalg.eigh(torch.from_numpy(cov))
    except RuntimeError as err:  # torch's LinAlgError is one
        raise CalibrationError(f"{what}: the eigenproblem did not converge") from err
    spectrum = np.maximum(values.numpy()[::-1], 0.0)
    basis = fix_signs(np.ascontiguousarray(vectors.numpy().T[::-1]))
    return Basis(basis, mean, np.ascontiguousarray(spectrum))


def residual_energy(gram: F64, total: F64, n_tokens: int, basis: F64, mean: F64, rank: int) -> float:
    """Share of a text's variance that a basis made elsewhere loses.

    Parameters
    ----------
    gram, total, n_tokens
        Sums over the text, see `covariance`.
    basis : ndarray, shape (D, D)
        Rows are orthonormal.
    mean : ndarray, shape (D,)
        The mean that is subtracted, the calibrated one.
    rank : int
        Rows of the basis in use.

    Returns
    -------
    float
        E|x - mean - B^T B (x - mean)|^2 over E|x - mean_text|^2, so that a mean that does not fit counts too.
    """
    own = total / n_tokens
    second = gram / n_tokens
    around = second - np.outer(own, mean) - np.outer(mean, own) + np.outer(mean, mean)
    used = basis[:rank].astype(np.float64)
    kept = float(np.einsum("ij,jk,ik->", used, around, used, optimize=True))
    variance = float(np.trace(second) - own @ own)
    return (float(np.trace(around)) - kept) / variance
