"""From Gram sums to bases, means and spectra. Pure maths in float64."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from xkv_gguf.errors import CalibrationError

F64 = npt.NDArray[np.float64]
Key = TypeVar("Key")

HELD = 0.999
"""Share of the variance that the directions of an f16 basis hold at least."""

HELD_STEP = 128
"""Whole blocks of every type, so that no plan ends inside one for want of directions."""


@dataclass(frozen=True)
class Basis:
    """Principal directions of one kind (K or V) of one group.

    Attributes
    ----------
    basis : ndarray, shape (R, D)
        Row i is the i-th unit eigenvector of the covariance, by descending variance. The last ones, which hold next to
        none of it, may be missing.
    mean : ndarray of float64, shape (D,)
    spectrum : ndarray of float64, shape (D,)
        Variance along each direction, descending, never negative.
    """

    basis: npt.NDArray[np.floating]
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
    cov = gram / n_tokens
    for row, value in zip(cov, mean, strict=True):  # without a temporary matrix
        row -= value * mean
    return cov, mean


def fix_signs(rows: F64) -> F64:
    """Turn every row so that its entry of largest magnitude (the first one of equals) is positive."""
    peak = np.argmax(np.abs(rows), axis=1)
    signs = np.where(rows[np.arange(len(rows)), peak] < 0, -1.0, 1.0)
    return rows * signs[:, None]


def n_held(spectrum: F64, share: float = HELD) -> int:
    """Directions that are kept: those that hold `share` of the variance, up to a whole `HELD_STEP`, at most all."""
    sums = np.cumsum(spectrum)
    n = int(np.searchsorted(sums, share * sums[-1])) + 1
    return min(-(-n // HELD_STEP) * HELD_STEP, len(spectrum))


def solve_gram(gram: F64, total: F64, n_tokens: int, what: str, dtype: npt.DTypeLike = np.float64) -> Basis:
    """Centre the Gram sums and find the principal directions.

    Parameters
    ----------
    gram, total, n_tokens
        See `covariance`.
    what : str
        Which statistics these are, for error texts: "K of layers 0-4".
    dtype : dtype
        Of the basis. In f16, only the directions of `n_held` are kept.

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
    del gram
    values: Any
    vectors: Any
    try:
        values, vectors = torch.linalg.eigh(torch.from_numpy(cov))
    except RuntimeError as err:  # torch's LinAlgError is one
        raise CalibrationError(f"{what}: the eigenproblem did not converge") from err
    del cov
    spectrum = np.maximum(values.numpy()[::-1], 0.0)
    rows = vectors.numpy().T[::-1]
    rank = n_held(spectrum) if np.dtype(dtype) == np.float16 else len(rows)
    basis = np.empty((rank, len(rows)), dtype)
    for start in range(0, rank, HELD_STEP):
        block = slice(start, min(start + HELD_STEP, rank))
        basis[block] = fix_signs(np.ascontiguousarray(rows[block]))
    return Basis(basis, mean, np.ascontiguousarray(spectrum))


class Solver(Generic[Key]):
    """Solves several problems at a time, each on one thread.

    The results do not depend on the number of threads, unlike those of a threaded eigenproblem.

    Parameters
    ----------
    threads : int
        Problems at a time; no more of them are in memory.
    basis_type : str
        "f16" or "f32": what finished bases are rounded to.
    progress : callable
        Called without arguments when a problem is solved.
    """

    def __init__(self, threads: int, basis_type: str, progress: Callable[[], object]) -> None:
        import torch

        self._threads = threads
        self._dtype = np.float16 if basis_type == "f16" else np.float32
        self._progress = progress
        self._running: dict[Future[Basis], Key] = {}
        self._done: dict[Key, Basis] = {}
        self._order: list[Key] = []
        self._torch_threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(threads)

    def __enter__(self) -> Solver[Key]:
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        import torch

        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._torch_threads)

    def submit(self, key: Key, gram: F64, total: F64, n_tokens: int, what: str) -> None:
        """Add a problem, see `solve_gram`; waits while as many as there are threads are in work.

        Raises
        ------
        CalibrationError
            An earlier problem cannot be solved.
        """
        while len(self._running) >= self._threads:
            self._collect()
        self._order.append(key)
        self._running[self._pool.submit(self._solve, gram, total, n_tokens, what)] = key

    def results(self) -> dict[Key, Basis]:
        """Wait for all problems; the results are in the order of `submit`.

        Raises
        ------
        CalibrationError
            A problem cannot be solved.
        """
        while self._running:
            self._collect()
        return {key: self._done[key] for key in self._order}

    def _collect(self) -> None:
        for future in wait(self._running, return_when=FIRST_COMPLETED).done:
            self._done[self._running.pop(future)] = future.result()
            self._progress()

    def _solve(self, gram: F64, total: F64, n_tokens: int, what: str) -> Basis:
        import torch

        torch.set_num_threads(1)  # of this pool thread
        return solve_gram(gram, total, n_tokens, what, self._dtype)


def residual_energy(
    gram: F64, total: F64, n_tokens: int, basis: npt.NDArray[np.floating], mean: F64, rank: int
) -> float:
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
