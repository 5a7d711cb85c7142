from __future__ import annotations

import numpy as np
import pytest

from xkv_gguf.convert.solve import F64, HELD_STEP, Basis, fix_signs, n_held, residual_energy, solve_gram
from xkv_gguf.errors import CalibrationError


def sample(n: int = 500, dim: int = 24) -> F64:
    rng = np.random.default_rng(0)
    scale = np.linspace(3.0, 0.1, dim)
    mix = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    x: F64 = (rng.standard_normal((n, dim)) * scale) @ mix + rng.standard_normal(dim) * 5
    return x


def solve(x: F64) -> Basis:
    return solve_gram(x.T @ x, x.sum(0), len(x), "K of layers 0-1")


def test_matches_svd_of_centred_data() -> None:
    x = sample()
    found = solve(x)
    _, sigma, vt = np.linalg.svd(x - x.mean(0), full_matrices=False)
    np.testing.assert_allclose(found.mean, x.mean(0))
    np.testing.assert_allclose(found.spectrum, sigma**2 / len(x), rtol=1e-8)
    np.testing.assert_allclose(found.basis, fix_signs(vt), atol=1e-6)
    np.testing.assert_allclose(found.basis @ found.basis.T, np.eye(24), atol=1e-12)


def test_descending_and_never_negative() -> None:
    x = np.repeat(sample(5), 3, axis=0)  # rank 4: rounding makes tiny eigenvalues of either sign
    found = solve(x)
    assert (np.diff(found.spectrum) <= 0).all()
    assert (found.spectrum >= 0).all()
    assert (found.spectrum[4:] < 1e-9).all()


def test_signs_do_not_depend_on_the_input_sign() -> None:
    x = sample()
    x -= x.mean(0)
    np.testing.assert_array_equal(solve(x).basis, solve(-x).basis)
    peak = np.abs(solve(x).basis).argmax(1)
    assert (solve(x).basis[np.arange(24), peak] > 0).all()


def test_first_of_equal_peaks_decides_the_sign() -> None:
    np.testing.assert_array_equal(fix_signs(np.array([[-0.5, 0.5], [0.5, -0.5]])), [[0.5, -0.5], [0.5, -0.5]])


def test_directions_without_variance_are_left_out() -> None:
    """Of f16 bases only, in whole blocks, and the spectrum has all."""
    x = sample(400, 300) * 0.01
    x[:, :100] += sample(400, 100)
    sums = (x.T @ x, x.sum(0), len(x), "K of layers 0-1")
    whole, half = solve_gram(*sums, np.float32), solve_gram(*sums, np.float16)
    assert whole.basis.shape == (300, 300) and half.basis.shape == (HELD_STEP, 300)
    np.testing.assert_allclose(half.basis, whole.basis[:HELD_STEP], atol=1e-3)
    np.testing.assert_array_equal(half.spectrum, whole.spectrum)
    assert half.spectrum[:HELD_STEP].sum() >= 0.999 * half.spectrum.sum()


def test_number_of_held_directions() -> None:
    assert n_held(np.ones(1000)) == 1000
    assert n_held(np.concatenate([np.ones(130), np.full(870, 1e-6)])) == 256
    assert n_held(np.zeros(200)) == HELD_STEP


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_sums_that_are_not_finite_name_the_layers(bad: float) -> None:
    x = sample()
    gram = x.T @ x
    gram[3, 3] = bad
    with pytest.raises(CalibrationError, match=r"K of layers 0-1: .*not finite \(first at number 3\)"):
        solve_gram(gram, x.sum(0), len(x), "K of layers 0-1")


def test_no_tokens() -> None:
    with pytest.raises(CalibrationError, match="K of layers 0-1: no tokens"):
        solve_gram(np.zeros((4, 4)), np.zeros(4), 0, "K of layers 0-1")


def test_residual_energy_matches_the_direct_computation() -> None:
    x, other = sample(), sample(300) * 1.5 + 1
    found = solve(x)
    for rank in (1, 8, 24):
        b = found.basis[:rank]
        centred = other - found.mean
        direct = ((centred - centred @ b.T @ b) ** 2).sum() / ((other - other.mean(0)) ** 2).sum()
        got = residual_energy(other.T @ other, other.sum(0), len(other), found.basis, found.mean, rank)
        assert got == pytest.approx(direct, rel=1e-6, abs=1e-9)


def test_residual_energy_on_its_own_data_is_the_spectrum_tail() -> None:
    x = sample()
    found = solve(x)
    got = residual_energy(x.T @ x, x.sum(0), len(x), found.basis, found.mean, 10)
    assert got == pytest.approx(found.spectrum[10:].sum() / found.spectrum.sum())
