from __future__ import annotations

import math

import numpy as np
import pytest

from xkv_gguf.base.divergence import kl_divergence, log_softmax
from xkv_gguf.errors import XkvError
from xkv_gguf.lab.metrics import Scores, join, percentile, score, summarize

RNG = np.random.default_rng(3)


def brute_force_kld(p_logits: np.ndarray, q_logits: np.ndarray) -> float:
    """KL(p || q) with Python's own exact sums."""
    log_z_p = math.log(math.fsum(math.exp(x) for x in p_logits))
    log_z_q = math.log(math.fsum(math.exp(x) for x in q_logits))
    terms = (math.exp(p - log_z_p) * ((p - log_z_p) - (q - log_z_q)) for p, q in zip(p_logits, q_logits, strict=True))
    return math.fsum(terms)


def test_log_softmax_is_normalized_and_keeps_differences() -> None:
    logits = RNG.normal(0, 10, (5, 100)).astype(np.float32)
    found = log_softmax(logits)
    assert found.dtype == np.float64
    np.testing.assert_allclose(np.exp(found).sum(axis=-1), 1, rtol=1e-12)
    np.testing.assert_allclose(found - found[:, :1], logits.astype(np.float64) - logits[:, :1], atol=1e-6)


def test_log_softmax_of_large_logits_does_not_overflow() -> None:
    np.testing.assert_allclose(log_softmax(np.array([1e6, 1e6])), -math.log(2))
    assert log_softmax(np.array([0.0, -1e6]))[0] == 0


def test_an_exact_cache_scores_zero() -> None:
    logits = RNG.normal(0, 4, (50, 1000)).astype(np.float32)
    tokens = RNG.integers(0, 1000, 50)
    figures = summarize(score(logits, logits.copy(), tokens))
    assert {name: figures[name] for name in ("kld_mean", "kld_median", "kld_p99", "kld_p999", "top1")} == {
        "kld_mean": 0.0,
        "kld_median": 0.0,
        "kld_p99": 0.0,
        "kld_p999": 0.0,
        "top1": 1.0,
    }


@pytest.mark.parametrize("p, q", [(0.5, 0.25), (0.9, 0.1), (0.999, 0.5), (1e-9, 0.5)])
def test_two_tokens_diverge_as_the_formula_says(p: float, q: float) -> None:
    logits_p, logits_q = np.log([[p, 1 - p]]), np.log([[q, 1 - q]])
    found = score(logits_p, logits_q, np.array([0]))
    expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    np.testing.assert_allclose(found.kld, expected, rtol=1e-12)
    np.testing.assert_allclose(found.nll, -math.log(q), rtol=1e-12)
    assert found.same_top[0] == ((p >= 0.5) == (q >= 0.5))


def test_a_constant_added_to_the_logits_changes_nothing() -> None:
    logits = RNG.normal(0, 4, (3, 20))
    assert score(logits, logits + 8.0, np.zeros(3, dtype=int)).kld.max() < 1e-14


def test_noise_scores_what_brute_force_finds() -> None:
    exact = RNG.normal(0, 4, (40, 300)).astype(np.float32)
    noisy = exact + RNG.normal(0, 0.3, exact.shape).astype(np.float32)
    tokens = RNG.integers(0, 300, 40)
    found = score(exact, noisy, tokens)
    expected = [brute_force_kld(p, q) for p, q in zip(exact.astype(float), noisy.astype(float), strict=True)]
    np.testing.assert_allclose(found.kld, expected, rtol=1e-9)
    np.testing.assert_array_equal(found.same_top, exact.argmax(axis=1) == noisy.argmax(axis=1))
    # half the variance of the noise under p, to second order
    assert 0.2 * 0.09 / 2 < found.kld.mean() < 0.09


def test_the_order_of_the_arguments_matters() -> None:
    p, q = np.log([[0.9, 0.1]]), np.log([[0.5, 0.5]])
    token = np.array([0])
    assert score(p, q, token).kld[0] != pytest.approx(score(q, p, token).kld[0])


def test_a_token_without_probability_adds_nothing() -> None:
    log_p = np.array([[0.0, -np.inf]])
    assert kl_divergence(log_p, log_p)[0] == 0
    np.testing.assert_allclose(kl_divergence(log_p, np.log([[0.5, 0.5]])), math.log(2))


@pytest.mark.parametrize("fraction, expected", [(0, 1), (0.5, 3), (0.25, 2), (0.99, 4.96), (0.999, 4.996), (1, 5)])
def test_percentiles_of_known_values(fraction: float, expected: float) -> None:
    assert percentile(np.array([5.0, 3.0, 1.0, 4.0, 2.0]), fraction) == pytest.approx(expected)


def test_the_median_of_an_even_number_lies_between() -> None:
    assert percentile(np.array([1.0, 2.0, 10.0, 4.0]), 0.5) == 3.0
    assert percentile(np.array([7.0]), 0.999) == 7.0


def test_percentiles_are_those_of_numpy() -> None:
    values = RNG.exponential(1, 777)
    for fraction in (0.5, 0.9, 0.99, 0.999):
        assert percentile(values, fraction) == pytest.approx(float(np.quantile(values, fraction)), rel=1e-12)


def test_a_uniform_models_perplexity_is_its_vocabulary() -> None:
    uniform = np.zeros((30, 1234), dtype=np.float32)
    figures = summarize(score(uniform, uniform, RNG.integers(0, 1234, 30)))
    assert figures["ppl"] == pytest.approx(1234, rel=1e-12)


def test_perplexity_is_of_the_cache_under_test() -> None:
    p, q = np.log([[0.5, 0.5], [0.5, 0.5]]), np.log([[0.25, 0.75], [0.25, 0.75]])
    assert summarize(score(p, q, np.array([0, 1])))["ppl"] == pytest.approx(1 / math.sqrt(0.25 * 0.75))


def test_batches_join_to_what_one_run_scores() -> None:
    exact, other = RNG.normal(0, 2, (2, 37, 50))
    tokens = RNG.integers(0, 50, 37)
    whole = score(exact, other, tokens)
    parts = join(score(exact[i : i + 10], other[i : i + 10], tokens[i : i + 10]) for i in range(0, 37, 10))
    np.testing.assert_array_equal(whole.kld, parts.kld)
    assert summarize(whole) == summarize(parts)


def test_logits_that_are_no_numbers_are_told() -> None:
    with pytest.raises(XkvError, match="kld_mean is nan: the model's logits are not all finite"):
        summarize(Scores(np.array([np.nan]), np.array([True]), np.array([1.0])))
